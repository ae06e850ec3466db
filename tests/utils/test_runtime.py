"""Processors and memory of a container: cgroup v2 files."""

import os

import pytest

from finetune.engine import local
from finetune.utils import runtime

GB = 1_000_000_000


@pytest.fixture
def cgroup(tmp_path, monkeypatch):
    """A function that writes the files of a container."""
    monkeypatch.setattr(runtime, "CGROUP", tmp_path)

    def write(**files):
        for name, text in files.items():
            (tmp_path / name.replace("_", ".")).write_text(text)

    return write


def test_the_processor_quota_is_respected(cgroup, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert runtime.usable_cpus() == 8
    for text, count in (("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("9900000 100000", 8), ("", 8)):
        cgroup(cpu_max=text)
        assert runtime.usable_cpus() == count


def test_memory_in_use_is_not_available_and_a_share_is(cgroup):
    whole = runtime.available_memory()
    assert whole > 1_100_000
    cgroup(memory_max="max", memory_current="1", memory_stat="")
    assert runtime.available_memory() > 1_100_000
    cgroup(memory_max="1000000", memory_current="700000", memory_stat="anon 5\ninactive_file 100000\n")
    assert runtime.available_memory() == 400_000 and runtime.available_memory(4) == 100_000
    cgroup(memory_current="1200000")
    assert runtime.available_memory() == 0


def test_automatic_workers_need_memory(monkeypatch):
    monkeypatch.setattr(local, "usable_cpus", lambda: 8)
    for free, count in ((None, 8), (100 * GB, 8), (3 * GB, 3), (GB // 2, 0)):
        monkeypatch.setattr(local, "available_memory", lambda free=free: free)
        assert local.Local()._limit(local.PAYS_FROM_ROWS, 0) == count
