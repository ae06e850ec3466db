import numpy as np
import pytest
import torch

from finetune.dedup import index as dedup_index
from finetune.dedup.index import FlatIndex
from finetune.dedup.select import groups
from finetune.errors import InputError
from tests.helpers.cosine import near_duplicates


def clustered(rows, dimension, seed=0):
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((rows // 4, dimension))
    noise = generator.uniform(0, 0.5, (rows, 1)) * generator.standard_normal((rows, dimension))
    vectors = centres[generator.integers(0, len(centres), rows)] + noise
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    vectors[::97] = 0
    return vectors


@pytest.mark.parametrize("max_pairs", [1, 8_000_000])
def test_every_pair_is_found_whatever_the_number_of_neighbours(monkeypatch, max_pairs):
    monkeypatch.setattr(dedup_index, "MAX_PAIRS", max_pairs)
    vectors = clustered(700, 24)
    index = FlatIndex(24)
    index.add(vectors[:300])
    index.add(vectors[300:])
    assert len(index) == 700
    chunks = list(index.pairs(vectors[:500], 0.8))
    assert len(chunks) == (2 if max_pairs > 1 else 4)
    i, j, scores = (np.concatenate(part) for part in zip(*chunks, strict=True))
    exact = vectors[:500].astype(np.float64) @ vectors.astype(np.float64).T
    sure, far = exact > 0.8 + 1e-5, exact < 0.8 - 1e-5
    found = np.zeros_like(sure)
    found[i, j] = True
    assert found[sure].all() and not found[far].any()
    np.testing.assert_allclose(scores, exact[i, j], atol=1e-5)
    assert (np.lexsort((j, i)) == np.arange(len(i))).all()


def test_an_empty_index_and_no_queries_find_nothing():
    index = FlatIndex(3)
    assert list(index.pairs(np.eye(3, dtype=np.float32), 0.5)) == []
    index.add(np.eye(3, dtype=np.float32))
    assert list(index.pairs(np.zeros((0, 3), np.float32), 0.5)) == []


def test_selection_and_groups_against_brute_force_in_float64():
    vectors = clustered(1500, 32)
    wide = vectors.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1)
    table = np.round(wide @ wide.T / np.where(norms, norms, 1)[:, None] / np.where(norms, norms, 1)[None, :], 12)
    for threshold in (0.75, 0.9, 0.95):
        dropped, kept = {}, []
        for row in range(len(vectors)):
            best = max(kept, key=lambda k, row=row: (table[row, k], -k), default=None)
            if best is not None and norms[row] and table[row, best] >= threshold:
                dropped[row] = best
            else:
                kept.append(row)
        pairs = near_duplicates(vectors, range(len(vectors)), threshold, FlatIndex, block_rows=256)
        assert {p.dropped: p.kept for p in pairs} == dropped
        assert 0 < len(pairs) < 1500
        found = groups(vectors, [], threshold, FlatIndex, block_rows=256)
        i, j = np.nonzero(table >= threshold)
        real = (norms[i] > 0) & (norms[j] > 0)
        assert (found[i[real]] == found[j[real]]).all()


def test_the_index_for_a_gpu_finds_the_same_pairs(monkeypatch):
    """Run on the CPU here: the same code, another device."""
    monkeypatch.setattr(dedup_index, "GPU_COLUMNS", 100)
    vectors = clustered(900, 24)
    indexes = [FlatIndex(24), dedup_index.TorchIndex(24, "cpu")]
    found = []
    for index in indexes:
        for part in np.array_split(vectors, 7):
            index.add(part)
        assert len(index) == 900
        found.append([np.concatenate(c) for c in zip(*index.pairs(vectors[:400], 0.8), strict=True)])
    (i, j, scores), (same_i, same_j, same_scores) = found
    assert np.array_equal(i, same_i) and np.array_equal(j, same_j)
    np.testing.assert_allclose(scores, same_scores, atol=1e-6)
    selected = [
        near_duplicates(vectors, range(900), 0.9, new, block_rows=200)
        for new in (FlatIndex, lambda dimension: dedup_index.TorchIndex(dimension, "cpu"))
    ]
    assert selected[0] == selected[1] and selected[0]
    assert list(dedup_index.TorchIndex(3, "cpu").pairs(np.eye(3, dtype=np.float32), 0.5)) == []


def test_a_gpu_is_taken_where_there_is_one_and_many_rows():
    assert dedup_index.exact_search("cpu", 10**6) is FlatIndex
    assert dedup_index.exact_search("cuda", 10) is FlatIndex
    if torch.cuda.is_available():
        assert isinstance(dedup_index.exact_search("auto", 10**6)(4), dedup_index.TorchIndex)
    else:
        assert dedup_index.exact_search("auto", 10**6) is FlatIndex
        with pytest.raises(InputError, match="sees no GPU"):
            dedup_index.exact_search("cuda", 10**6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_the_same_rows_are_kept():
    vectors = clustered(6000, 128)
    torch.set_float32_matmul_precision("high")  # TF32 elsewhere must not reach the search
    try:
        there = near_duplicates(vectors, range(6000), 0.9, lambda dimension: dedup_index.TorchIndex(dimension, "cuda"))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert there == near_duplicates(vectors, range(6000), 0.9, FlatIndex)
