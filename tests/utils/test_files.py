"""A digest is of the bytes; the cache only saves time and can never do harm."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import xxhash

from finetune.utils import files as utils_files
from finetune.utils.files import REMEMBERED_FROM_BYTES, cache_file, file_digest


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_file()


def large(path: Path, first: bytes = b"a", age: float = 60.0) -> Path:
    path.write_bytes(first + b"\0" * REMEMBERED_FROM_BYTES)
    then = path.stat().st_mtime - age
    os.utime(path, (then, then))
    return path


def truth(path: Path) -> str:
    return xxhash.xxh3_128(path.read_bytes()).hexdigest()


def test_it_is_the_xxh3_of_the_bytes(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.write_bytes(b"abc")
    assert file_digest(small) == truth(small)
    assert file_digest(large(tmp_path / "large")) == truth(tmp_path / "large")


def test_a_large_file_is_read_once(tmp_path: Path, cache: Path) -> None:
    path = large(tmp_path / "large")
    key = f"{path.resolve()}|{path.stat().st_size}|{path.stat().st_mtime_ns}"
    file_digest(path)
    assert json.loads(cache.read_text()) == {key: truth(path)}
    cache.write_text(json.dumps({key: "0" * 32}))
    assert file_digest(path) == "0" * 32  # what the cache says, so the file was not read


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = large(tmp_path / "large")
    before = file_digest(path)
    large(path, b"b", age=30)
    assert file_digest(path) == truth(path) != before


def test_small_and_just_written_files_are_not_remembered(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "small").write_bytes(b"abc")
    file_digest(tmp_path / "small")
    file_digest(large(tmp_path / "large", age=0))
    assert not cache.exists()


@pytest.mark.parametrize("content", [b"{", b"[1, 2]", b'{"a": 1}', b"\xff\xfe", b""])
def test_a_damaged_cache_is_replaced(tmp_path: Path, cache: Path, content: bytes) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content)
    path = large(tmp_path / "large")
    assert file_digest(path) == truth(path)
    assert list(json.loads(cache.read_text()).values()) == [truth(path)]
    assert [p.name for p in cache.parent.iterdir()] == ["digests.json"]


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path, cache: Path) -> None:
    cache.parent.parent.mkdir(parents=True)
    cache.parent.write_text("a file where the folder should be")
    path = large(tmp_path / "large")
    assert file_digest(path) == truth(path)


def test_the_cache_does_not_grow_for_ever(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils_files, "MOST_ENTRIES", 2)
    for name in "abc":
        file_digest(large(tmp_path / name))
    assert [Path(k.split("|")[0]).name for k in json.loads(cache.read_text())] == ["b", "c"]


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nothing"):
        file_digest(tmp_path / "nothing")
