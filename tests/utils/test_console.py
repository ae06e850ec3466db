"""What a terminal shows, and what happens when nobody is there to see it."""

import io
import subprocess
import sys

import pytest

from finetune.utils import console
from finetune.utils.console import Quiet, Screen


def test_a_reader_that_goes_away_does_not_end_the_work():
    """rich leaves with status 1 on a closed pipe: a training would end because `tee` did."""
    code = """
import os
from finetune.utils.console import PlainBar, Screen, print_error
read, write = os.pipe()
os.dup2(write, 2)
os.close(read)
screen = Screen()
for _ in range(3):
    screen.say("a line")
bar = screen.bar("steps", 2)
bar._last = -100.0
bar.advance()
print_error("an error")
print("still here")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "still here\n")


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_live_bar_on_a_terminal_and_lines_elsewhere(terminal, monkeypatch):
    shown = io.StringIO()
    screen = Screen()
    monkeypatch.setattr(screen, "_console", Quiet(file=shown, force_terminal=terminal, width=100))
    monkeypatch.setattr(console, "PLAIN_SECONDS", 0.0)
    bar = screen.bar("training", 12)
    bar.advance(7, "loss 2.3")
    bar.close()
    text = shown.getvalue()
    assert "training" in text and "7/12" in text and "loss 2.3" in text
    assert ("\x1b[" in text) is terminal and ("━" in text) is terminal
