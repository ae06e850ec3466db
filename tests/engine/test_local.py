"""Partitions in several processes: the same results in the same order, errors as they are."""

import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from finetune.engine import local
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


def test_the_processes_serve_the_next_map_and_end_when_closed():
    engine = Local(2)
    first = set(engine.map(pid_of, range(4), 4))
    processes = dict(engine._pool._processes)
    assert set(engine.map(pid_of, range(4), 4)) | first <= set(processes) and len(processes) == 2
    abandoned = engine.map(partial(squares, 0), [1] * 9, 9)
    assert next(abandoned) == 1
    abandoned.close()
    assert list(engine.map(partial(squares, 1), [2, 3], 2)) == [5, 10]
    engine.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in processes)


def test_a_process_that_was_killed_between_two_maps_is_replaced():
    engine = Local(2)
    assert list(engine.map(partial(squares, 0), [1, 2], 2)) == [1, 4]
    pool = engine._pool
    for pid in pool._processes:
        os.kill(pid, signal.SIGKILL)
    pool._executor_manager_thread.join(20)  # until it has seen the deaths
    assert list(engine.map(partial(squares, 1), [2, 3], 2)) == [5, 10]
    engine.close()


def pid_of():
    """Build a worker that returns its process."""
    return lambda part: os.getpid()


def test_no_more_parts_than_free_memory_allows(monkeypatch):
    monkeypatch.setattr(local, "usable_cpus", lambda: 64)
    monkeypatch.setattr(local, "available_memory", lambda: 32 * 10**9)
    for workers, rows, part_bytes, limit in (
        ("auto", 10**5, 0, 32), ("auto", 10**5, 10**9, 16), ("auto", 10**5, 10**11, 0), ("auto", 10, 0, 1),
        (40, 10, 0, 40), (40, 10, 10**9, 16), (4, 10, 10**9, 4),
    ):  # fmt: skip
        assert Local(workers)._limit(rows, part_bytes) == limit
    engine = Local("auto")
    engine._size = 8  # their memory is not free, but theirs
    assert engine._limit(10**5, 10**9) == 20


@pytest.mark.parametrize("together", [7, 1 << 24])
def test_keys_are_grouped_and_sorted(monkeypatch, together):
    monkeypatch.setattr(local, "SORTED_TOGETHER", together)
    keys = np.random.default_rng(0).integers(0, 2**64, 30, np.uint64)[np.arange(100) % 30]
    _, kind, counts = np.unique(keys, return_inverse=True, return_counts=True)
    found = Local().group(keys)
    assert np.array_equal(found[0], kind) and np.array_equal(found[1], counts)
    ranks = np.array([3.0, -np.inf, 1.0, 3.0, 1.0])
    assert Local().sort(ranks).tolist() == sorted(range(5), key=lambda i: (ranks[i], i))


def test_an_error_of_a_row_and_a_lost_process_are_one_sentence():
    done = Local(2).map(partial(squares, 0), [1, 7, 2], 3)
    assert next(done) == 1
    with pytest.raises(InputError, match="row 7 is wrong"):
        list(done)
    with pytest.raises(FinetuneError, match="ended unexpectedly"):
        list(Local(2).map(partial(squares, 0), [1, 8, 2], 3))
