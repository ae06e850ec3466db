"""Packing: every document once and whole, row ids found again."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.backends.packing import pack
from finetune.errors import GateRefused


def columns(lengths: list[int], unlabelled: frozenset[int] = frozenset()) -> tuple[pa.ListArray, pa.ListArray]:
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    ids = np.arange(sum(lengths), dtype=np.int32) + 7  # every token is its own
    mask = np.concatenate([np.zeros(0), *(np.arange(n) > 0 for n in lengths)]).astype(np.uint8)
    for number in unlabelled:
        mask[offsets[number].as_py() : offsets[number + 1].as_py()] = 0
    return pa.ListArray.from_arrays(offsets, pa.array(ids)), pa.ListArray.from_arrays(offsets, pa.array(mask))


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(2, 16), min_size=1, max_size=30))
def test_documents_survive_whole_with_their_numbers(lengths) -> None:
    ids, mask = columns(lengths)
    packed = pack(ids, mask, 16)
    documents, labels = ids.to_pylist(), mask.to_pylist()
    seen = []
    for row, numbers in zip(packed.table.to_pylist(), packed.documents, strict=True):
        assert len(row["input_ids"]) == sum(row["seq_lengths"]) <= 16
        assert row["seq_lengths"] == [lengths[n] for n in numbers]
        assert row["input_ids"] == [t for n in numbers for t in documents[n]]
        wanted = [t if m else -100 for n in numbers for t, m in zip(documents[n], labels[n], strict=True)]
        assert row["labels"] == wanted
        seen += numbers
    assert sorted(seen) == list(range(len(lengths)))
    assert packed.table.schema.types == [pa.list_(pa.int32())] * 3


def test_one_batch_holds_all_rows() -> None:
    lengths = [15] * 1000 + [1] * 1000  # a batch of 1,000 rows would put them into 1,063 bins
    ids, _ = columns(lengths)
    ones = pa.ListArray.from_arrays(ids.offsets, pa.array(np.ones(sum(lengths), np.uint8)))
    assert len(pack(ids, ones, 16).documents) == 1000


def test_a_document_longer_than_a_bin_is_refused() -> None:
    with pytest.raises(GateRefused, match="17 tokens"):
        pack(*columns([3, 17]), 16)


def test_a_bin_without_labels_is_refused() -> None:
    assert pack(*columns([8, 8], frozenset([1])), 16).documents  # its neighbour in the bin has some
    with pytest.raises(GateRefused, match=r"\[1\]"):
        pack(*columns([16, 16], frozenset([1])), 16)
