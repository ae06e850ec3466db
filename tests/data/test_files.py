"""Folders, patterns, lists, Arrow; other encodings and other ways to write JSON and CSV."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from finetune.data.files import data_files, digest
from finetune.data.readers import local_rows
from finetune.data.records import Example
from finetune.data.sources import read_source, source_fingerprint
from finetune.data.text_files import encoding_of
from finetune.errors import InputError
from finetune.recipe import LocalSource

ROW = {"prompt": "Hi", "completion": "Ho"}


def put(folder: Path, name: str, *rows: dict[str, Any]) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows or (ROW,)).encode()
    path.write_bytes(gzip.compress(text, mtime=0) if name.endswith(".gz") else text)
    return path


def read(*paths: Path, **how: Any) -> tuple[list[str], dict[str, int]]:
    source = LocalSource(source="local", path=paths[0] if len(paths) == 1 else paths, **how)
    decision, rows = read_source(source, source.label, Path())
    return [row.id for row in rows if isinstance(row, Example)], dict(decision.notes)


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    for name in (
        "d/b.jsonl",
        "d/a.jsonl.gz",
        "d/sub/c.jsonl",
        "d/README.md",
        "d/.hidden.jsonl",
        "d/dataset_infos.json",
    ):
        put(tmp_path, name)
    ids, notes = read(tmp_path / "d")
    assert ids == ["d/a.jsonl.gz:1", "d/b.jsonl:1", "d/sub/c.jsonl:1"]
    assert notes == {"not read, by their names: README.md": 1}


def test_a_pattern_and_a_list(tmp_path: Path) -> None:
    for name in ("d/p-2.jsonl", "d/p-1.jsonl", "d/x.jsonl", "e/p-1.jsonl"):
        put(tmp_path, name, ROW, ROW)
    assert read(tmp_path / "d/p-*.jsonl", skip=1, take=2)[0] == ["p-*.jsonl/p-1.jsonl:2", "p-*.jsonl/p-2.jsonl:1"]
    assert read(tmp_path / "d/x.jsonl", tmp_path / "d/p-1.jsonl")[0] == [
        f"x.jsonl+1/{name}:{n}" for name in ("p-1.jsonl", "x.jsonl") for n in (1, 2)
    ]
    both = [tmp_path / "d/p-1.jsonl", tmp_path / "e/p-1.jsonl", tmp_path / "d/p-*.jsonl"]
    assert [f.name for f in data_files(both)] == ["d/p-1.jsonl", "d/p-2.jsonl", "e/p-1.jsonl"]


def test_the_key_is_of_names_and_bytes_in_any_order_and_place(tmp_path: Path) -> None:
    found = []
    for place in ("one", "two"):
        paths = [put(tmp_path / place, name) for name in ("a.jsonl", "b.jsonl")]
        found += [
            digest([tmp_path / place]),
            digest(paths),
            digest(paths[::-1]),
            digest([tmp_path / place / "*.jsonl"]),
        ]
    assert all(d == found[0] for d in found)
    put(tmp_path / "two", "b.jsonl", ROW, ROW)
    assert digest([tmp_path / "two"]) != found[0]
    (tmp_path / "one" / "b.jsonl").rename(tmp_path / "one" / "c.jsonl")
    assert digest([tmp_path / "one"]) != found[0]


def test_a_file_by_its_own_name_has_the_key_and_the_ids_it_always_had(tmp_path: Path) -> None:
    path = put(tmp_path, "a.jsonl")
    assert list(source_fingerprint(LocalSource(source="local", path=path))) == ["file", "xxh3_128"]
    assert read(path)[0] == ["a.jsonl:1"]
    odd = put(tmp_path, "a[1]*.jsonl")  # a file called like a pattern is that file
    assert read(odd)[0] == ["a[1]*.jsonl:1"]


def test_columns_that_differ_are_reported(tmp_path: Path) -> None:
    put(tmp_path, "d/a.jsonl")
    put(tmp_path, "d/b.jsonl", {**ROW, "score": 1, "system": "Be brief"})
    ids, notes = read(tmp_path / "d")
    assert len(ids) == 2
    assert notes["the column 'score' is missing in a.jsonl"] == 1
    assert notes["the column 'system' is missing in a.jsonl"] == 1


@pytest.mark.parametrize(
    ("name", "says"), [("none", "a folder without a file of rows"), ("none/*.jsonl", "no file matches")]
)
def test_what_means_no_file_is_refused(tmp_path: Path, name: str, says: str) -> None:
    put(tmp_path, "none/notes.txt")
    with pytest.raises(InputError, match=says):
        read(tmp_path / name)


def test_what_datasets_saved_is_read(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list([{"prompt": str(i), "completion": "Ho"} for i in range(5)])
    data.save_to_disk(tmp_path / "saved", num_shards=2)
    DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "both")
    ids, notes = read(tmp_path / "saved")
    assert len(ids) == 5 and ids[0].startswith("saved/data-00000-of-00002.arrow:1") and not notes
    with pytest.raises(InputError, match=r"holds the splits train, test; name one of them"):
        read(tmp_path / "both")
    assert len(read(tmp_path / "both" / "train")[0]) == 5
    data.save_to_disk(tmp_path / "again" / "saved", num_shards=2)  # state.json differs, the rows do not
    assert digest([tmp_path / "again" / "saved"]) == digest([tmp_path / "saved"])


@pytest.mark.parametrize("form", ["file", "stream"])
def test_arrow_files(tmp_path: Path, form: str) -> None:
    table = pa.Table.from_pylist([{"a": str(i)} for i in range(2500)])
    new = pa.ipc.new_file if form == "file" else pa.ipc.new_stream
    with new(str(tmp_path / "x.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert [r.row for r in local_rows(tmp_path / "x.arrow")] == table.to_pylist()
    (tmp_path / "bad.arrow").write_bytes(b"nothing")
    with pytest.raises(InputError, match="not readable as Arrow"):
        list(local_rows(tmp_path / "bad.arrow"))


TWO = [{"a": 1, "b": [1, {"c": "}"}]}, {"a": 2}]
PRETTY = "\n".join(json.dumps(row, indent=1) for row in TWO)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.json", PRETTY),
        ("x.jsonl", PRETTY),
        ("x.json", PRETTY.replace("}\n{", "},\n{")),
        ("x.json", json.dumps({"data": TWO})),
        ("x.json", json.dumps({"version": "1", "rows": TWO, "about": {"n": 2}}, indent=1)),
        ("x.json", '{"data":\n' + json.dumps(TWO) + "}\n"),
        ("x.json", json.dumps(TWO)),
        ("x.json", "\n".join(map(json.dumps, TWO))),
    ],
)
def test_ways_to_write_the_same_objects(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert [r.row for r in local_rows(tmp_path / name)] == TWO


@pytest.mark.parametrize(
    "row", [{"messages": [{"role": "user", "content": "Hi"}]}, {"id": 1, "tags": [{"a": 1}], "prompt": "Hi"}]
)
@pytest.mark.parametrize("indent", [None, 1])
def test_one_row_is_no_wrapper(tmp_path: Path, row: dict[str, Any], indent: int | None) -> None:
    (tmp_path / "x.json").write_text(json.dumps(row, indent=indent))
    assert [r.row for r in local_rows(tmp_path / "x.json")] == [row]


def test_a_large_wrapper_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.data.json_files.WHOLE_BYTES", 0)
    rows = [{"a": i, "b": "x" * 1000} for i in range(3000)]
    (tmp_path / "x.json").write_text(json.dumps({"version": 1, "data": rows}))
    assert [r.row for r in local_rows(tmp_path / "x.json")] == rows
    (tmp_path / "y.json").write_text("\n".join(map(json.dumps, rows)))
    assert [r.row for r in local_rows(tmp_path / "y.json")] == rows


def test_a_first_line_that_is_cut_off_is_a_fault_of_that_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": 1,\n{"a": 2}\n{"a": 3}\n')
    assert [r.row for r in local_rows(tmp_path / "x.jsonl")] == [None, {"a": 2}, {"a": 3}]


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_delimiters(tmp_path: Path, mark: str) -> None:
    text = f'prompt{mark}completion\n"a, b; c\td"{mark}"two\nlines"\n'
    for name in ("x.csv", "x.tsv"):
        (tmp_path / name).write_text(text)
        assert [r.row for r in local_rows(tmp_path / name)] == [{"prompt": "a, b; c\td", "completion": "two\nlines"}]


TEXTS = {
    "cp1252": "Der Käufer zahlt 20 € für „große“ Bücher, sagte er; das ist ein längerer Satz.",
    "latin-1": "Le garçon a mangé des crêpes à la fête, et puis il est allé à l'école.",
    "cp1251": "Москва является столицей России, и это самый большой город страны. Здесь живут люди.",
    "gb18030": "北京是中国的首都，也是一个非常大的城市，有很多人住在这里。今天天气很好。",
    "shift_jis": "東京は日本の首都であり、とても大きな都市です。今日は天気がいいですね。",
    "utf-16": "Der Käufer zahlt 20 € für „große“ Bücher.",
    "utf-16-le": "Der Käufer zahlt 20 € für „große“ Bücher.",
    "utf-8": "Der Käufer zahlt 20 €.",
}


@pytest.mark.parametrize("encoding", TEXTS)
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.jsonl.gz"])
def test_another_encoding_is_named_and_then_read(tmp_path: Path, encoding: str, name: str) -> None:
    text = TEXTS[encoding]
    rows = [{"prompt": text, "completion": str(i)} for i in range(3)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    whole = json.dumps(rows, ensure_ascii=False, indent=1)
    csv = "prompt;completion\n" + "".join(f'"{text}";{i}\n' for i in range(3))
    content = {"x.json": whole, "x.csv": csv}.get(name, lines).encode(encoding)
    path = tmp_path / name
    path.write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
    works = encoding_of(path)
    if encoding != "utf-8":
        with pytest.raises(InputError, match=f"set encoding: {works} on the source"):
            list(local_rows(path))
    assert [r.row for r in local_rows(path, works)] == rows
    assert [r.row for r in local_rows(path, encoding)] == rows


def test_a_damaged_utf8_file_is_not_called_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes('{"a": "größer äöü"}\n'.encode() + b'{"a": "\xff"}\n')
    with pytest.raises(InputError, match=r"line 2: found the byte 0xff .*most of the file is UTF-8"):
        list(local_rows(tmp_path / "x.jsonl"))


def test_a_wrong_encoding_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes('{"a": 1}\n{"a": "größer"}\n'.encode())
    with pytest.raises(
        InputError, match=r"found the byte 0xc3; allowed is ascii text; it reads as UTF-8: leave encoding out"
    ):
        list(local_rows(tmp_path / "x.jsonl", "ascii"))
