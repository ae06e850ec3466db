"""What a stage is handed beside its own part of the recipe: where to work, how to report, when to stop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from finetune.errors import FinetuneError, Stopped
from finetune.utils.progress import Bar, HeardBar, SilentBar

if TYPE_CHECKING:
    from finetune.recipe import Runtime, Tracking

T = TypeVar("T")


Metrics = dict[str, object]
"""What a stage says of itself: JSON scalars, lists and mappings; bytes are integers, seconds floats."""


@dataclass
class StopFlag:
    """Set by a signal handler, which also interrupts the work at once, wherever it is: a stage is complete only with
    its manifest, so nothing is lost. Training alone is left to reach its next check, for it has something to save.
    """

    signal_number: int = 0
    deferred: bool = False  # the handler must not interrupt: whoever works looks at signal_number
    hold: Callable[[], None] = lambda: None  # do not leave by force: something is being saved
    lost: FinetuneError | None = None  # another process took over the folder that is being built
    require_own: Callable[[], None] = lambda: None  # looks whether one did, and raises: before a file is written again

    def lose(self, error: FinetuneError) -> None:
        """Let the next check raise `error`."""
        self.lost = error

    def check(self) -> None:
        """Raise Stopped if a signal has come, or FinetuneError if another process builds this folder by now."""
        if self.lost is not None:
            raise self.lost
        if self.signal_number:
            raise Stopped(self.signal_number)

    @contextmanager
    def at_checks_only(self) -> Iterator[None]:
        """Within this block a signal only sets the flag."""
        before, self.deferred = self.deferred, True
        try:
            yield
        finally:
            self.deferred = before


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
    hashed: Callable[[Path, str], None] = lambda path, digest: None  # a large file, written, synced, and its xxh3-128
    device: str = "auto"  # "auto", "cpu" or "cuda"; models/loading.py decides what auto means
    rank: int = 0
    world: int = 1
    launch: str = ""  # tells the processes of one launch from those of another
    environment: Mapping[str, str] = field(default_factory=dict)  # what the tracker may record; never a secret

    def heard_by(self, tell: Callable[[str], None]) -> Context:
        """The same, whose lines and progress `tell` hears too: it is called at every step, so it must be quick."""

        def say(line: str) -> None:
            tell(line)
            self.say(line)

        return replace(self, say=say, bar=lambda label, total: HeardBar(self.bar(label, total), tell, label, total))

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
