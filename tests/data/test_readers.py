"""Every kind of file, whole and damaged."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.readers import CHUNK_BYTES, RawRow, content_digest, hub_rows, local_rows
from finetune.errors import InputError

if sys.version_info >= (3, 14):
    from compression.zstd import compress as zstd_compress
else:
    from backports.zstd import compress as zstd_compress

ROWS: list[dict[str, Any]] = [{"a": "é", "b": 1}, {"a": "two\nlines", "b": None}, {"a": "", "b": 3}]
Pack = Callable[[bytes], bytes]
PACKINGS: list[tuple[str, Pack]] = [("", bytes), (".gz", gzip.compress), (".zst", zstd_compress)]


def lines_of(rows: list[dict[str, Any]]) -> bytes:
    """JSON lines."""
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def put(folder: Path, name: str, content: bytes) -> Path:
    """A file with that content."""
    path = folder / name
    path.write_bytes(content)
    return path


def refusal(path: Path) -> str:
    """What is said of a file that cannot be read."""
    with pytest.raises(InputError) as caught:
        list(local_rows(path))
    assert str(path) in str(caught.value)
    return str(caught.value).replace(str(path), "FILE")


@pytest.mark.parametrize(("ending", "pack"), PACKINGS)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_json_lines_array_and_csv(tmp_path: Path, ending: str, pack: Pack, mark: bytes) -> None:
    array = json.dumps(ROWS, ensure_ascii=False, indent=2).encode()
    csv = b'a,b\r\n\xc3\xa9,1\r\n"two\nlines",\r\n,3\r\n'
    for name, content in (("x.jsonl", lines_of(ROWS)), ("x.json", lines_of(ROWS)), ("y.json", array)):
        path = put(tmp_path, name + ending, pack(mark + content))
        assert [(r.number, r.row) for r in local_rows(path)] == list(enumerate(ROWS, start=1))
    rows = list(local_rows(put(tmp_path, "x.csv" + ending, pack(mark + csv))))
    assert [r.row for r in rows] == [{"a": r["a"], "b": str(r["b"] or "")} for r in ROWS]


def test_parquet(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": str(i)}], "n": i} for i in range(2500)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert [(r.number, r.row) for r in local_rows(tmp_path / "x.parquet")] == list(enumerate(rows, start=1))
    assert "not readable as parquet" in refusal(put(tmp_path, "bad.parquet", b"PAR1 nothing"))


def test_a_bad_line_is_a_problem_of_that_line(tmp_path: Path) -> None:
    content = b'{"a": 1}\n\n{"a": 1,}\n[1]\n{"a": NaN}\n' + b"[" * 100_000 + b'\n{"a": 2}\n'
    rows = list(local_rows(put(tmp_path, "x.jsonl", content)))
    assert [(r.number, r.row) for r in rows] == [
        (1, {"a": 1}),
        (3, None),
        (4, None),
        (5, None),
        (6, None),
        (7, {"a": 2}),
    ]
    assert rows[1].problem.startswith("line 3, column ")
    assert rows[1].text == '{"a": 1,}\n'
    assert "found [1]" in rows[2].problem
    assert "NaN" in rows[3].problem


def test_a_csv_record_of_another_width_is_a_problem_of_that_record(tmp_path: Path) -> None:
    rows = list(local_rows(put(tmp_path, "x.csv", b"a,b\n1,2\n1,2,3\n4,5\n")))
    assert [r.row for r in rows] == [{"a": "1", "b": "2"}, None, {"a": "4", "b": "5"}]
    assert "line 3: found 3 fields" in rows[1].problem


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.jsonl", b"", "FILE is empty"),
        ("x.txt", b"a", "ends in .jsonl"),
        ("x.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "FILE, line 2: found the byte 0xff"),
        ("x.json", b'[{"a": "\xc3', "FILE, line 1: found the byte 0xc3"),
        ("x.jsonl", b'\xff\xfe{\x00"\x00', "UTF-16"),
        ("x.csv", b"a,b,a\n", "line 1: found two columns 'a'"),
        ("x.csv", b'a,b\n1,"2\n', "line 2"),
        ("x.json", b'[{"a": 1},\n{"a": 2},\n]', "line 3: found a comma after the last element"),
        ("x.json", b'[{"a": 1}\n{"a": 2}]', "line 2: found '{' after element 1"),
        ("x.json", b'[{"a": 1},\n{"a": ', "line 2: found "),
        ("x.json", b'[{"a": 1}]\n[]', "line 2: found '[' after the array"),
        ("x.json", b'[{"a": NaN}]', "NaN"),
        ("x.json", b"3", "found '3'; allowed is an array"),
        ("x.json", b" \n ", "line 2: found ''; allowed is an array"),
        ("x.json", b'{\n"a": 1,}', "line 2: found Expecting property name"),
        ("x.json", b'{"data": [{"a": 1}], "more": [{"a": 2}]}', "a second array 'more' beside 'data'"),
        ("x.jsonl.gz", gzip.compress(lines_of(ROWS), mtime=0)[:-12], "damaged or cut off"),
        ("x.jsonl.gz", lines_of(ROWS), "damaged or cut off"),
        ("x.jsonl.zst", zstd_compress(lines_of(ROWS))[:-3], "damaged or cut off"),
        ("x.jsonl.zst", lines_of(ROWS), "damaged or cut off"),
    ],
)
def test_an_unreadable_file_is_refused_with_its_line(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    assert says in refusal(put(tmp_path, name, content))


def test_a_folder_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    assert "is a folder" in refusal(tmp_path)
    assert "next to the recipe" in refusal(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match="there is no file"):
        content_digest(tmp_path / "absent.jsonl")


def test_an_element_of_an_array_that_is_no_object(tmp_path: Path) -> None:
    rows = list(local_rows(put(tmp_path, "x.json", b'[{"a": 1},\n 12, {"a": 2}]')))
    assert rows[1] == RawRow(2, None, "element 2, line 2: found 12, allowed is an object {…} with named columns", "12")
    assert not list(local_rows(put(tmp_path, "y.json", b" [ ] ")))


def test_values_longer_than_a_chunk(tmp_path: Path) -> None:
    rows = [{"a": "é" * CHUNK_BYTES}, {"a": "x" * (3 * CHUNK_BYTES)}, {"a": "[,]"}]
    for name, content in (("x.json", json.dumps(rows, ensure_ascii=False).encode()), ("x.jsonl.zst", lines_of(rows))):
        path = put(tmp_path, name, zstd_compress(content) if name.endswith("zst") else content)
        assert [r.row for r in local_rows(path)] == rows
    long = put(tmp_path, "x.csv", b"a\n" + b"x" * 200_000 + b"\n")
    assert [r.row for r in local_rows(long)] == [{"a": "x" * 200_000}]


def test_zstandard_files_of_several_frames(tmp_path: Path) -> None:
    packed = b"".join(zstd_compress(lines_of([row])) for row in ROWS)
    assert [r.row for r in local_rows(put(tmp_path, "x.jsonl.zst", packed))] == ROWS


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.dictionaries(st.text(max_size=3), JSON, max_size=3), max_size=5), indent=st.none() | st.just(1))
def test_an_array_is_read_as_json_reads_it(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], indent: int | None
) -> None:
    path = put(tmp_path_factory.mktemp("j"), "x.json", json.dumps(rows, indent=indent).encode())
    assert [r.row for r in local_rows(path)] == json.loads(path.read_bytes())


def test_the_digest_is_of_the_bytes(tmp_path: Path) -> None:
    path = put(tmp_path, "x.jsonl", b"x" * (CHUNK_BYTES + 1))
    assert content_digest(path) == xxhash.xxh3_128_hexdigest(path.read_bytes())


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_that_datasets_reads(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "set").mkdir()
    put(tmp_path / "set", "train.jsonl", lines_of([{"a": str(i)} for i in range(6)]))
    rows = hub_rows(str(tmp_path / "set"), "train", streaming=streaming, skip=2, take=3, cache=tmp_path / "hub")
    assert [(r.number, r.row) for r in rows] == [(3, {"a": "2"}), (4, {"a": "3"}), (5, {"a": "4"})]
    rest = hub_rows(str(tmp_path / "set"), "train", streaming=streaming, skip=5, cache=tmp_path / "hub")
    assert [r.number for r in rest] == [6]
    with pytest.raises(InputError, match="split 'test'"):
        list(hub_rows(str(tmp_path / "set"), "test", streaming=streaming, cache=tmp_path / "hub"))


def test_a_parquet_file_of_one_row_group_is_read_bit_by_bit(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    texts = [xxhash.xxh3_128_hexdigest(str(n).encode()) * 60 for n in range(20_000)]  # 38 MB
    pq.write_table(pa.table({"text": texts}), path, row_group_size=10**9, use_dictionary=False, compression="none")
    assert pq.ParquetFile(path).num_row_groups == 1 and path.stat().st_size > 30e6
    pool, before = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        assert sum(1 for _ in local_rows(path)) == len(texts)
    finally:
        pa.set_memory_pool(before)
    held = pool.max_memory()
    assert held is not None and held < path.stat().st_size / 4
