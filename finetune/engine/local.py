"""Run partitions in this process, or in several processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from finetune.errors import FinetuneError
from finetune.utils.runtime import available_memory, end_with_parent, usable_cpus

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

T = TypeVar("T")
R = TypeVar("R")
PAYS_FROM_ROWS = 50_000  # a worker needs about 6 s to import the libraries
AHEAD = 2  # partitions per worker that are computed before they are taken
WORKER_BYTES = 1_000_000_000  # memory of a worker with the libraries
SORTED_TOGETHER = 1 << 24  # keys: 0.7 GB


class Local:
    """Engine of one machine with `workers` processes; auto: one per processor, if rows and free memory are enough.

    The processes serve one map after another, so that they import the libraries once; `close` ends them.
    """

    def __init__(self, workers: int | Literal["auto"] = "auto") -> None:
        self._wanted = workers
        self._pool: ProcessPoolExecutor | None = None
        self._size = 0

    def map(
        self, build: Callable[[], Callable[[T], R]], parts: Sequence[T], rows: int, part_bytes: int = 0
    ) -> Iterator[R]:
        """As `Engine.map`. The workers use one thread each: processes or threads, never both."""
        limit = self._limit(rows, part_bytes)
        if min(limit, len(parts)) <= 1:
            yield from map(build(), parts)
            return
        pool = self._started(limit)
        waiting: deque[Future[Any]] = deque()
        with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
            built = Path(folder) / "build"
            built.write_bytes(pickle.dumps(build))
            try:
                for part in parts:
                    waiting.append(pool.submit(_work, built, part))
                    if len(waiting) > AHEAD * limit:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            except BrokenProcessPool:
                self.close()
                raise FinetuneError(
                    "a worker process ended unexpectedly (out of memory?); run again, with runtime.workers=1 if it "
                    "repeats"
                ) from None
            finally:
                for future in waiting:
                    future.cancel()

    def group(self, keys: NDArray[np.uint64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """As `Engine.group`; SORTED_TOGETHER keys at a time, by ranges of their values: 40 bytes for each of these."""
        import numpy as np

        shards = -(-len(keys) // SORTED_TOGETHER) or 1
        shard = (keys >> np.uint64(32)) * np.uint64(shards) >> np.uint64(32)
        kind = np.empty(len(keys), np.int32)
        counts = [np.zeros(0, np.int64)]
        before = 0
        for number in range(shards):
            here = np.flatnonzero(shard == number)
            _, inverse, count = np.unique(keys[here], return_inverse=True, return_counts=True)
            kind[here] = inverse + before
            before += len(count)
            counts.append(count)
        return kind, np.concatenate(counts)

    def sort(self, keys: NDArray[Any]) -> NDArray[np.int64]:
        """As `Engine.sort`."""
        import numpy as np

        return np.argsort(keys, kind="stable")

    def workers(self, build: Callable[[], Any], rows: int) -> Here:
        """As `Engine.workers`: one in this process, whose libraries use threads."""
        return Here(build)

    def close(self) -> None:
        """As `Engine.close`."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool, self._size = None, 0

    def _limit(self, rows: int, part_bytes: int) -> int:
        """Return the number of workers that the recipe, rows, processors and free memory allow; 0: memory is short."""
        if self._wanted == "auto" and rows < PAYS_FROM_ROWS:
            return 1
        free = available_memory()
        most = usable_cpus() if self._wanted == "auto" else self._wanted
        if free is None or (self._wanted != "auto" and not part_bytes):
            return most
        return min(most, (free + self._size * WORKER_BYTES) // (WORKER_BYTES + part_bytes))

    def _started(self, limit: int) -> ProcessPoolExecutor:
        with suppress(BrokenProcessPool):  # a worker that was killed between two maps has taken nothing with it
            if self._pool is not None and self._size <= limit:
                self._pool.submit(os.getpid)
                return self._pool
        self.close()
        context = multiprocessing.get_context("spawn")
        self._pool, self._size = ProcessPoolExecutor(limit, context, _start), limit
        return self._pool


class Here:
    """Stateful workers of one machine: one object in this process."""

    def __init__(self, *builds: Callable[[], Any]) -> None:
        self._objects = [build() for build in builds]

    def __len__(self) -> int:
        return len(self._objects)

    def call(self, method: str, each: Sequence[Any], shared: object = None) -> list[Any]:
        """As `Workers.call`."""
        pairs = zip(self._objects, each, strict=True)
        return [None if own is None else getattr(one, method)(own, shared) for one, own in pairs]


_state: dict[str, Any] = {}  # of a worker process: the file with what its function is built by, and the function


def _start() -> None:
    os.environ.update(TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", RAYON_NUM_THREADS="1")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the parent's, which then cancels the work
    end_with_parent()


def _work(built: Path, part: object) -> object:
    if _state.get("built") != built:
        _state.clear()
        function = pickle.loads(built.read_bytes())()  # noqa: S301 - the parent wrote it; its error reaches the parent
        _state.update(built=built, function=function)
    return _state["function"](part)
