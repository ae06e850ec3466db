"""The pack stage, behind the columns that render writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from finetune.context import Context
from finetune.errors import GateRefused
from finetune.recipe import Recipe, Runtime, Tracking
from finetune.stages import pack
from finetune.tokenization.row_tokenizer import TokenizedRow, table

LENGTHS = [30, 10, 12, 20, 2, 7] * 5


@pytest.fixture
def rendered(tmp_path: Path) -> Path:
    folder = tmp_path / "render"
    folder.mkdir()
    rows = [
        TokenizedRow(f"r:{i}", np.arange(n, dtype=np.int32) + i, (np.arange(n) > 0).astype(np.uint8), False)
        for i, n in enumerate(LENGTHS)
    ]
    with pq.ParquetWriter(folder / "train.parquet", table([]).schema) as writer:  # in pieces, as render writes
        for i in range(0, len(rows), 7):
            writer.write_table(table(rows[i : i + 7]))
    return folder


def recipe(**sections: object) -> Recipe:
    return Recipe(name="x", model="builtin:tiny-mistral", data=[{"source": "pydoc"}], **sections)


def test_spec_follows_the_recipe() -> None:
    assert pack.spec(recipe(pack=None)) is None
    assert pack.spec(recipe(render={"max_length_tokens": 64})).length_tokens == 64
    assert pack.spec(recipe(render={"max_length_tokens": 64}, pack={"length_tokens": 128})).length_tokens == 128
    assert pack.fingerprint(pack.spec(recipe())) == {}


def test_packed_rows_and_their_ids(rendered, tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    context = Context(scratch=tmp_path, runtime=Runtime(), tracking=Tracking())
    metrics = pack.run(pack.Spec(method="bfd", length_tokens=32), {"render": rendered}, out, context)
    packed = pq.read_table(out / "packed.parquet").to_pylist()
    names = pq.read_table(out / "row_ids.parquet")["row_ids"].to_pylist()
    assert len(names) == len(packed) == metrics["bins"]
    assert sorted(n for row in names for n in row) == sorted(f"r:{i}" for i in range(len(LENGTHS)))
    for row, ids in zip(packed, names, strict=True):
        at = 0
        for name, length in zip(ids, row["seq_lengths"], strict=True):
            number = int(name[2:])
            assert row["input_ids"][at : at + length] == list(range(number, number + LENGTHS[number]))
            assert row["labels"][at] == -100
            at += length
        assert at == len(row["input_ids"]) == len(row["labels"])
    assert metrics["tokens"] == sum(LENGTHS) and metrics["longest"] <= 32
    assert metrics["efficiency"] == sum(LENGTHS) / (32 * metrics["bins"])


def test_partitions_hold_every_row_once_and_name_rows_of_the_file(rendered, tmp_path, monkeypatch) -> None:
    context = Context(scratch=tmp_path, runtime=Runtime(), tracking=Tracking())
    monkeypatch.setattr(pack, "PART_TOKENS", 100)
    (tmp_path / "out").mkdir()
    metrics = pack.run(pack.Spec(method="bfd", length_tokens=32), {"render": rendered}, tmp_path / "out", context)
    parts = pack._parts(rendered / "train.parquet", np.array(LENGTHS))
    assert [n for part in parts for n in range(part.start, part.stop)] == list(range(len(LENGTHS)))
    assert all(sum(LENGTHS[part.start : part.stop]) < 100 + max(LENGTHS) for part in parts) and len(parts) == 5
    assert pq.ParquetFile(tmp_path / "out" / "packed.parquet").num_row_groups == len(parts)
    names = pq.read_table(tmp_path / "out" / "row_ids.parquet")["row_ids"].to_pylist()
    assert sorted(n for row in names for n in row) == sorted(f"r:{i}" for i in range(len(LENGTHS)))
    assert metrics["documents"] == len(LENGTHS) and metrics["tokens"] == sum(LENGTHS)
    rows = [
        TokenizedRow(f"b:{i}", np.arange(9, dtype=np.int32), np.full(9, i < 12, np.uint8), False) for i in range(13)
    ]
    pq.write_table(table(rows), rendered / "train.parquet")
    with pytest.raises(GateRefused, match=r"no supervised token: rows number \[12\]"):
        pack.run(pack.Spec(method="bfd", length_tokens=9), {"render": rendered}, tmp_path / "out", context)
