"""What a terminal shows, and what happens when nobody is there to see it."""

import subprocess
import sys


def test_a_reader_that_goes_away_does_not_end_the_work():
    """rich leaves with status 1 on a closed pipe: a training would end because `tee` did."""
    code = """
import os
from finetune.report.console import PlainBar, Screen, print_error
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
