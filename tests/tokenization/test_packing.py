"""Packing: every document once and whole, row ids found again."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.errors import GateRefused
from finetune.tokenization.packing import lower_bound, pack


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


def fewest(sizes: list[int], length: int) -> int:
    """The true optimum, by trying every place for every document."""

    def place(rest: list[int], bins: tuple[int, ...], best: int) -> int:
        if len(bins) >= best:
            return best
        if not rest:
            return len(bins)
        for i in {free: i for i, free in enumerate(bins) if free >= rest[0]}.values():
            best = place(rest[1:], (*bins[:i], bins[i] - rest[0], *bins[i + 1 :]), best)
        return place(rest[1:], (*bins, length - rest[0]), best)

    return place(sorted(sizes, reverse=True), (), len(sizes) + 1)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=7))
def test_the_bound_is_never_over_the_optimum_nor_under_the_tokens(sizes) -> None:
    bound = lower_bound(np.array(sizes), 12)
    assert -(-sum(sizes) // 12) <= bound <= fewest(sizes, 12)


@pytest.mark.parametrize(
    ("sizes", "bound"),
    [([], 0), ([12], 1), ([7, 7, 7], 3), ([6, 6, 6], 2), ([7, 5, 7, 5], 2), ([8, 8, 5, 5, 5], 4), ([1] * 25, 3)],
)
def test_bounds_by_hand(sizes, bound) -> None:
    assert lower_bound(np.array(sizes, np.int64), 12) == bound


def test_a_bound_needs_sizes_in_range() -> None:
    with pytest.raises(ValueError, match="from 0 to 13; allowed are 1 to 12"):
        lower_bound(np.array([0, 13]), 12)


def test_many_documents_are_packed_close_to_the_bound() -> None:
    sizes = np.random.default_rng(0).lognormal(4.6, 0.8, 3000).astype(np.int64).clip(2, 1024)
    assert len(pack(*columns(sizes.tolist()), 1024).documents) <= 1.005 * lower_bound(sizes, 1024) + 1
