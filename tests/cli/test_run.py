"""Signals at awkward moments."""

import os
import signal
import sys

import pytest

from finetune.cli import session as cli_session
from finetune.utils.console import Screen


class Finalised:
    """Does something when it is let go of."""

    def __init__(self, act):
        self.act = act

    def __del__(self):
        self.act()


@pytest.fixture
def dropped(monkeypatch):
    """The kinds of the exceptions that Python would print and go on."""
    kinds = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: kinds.append(args.exc_type))
    return kinds


def test_a_signal_inside_a_finaliser_leaves_no_traceback(dropped):
    with cli_session.signals_handled(Screen(silent=True)) as stop:
        Finalised(lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert stop.signal_number == signal.SIGTERM
    assert dropped == []


def test_any_other_fault_there_is_told(dropped):
    with cli_session.signals_handled(Screen(silent=True)):
        Finalised(lambda: 1 / 0)
    assert dropped == [ZeroDivisionError]
