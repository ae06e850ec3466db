"""Arguments common to all stages: folders, progress output, the stop flag."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from finetune.engine.local import Local
from finetune.errors import FinetuneError, Stopped
from finetune.utils.limits import memory_is_short
from finetune.utils.progress import Bar, HeardBar, SilentBar

if TYPE_CHECKING:
    from finetune.engine.interface import Engine
    from finetune.recipe import Runtime, Tracking

T = TypeVar("T")


@dataclass
class StopFlag:
    """Set by a signal handler, which also interrupts the work immediately: a stage is complete only with its manifest,
    so nothing is lost. Only training continues to its next check, because it has a checkpoint to save.
    """

    signal_number: int = 0
    deferred: bool = False  # the handler must not interrupt: the work itself checks signal_number
    hold: Callable[[], None] = lambda: None  # do not leave by force: something is being saved
    lost: FinetuneError | None = None  # another process took over the folder that is being built
    require_own: Callable[[], None] = lambda: None  # looks whether one did, and raises: before a file is written again

    def lose(self, error: FinetuneError) -> None:
        """Let the next check raise `error`."""
        self.lost = error

    def check(self) -> None:
        """Raise Stopped after a signal, or FinetuneError if another process has taken over this stage folder.

        Also raises MemoryError if almost no memory is left, before native code aborts the process.
        """
        if self.lost is not None:
            raise self.lost
        if self.signal_number:
            raise Stopped(self.signal_number)
        if memory_is_short():
            raise MemoryError

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
    """Settings common to all stages. Frozen: a stage writes its result to its folder, never here."""

    scratch: Path  # local and large; all of it can be rebuilt
    runtime: Runtime
    tracking: Tracking
    run_name: str = "run"
    say: Callable[[str], None] = lambda line: None  # prints one line
    bar: Callable[[str, int | None], Bar] = lambda label, total: SilentBar()
    stop: StopFlag = field(default_factory=StopFlag)
    hashed: Callable[[Path, str], None] = lambda path, digest: (
        None
    )  # receives a large file that was written and synced, and its xxh3-128
    device: str = "auto"  # "auto", "cpu" or "cuda"; models/loading.py decides what auto means
    rank: int = 0
    world: int = 1
    launch: str = ""  # identifies the processes of one launch
    engine: Engine = field(default_factory=Local)  # runs the partitions of data stages
    environment: Mapping[str, str] = field(default_factory=dict)  # recorded by the tracker; never a secret
    artifacts: Path | None = None  # the durable root; None: scratch holds what is kept between stages as well

    def heard_by(self, tell: Callable[[str], None]) -> Context:
        """Return a copy that also passes its lines and progress to `tell`, a fast function called at every step."""

        def say(line: str) -> None:
            tell(line)
            self.say(line)

        return replace(self, say=say, bar=lambda label, total: HeardBar(self.bar(label, total), tell, label, total))

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Yield `items` under a progress bar; raise Stopped between two of them if a signal was received."""
        bar = self.bar(label, total)
        try:
            for item in items:
                self.stop.check()
                yield item
                bar.advance()
        finally:
            bar.close()
