"""Work a few items ahead of whoever takes the results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_order(function: Callable[[T], R], items: Iterable[T], threads: int, ahead: int) -> Generator[R, None, None]:
    """`function` of each item, in the order of `items`, made by `threads` threads.

    Item k is asked for, and begun, only once the result of item k - `ahead` has been taken and the one after it asked
    for: so `ahead` items at most are held, the one taken last included. What `function` raises is raised here, in its
    place; then, and when the caller stops early, nothing more is begun.
    """
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads, "ahead") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
