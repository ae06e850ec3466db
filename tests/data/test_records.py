"""Rows through Parquet and back."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from finetune.data.records import Example, Message, read_rows, rows_schema, write_rows

ROWS = [
    Example("a:1", "a", (Message("user", "Hi"), Message("assistant", "No", learn=False)), tools='[{"name":"f"}]'),
    Example("a:2", "a", (Message("user", "Hi"), Message("assistant", "Yes", '{"name":"ann"}')), extra='{"score":1}'),
    Example("a:3", "a", text="Once"),
]


def test_every_field_of_a_row_comes_back(tmp_path: Path) -> None:
    assert write_rows(tmp_path / "rows.parquet", ROWS) == 3
    assert list(read_rows(tmp_path / "rows.parquet")) == ROWS


def test_a_file_of_an_earlier_release_is_read_with_the_defaults(tmp_path: Path) -> None:
    message = pa.struct([("role", pa.string()), ("content", pa.string()), ("extra", pa.string())])
    fields = [f for f in rows_schema() if f.name != "tools"]
    schema = pa.schema([pa.field("messages", pa.list_(message)) if f.name == "messages" else f for f in fields])
    turns = [{"role": "user", "content": "Hi", "extra": None}, {"role": "assistant", "content": "Ho", "extra": None}]
    row = {"id": "a:1", "source": "a", "messages": turns, "text": None, "extra": None}
    pq.write_table(pa.Table.from_pylist([row], schema), tmp_path / "rows.parquet")
    (found,) = read_rows(tmp_path / "rows.parquet")
    assert found == Example("a:1", "a", (Message("user", "Hi"), Message("assistant", "Ho")))
    assert found.tools is None and all(m.learn for m in found.messages)
