"""Fixtures that tests of several folders share: a loopback Hub, a pinned base, a small training."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers.hub_server import LoopbackHub, point_client, serve
from tests.helpers.pinned import make_base  # noqa: F401 - a fixture
from tests.helpers.trainings import base, ctx, load  # noqa: F401 - fixtures


def pytest_collection_finish() -> None:
    """Keep what imports and collection made out of every later garbage collection: two million objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def gradients_on() -> Iterator[None]:
    """A test that leaves torch.no_grad on (a generator that is never closed) must not reach the next one."""
    torch.set_grad_enabled(True)
    yield
    torch.set_grad_enabled(True)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    """A loopback Hub to which the real client in this process talks, logged in as `me`."""
    with serve() as running:
        point_client(monkeypatch, running, tmp_path / "hf_home")
        yield running


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests recorded as `summary`, also from the processes of pytest-xdist."""
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == "summary" and getattr(report, "when", "") == "call":
                    terminalreporter.write_line(value)
