"""Run partitions in this process, or in several processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from finetune.errors import FinetuneError
from finetune.utils.runtime import available_memory, end_with_parent, usable_cpus

T = TypeVar("T")
R = TypeVar("R")
PAYS_FROM_ROWS = 50_000  # a worker needs about 6 s to import the libraries
AHEAD = 2  # partitions per worker that are computed before they are taken
WORKER_BYTES = 1_000_000_000  # memory of a worker with the libraries


@dataclass(frozen=True)
class Local:
    """Engine of one machine with `workers` processes; auto: one per processor, if rows and free memory are enough."""

    workers: int | Literal["auto"] = "auto"

    def map(self, build: Callable[[], Callable[[T], R]], parts: Sequence[T], rows: int) -> Iterator[R]:
        """As `Engine.map`. The workers use one thread each: processes or threads, never both."""
        wanted = self.workers if self.workers != "auto" else _affordable() if rows >= PAYS_FROM_ROWS else 1
        workers = min(wanted, len(parts))
        if workers <= 1:
            function = build()
            yield from map(function, parts)
            return
        context = multiprocessing.get_context("spawn")
        waiting: deque[Future[Any]] = deque()
        pool = ProcessPoolExecutor(workers, context, _start, (build,))
        try:
            for part in parts:
                waiting.append(pool.submit(_work, part))
                if len(waiting) > AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise FinetuneError(
                "a worker process ended unexpectedly (out of memory?); run again, with runtime.workers=1 if it repeats"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _affordable() -> int:
    """Return the number of workers that processors and free memory allow; 0 if memory is short."""
    free = available_memory()
    return usable_cpus() if free is None else min(usable_cpus(), free // WORKER_BYTES)


_state: dict[str, Any] = {}  # of a worker process: how its function is built, and the function


def _start(build: Callable[[], Any]) -> None:
    os.environ.update(TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", RAYON_NUM_THREADS="1")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the parent's, which then cancels the work
    end_with_parent()
    _state["build"] = build


def _work(part: object) -> object:
    if "function" not in _state:
        _state["function"] = _state["build"]()  # here, so that its error reaches the parent
    return _state["function"](part)
