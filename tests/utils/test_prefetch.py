"""Results come in order, never more than a few ahead, and an error comes in its place."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from finetune.utils.runtime import in_order


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_order_and_bound(ahead: int) -> None:
    asked = []

    def items() -> Iterator[int]:
        for i in range(20):
            asked.append(i)
            yield i

    for taken, value in enumerate(in_order(lambda i: i * i, items(), 3, ahead)):
        assert value == taken * taken
        assert len(asked) <= taken + ahead
    assert len(asked) == 20


def test_an_error_comes_in_its_place_and_ends_the_threads() -> None:
    before = threading.active_count()
    found = []
    with pytest.raises(ZeroDivisionError):
        for value in in_order(lambda i: 1 // (i - 3), range(10), 2, 4):
            found.append(value)
    assert len(found) == 3
    assert threading.active_count() == before


def test_an_error_of_the_items_ends_the_threads() -> None:
    before = threading.active_count()

    def items() -> Iterator[int]:
        yield 1
        raise KeyError("stop")

    with pytest.raises(KeyError):
        list(in_order(str, items(), 2, 4))
    assert threading.active_count() == before
