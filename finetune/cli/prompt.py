"""What a person types at `finetune chat`: lines that can be edited and called back, and questions of several lines."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

HISTORY_LINES = 1000
GOES_ON = "\\"  # at a line's end


def history_file() -> Path:
    """Where the lines typed at a terminal are kept, readable by their writer only."""
    home = os.environ.get("XDG_STATE_HOME", "")
    root = Path(home) if Path(home).is_absolute() else Path("~/.local/state").expanduser()
    return root / "finetune" / "chat_history"


@contextmanager
def remembering(terminal: bool) -> Iterator[None]:
    """Within the block, `input` edits lines and knows those of earlier conversations; only on a terminal.

    A history that cannot be read or written is done without.
    """
    if not terminal:
        yield
        return
    try:
        import readline
    except ImportError:  # Windows, or a Python built without it
        yield
        return
    path = history_file()
    readline.set_history_length(HISTORY_LINES)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        readline.read_history_file(path)
    try:
        yield
    finally:
        with suppress(OSError):
            readline.write_history_file(path)


def read_question(terminal: bool) -> str:
    """The next line, and those after it as long as a line ends in a backslash. Raises EOFError, KeyboardInterrupt."""
    line = input("\nyou> " if terminal else "")
    while line.endswith(GOES_ON):
        line = line.removesuffix(GOES_ON) + "\n"
        try:
            line += input("...> " if terminal else "")
        except EOFError:  # what there is, is the question
            break
    return clean(line)


def clean(text: str) -> str:
    """`text` without the halves of characters that a terminal in another encoding sends."""
    return text.encode("utf-8", "replace").decode()
