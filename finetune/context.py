"""What a stage is handed beside its own part of the recipe: where to work, how to report, when to stop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from finetune.errors import Stopped

if TYPE_CHECKING:
    from finetune.recipe import Runtime, Tracking

T = TypeVar("T")
Metrics = dict[str, object]
"""What a stage says of itself: JSON scalars, lists and mappings; bytes are integers, seconds floats."""


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


@dataclass
class StopFlag:
    """Set by a signal handler, read by long work between two steps."""

    signal_number: int = 0

    def check(self) -> None:
        """Raise Stopped if a signal has come."""
        if self.signal_number:
            raise Stopped(self.signal_number)


@dataclass(frozen=True)
class Context:
    """What every stage shares. Frozen: a stage leaves its result in its folder, never here."""

    scratch: Path  # local and large; everything in it can be made again
    runtime: Runtime
    tracking: Tracking
    run_name: str = "run"
    say: Callable[[str], None] = lambda line: None  # one plain line for a person
    bar: Callable[[str, int | None], Bar] = lambda label, total: SilentBar()
    stop: StopFlag = field(default_factory=StopFlag)
    device: str = "auto"  # "auto", "cpu" or "cuda"; backends/models.py decides what auto means
    rank: int = 0
    world: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)  # what the tracker may record; never a secret

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Yield `items` under a progress bar, and raise Stopped between two of them once a signal has come."""
        bar = self.bar(label, total)
        try:
            for item in items:
                self.stop.check()
                yield item
                bar.advance()
        finally:
            bar.close()
