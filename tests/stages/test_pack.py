"""The pack stage, behind the columns that render writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from finetune.context import Context
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
