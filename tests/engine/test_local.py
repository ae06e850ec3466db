"""Partitions in several processes: the same results in the same order, errors as they are."""

from functools import partial

import pytest

from finetune.engine.local import Local
from finetune.errors import FinetuneError, InputError


def squares(offset):
    """Build a worker with state: which of its calls this is."""
    calls = []

    def function(part):
        calls.append(part)
        if part == 7:
            raise InputError(f"row {part} is wrong")
        if part == 8:
            import os

            os._exit(1)
        return part * part + offset

    return function


def test_processes_give_the_results_of_one_in_order():
    parts = [1, 2, 3, 4, 5, 6, 9]
    assert list(Local(2).map(partial(squares, 1), parts, 7)) == list(Local(1).map(partial(squares, 1), parts, 7))
    assert list(Local().map(partial(squares, 0), [], 0)) == []


def test_an_error_of_a_row_and_a_lost_process_are_one_sentence():
    done = Local(2).map(partial(squares, 0), [1, 7, 2], 3)
    assert next(done) == 1
    with pytest.raises(InputError, match="row 7 is wrong"):
        list(done)
    with pytest.raises(FinetuneError, match="ended unexpectedly"):
        list(Local(2).map(partial(squares, 0), [1, 8, 2], 3))
