import multiprocessing
import os

import numpy as np
import pytest

from finetune.dedup import embedding_cache
from finetune.dedup.embedding_cache import EmbeddingCache


def vectors(count, first=0):
    return np.arange(first * 4, (first + count) * 4, dtype=np.float32).reshape(count, 4)


@pytest.fixture
def said():
    return []


@pytest.fixture
def cache(tmp_path, said):
    return EmbeddingCache(tmp_path, {"files": "1"}, said.append)


def test_what_was_kept_is_found_by_its_text(cache, tmp_path, said):
    assert len(cache.find(["a"])[0]) == 0
    cache.keep(["a", "b", "\ud800"], vectors(3))
    cache.keep(["c"], vectors(1, 3))
    rows, found = cache.find(["c", "none", "b", "B", "\ud800"])
    assert rows.tolist() == [0, 2, 4]
    assert np.array_equal(found, vectors(4)[[3, 1, 2]])
    other = EmbeddingCache(tmp_path, {"files": "2"}, said.append)
    assert len(other.find(["a", "b"])[0]) == 0
    assert said == [] and not list((tmp_path / "embeddings").glob("*/.*"))


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "not finite"])
def test_a_damaged_shard_is_removed_and_said(cache, tmp_path, said, damage):
    texts = [f"t{i}" for i in range(200)]
    cache.keep(texts, np.full((200, 4), np.nan, np.float32) if damage == "not finite" else vectors(200))
    cache.keep(["good"], vectors(1))
    shard = max((tmp_path / "embeddings").rglob("*.parquet"), key=lambda p: p.stat().st_size)
    content = bytearray(shard.read_bytes())
    if damage == "flipped":
        content[content.index(vectors(200).tobytes()[-64:])] ^= 1
    if damage in ("cut", "empty"):
        content = content[: len(content) // 2 if damage == "cut" else 0]
    shard.write_bytes(content)
    rows, found = cache.find([*texts, "good"])
    assert rows.tolist() == [200] and np.array_equal(found, vectors(1))
    assert len(said) == 1 and "recomputed" in said[0] and not shard.exists()
    cache.keep(texts, vectors(200))
    assert len(cache.find(texts)[0]) == 200 and len(said) == 1


def test_the_longest_unused_go_when_there_is_too_much(cache, tmp_path, monkeypatch):
    for k, text in enumerate("abc"):
        cache.keep([text], vectors(1, k))
    shards = {
        t: next(p for p in (tmp_path / "embeddings").rglob("*.parquet") if cache._read(p)[1][0, 0] == 4 * k)
        for k, t in enumerate("abc")
    }
    for k, text in enumerate("abc"):
        os.utime(shards[text], (1000 + k, 1000 + k))
    cache.find(["a"])  # looking reads every shard of the model: all are in use
    for k, text in enumerate("bca"):
        os.utime(shards[text], (1000 + k, 1000 + k))
    monkeypatch.setattr(embedding_cache, "MAX_SHARDS", 3)
    cache.keep(["d"], vectors(1, 3))
    assert cache.find(list("abcd"))[0].tolist() == [0, 2, 3]
    monkeypatch.setattr(embedding_cache, "MAX_BYTES", 1)
    cache.keep(["e"], vectors(1, 4))
    assert len(cache.find(list("abcde"))[0]) == 0


def test_what_a_killed_process_left_goes_after_a_day(cache, tmp_path):
    cache.keep(["a"], vectors(1))
    folder = next((tmp_path / "embeddings").iterdir())
    for name, age in ((".old", 10**6), (".new", 0)):
        (folder / name).write_text("half a shard")
        os.utime(folder / name, (folder.stat().st_mtime - age,) * 2)
    cache.keep(["b"], vectors(1))
    assert sorted(p.name for p in folder.glob(".*")) == [".new"]


def test_a_disk_that_takes_nothing_costs_only_time(tmp_path, said):
    (tmp_path / "embeddings").write_text("a file where the folder should be")
    cache = EmbeddingCache(tmp_path, {}, said.append)
    assert len(cache.find(["a"])[0]) == 0
    cache.keep(["a"], vectors(1))
    assert len(said) == 1 and "cannot be cached" in said[0]


def _write(folder, first):
    cache = EmbeddingCache(folder, {"files": "1"}, print)
    for k in range(first, first + 20):
        cache.keep([f"t{k}"], vectors(1, k))
        cache.find([f"t{k}"])


def test_two_processes_at_once(cache, tmp_path, said):
    processes = [multiprocessing.get_context("fork").Process(target=_write, args=(tmp_path, k)) for k in (0, 20, 10)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    rows, found = cache.find([f"t{k}" for k in range(40)])
    assert len(rows) == 40 and np.array_equal(found, vectors(40)) and said == []
