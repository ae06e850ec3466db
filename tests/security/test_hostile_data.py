"""Data folders and files from somebody else: no link out of them is read, nothing in them takes all memory."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune.data import readers
from finetune.data.files import data_files, digest
from finetune.data.readers import local_rows
from finetune.errors import InputError

ROW = '{"prompt": "a", "completion": "b"}\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with one file of rows, and a file outside it."""
    (tmp_path / "data" / "inner").mkdir(parents=True)
    (tmp_path / "data" / "a.jsonl").write_text(ROW)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.jsonl").write_text(ROW)
    return tmp_path / "data"


def names(path: Path) -> list[str]:
    """The files that a path of a recipe means."""
    return [file.name for file in data_files([path])]


@pytest.mark.parametrize("link", ["b.jsonl", "inner/b.jsonl", "linked"])
@pytest.mark.parametrize("pattern", ["", "**/*.jsonl"])
def test_a_link_out_of_a_data_folder_is_refused_by_name(link: str, pattern: str, folder: Path) -> None:
    target = folder.parent / "outside" / ("" if link == "linked" else "secret.jsonl")
    (folder / link).symlink_to(target)
    if link == "linked" and pattern:
        assert names(folder / pattern) == ["a.jsonl"]  # a pattern enters no linked folder
        return
    with pytest.raises(InputError, match="path of its own") as caught:
        digest([folder / pattern])
    assert str(folder / link) in str(caught.value)


def test_a_path_that_the_recipe_names_may_be_a_link(folder: Path) -> None:
    (folder.parent / "x.jsonl").symlink_to(folder.parent / "outside" / "secret.jsonl")
    (folder.parent / "y").symlink_to(folder)
    assert names(folder.parent / "x.jsonl") == ["x.jsonl"] and names(folder.parent / "y") == ["a.jsonl"]


def test_links_within_a_data_folder_and_to_what_is_not_read_stay(folder: Path) -> None:
    (folder / "b.jsonl").symlink_to("a.jsonl")
    (folder / "again").symlink_to("inner")
    (folder / "README.md").symlink_to("/etc/hostname")
    assert names(folder) == ["a.jsonl", "b.jsonl"]


def test_a_snapshot_of_the_hubs_cache_is_read(folder: Path) -> None:
    cache = folder.parent / "datasets--o--n"
    (cache / "blobs").mkdir(parents=True)
    (cache / "blobs" / "1").write_text(ROW)
    snapshot = cache / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "a.jsonl").symlink_to("../../blobs/1")
    assert names(snapshot) == ["a.jsonl"]
    (snapshot / "b.jsonl").symlink_to(folder / "a.jsonl")
    with pytest.raises(InputError, match="path of its own"):
        names(snapshot)


@pytest.mark.parametrize("name", ["../outside/secret.jsonl", "/etc/passwd", "linked.arrow"])
def test_a_list_of_files_that_leads_out_of_its_folder_is_refused(name: str, folder: Path) -> None:
    (folder / "linked.arrow").symlink_to(folder.parent / "outside" / "secret.jsonl")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(InputError, match="outside"):
        names(folder)


@pytest.mark.parametrize("file", ["state.json", "dataset_dict.json"])
@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "3",
        '{"splits": 3}',
        '{"splits": []}',
        '{"_data_files": 3}',
        '{"_data_files": [{"f": 1}]}',
        "[" * 99999,
    ],
)
def test_a_broken_list_of_files_is_one_sentence(file: str, content: str, folder: Path) -> None:
    (folder / file).write_text(content)
    try:
        assert names(folder)
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 600


def test_a_pipe_in_a_data_folder_is_not_opened(folder: Path) -> None:
    os.mkfifo(folder / "b.jsonl")
    assert names(folder) == ["a.jsonl"]


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory by RLIMIT_DATA")
@pytest.mark.parametrize("kind", ["one value", "dictionary", "nested dictionary", "arrow", "arrow dictionary"])
def test_rows_that_unpack_to_all_memory_are_one_sentence(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of some kB each; the limits are a hundredth of the real ones."""
    monkeypatch.setattr(readers, "MOST_ROW_BYTES", 1_000_000)
    monkeypatch.setattr(readers, "BATCH_BYTES", 500_000)
    monkeypatch.setattr(readers, "BATCH_MEMORY", 30_000_000)
    long = "x" * (20_000_000 if kind in ("one value", "arrow") else 900_000)
    path = tmp_path / ("a.arrow" if kind.startswith("arrow") else "a.parquet")
    if kind in ("one value", "arrow"):
        table = pa.table({"text": [long]})
    else:
        texts = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), pa.array([long]))
        table = pa.table({"text": texts if "nested" not in kind else pa.StructArray.from_arrays([texts], ["inner"])})
    if path.suffix == ".arrow":
        with pa.ipc.new_file(path, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
            writer.write_table(table)
    else:
        pq.write_table(table, path, compression="zstd")
    assert path.stat().st_size < 200_000
    del table
    with pytest.raises(InputError, match=r"after row \d+: rows that unpack to more"):
        for _ in local_rows(path):
            pass


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_long_rows_of_an_honest_file_are_read_in_smaller_batches(ending: str, tmp_path: Path) -> None:
    table = pa.table({"text": [os.urandom(50_000).hex() for _ in range(300)], "n": list(range(300))})
    path = tmp_path / f"a.{ending}"
    if ending == "parquet":
        pq.write_table(table, path, row_group_size=70)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    rows = list(local_rows(path))
    assert [r.row for r in rows] == table.to_pylist() and [r.number for r in rows] == list(range(1, 301))
