"""The engine as stages see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Engine(Protocol):
    """Runs a function over partitions. The results and their order do not depend on the engine.

    A stage divides its rows into partitions whose size does not depend on the number of workers.
    """

    def map(self, build: Callable[[], Callable[[T], R]], parts: Sequence[T], rows: int) -> Iterator[R]:
        """Yield `build()(part)` for each of `parts`, in order.

        Args:
            build: called once in every worker; returns the function with the state that a worker keeps (a tokenizer, a
                model). `functools.partial` of a module's function, because it is sent to other processes.
            parts: descriptions of the partitions (a file and a range of rows), small and picklable.
            rows: number of rows in all parts; workers are started only if there are enough.

        Raises:
            What `build` or its function raises, at the position of the failed part.
        """
