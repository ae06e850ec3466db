"""The engine as stages see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

T = TypeVar("T")
R = TypeVar("R")


class Workers(Protocol):
    """Objects that keep a state between calls, each in a process of its own or all in this one."""

    def __len__(self) -> int:
        """How many there are."""

    def call(self, method: str, each: Sequence[Any], shared: object = None) -> list[Any]:
        """Return `worker.method(each[k], shared)` of every worker k, all at the same time; None if each[k] is None.

        A worker whose process was lost has been built again and has the state of a new one: the caller has to notice
        it, and repeats what it had done.
        """


class Engine(Protocol):
    """Runs a function over partitions, and orders keys. Results and their order do not depend on the engine.

    A stage divides its rows into partitions whose size does not depend on the number of workers.
    """

    def map(
        self, build: Callable[[], Callable[[T], R]], parts: Sequence[T], rows: int, part_bytes: int = 0
    ) -> Iterator[R]:
        """Yield `build()(part)` for each of `parts`, in order.

        Args:
            build: called once in every worker; returns the function with the state that a worker keeps (a tokenizer, a
                model). `functools.partial` of a module's function, because it is sent to other processes.
            parts: descriptions of the partitions (a file and a range of rows), small and picklable.
            rows: number of rows in all parts; workers are started only if there are enough.
            part_bytes: memory of a part in a worker with its results that wait, if it is much: no more parts than
                free memory allows are computed at once.

        Raises:
            What `build` or its function raises, at the position of the failed part.
        """

    def group(self, keys: NDArray[np.uint64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return for each of `keys` (N,) its place among the different ones, ascending, and how often each occurs."""

    def sort(self, keys: NDArray[Any]) -> NDArray[np.int64]:
        """Return the places (N,) of `keys` (N,) in ascending order, the earlier one first on a tie."""

    def workers(self, build: Callable[[], Any], rows: int) -> Workers:
        """Start stateful workers, each made by `build()`, for about `rows` rows; they end with their last reference."""

    def close(self) -> None:
        """Free the processes that `map` keeps; the next map starts others."""
