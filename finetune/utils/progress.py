"""Progress bars: the interface, one that shows nothing, one that also reports to a callback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Bar(Protocol):
    """A progress bar that is already on the screen (or prints plain lines at intervals)."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Move by `steps`; `note` is a short figure shown beside the bar."""

    def close(self) -> None:
        """Take the bar away."""


class SilentBar:
    """A bar that shows nothing."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class HeardBar:
    """A bar that also passes its position, as text, to a callback."""

    def __init__(self, bar: Bar, tell: Callable[[str], None], label: str, total: int | None) -> None:
        self._bar, self._tell, self._label, self._total = bar, tell, label, total
        self._done = 0

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Move by `steps`, and report the position."""
        self._done += steps
        self._tell(f"{position(self._label, self._done, self._total)} {note}".rstrip())
        self._bar.advance(steps, note)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()


def position(label: str, done: int, total: int | None) -> str:
    """Return `training 7/100`, or `training 7` if the total is unknown."""
    return f"{label} {done}/{total}" if total else f"{label} {done}"
