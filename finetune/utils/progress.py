"""Progress bars: the interface, one that shows nothing, one that a second listener hears."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    pass


class Bar(Protocol):
    """A progress bar that is already on the screen (or prints plain lines now and then)."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Move by `steps`; `note` is a short figure shown beside the bar."""

    def close(self) -> None:
        """Take the bar away."""


class SilentBar:
    """A bar that shows nothing."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Nothing to move."""

    def close(self) -> None:
        """Nothing to take away."""


class HeardBar:
    """A bar that tells one more listener, in words, how far it is."""

    def __init__(self, bar: Bar, tell: Callable[[str], None], label: str, total: int | None) -> None:
        self._bar, self._tell, self._label, self._total = bar, tell, label, total
        self._done = 0

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Move by `steps`, and tell."""
        self._done += steps
        self._tell(f"{position(self._label, self._done, self._total)} {note}".rstrip())
        self._bar.advance(steps, note)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()


def position(label: str, done: int, total: int | None) -> str:
    """`training 7/100`, or `training 7` where nobody knows how many there will be."""
    return f"{label} {done}/{total}" if total else f"{label} {done}"
