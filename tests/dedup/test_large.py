"""Search by cells: every pair is true, recall is measured, a search that misses too much is widened."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from finetune.dedup import cells, large
from finetune.dedup import select as selecting
from finetune.dedup.cells import CellCosine, Cells
from finetune.dedup.index import FlatIndex
from finetune.dedup.measures import Cosine
from finetune.dedup.recall import missed_twins, wilson
from finetune.dedup.select import Pair, groups, joined, select

THRESHOLD = 0.9


def corpus(rows=600, twins=0.6, dimension=24, seed=0, noise=0.4):
    """Unit vectors, a share of which repeat an earlier one almost."""
    rng = np.random.default_rng(seed)
    made = rng.standard_normal((rows, dimension))
    for i in range(1, rows):
        if rng.random() < twins:
            made[i] = made[rng.integers(i)] + noise * rng.standard_normal(dimension)
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def small(monkeypatch):
    """Cells of few rows, and few queries at a time."""
    monkeypatch.setattr(cells, "ROWS_PER_CELL", 20)
    monkeypatch.setattr(cells, "FIRST_QUERIES", 50)
    monkeypatch.setattr(cells, "PLACED_TOGETHER", 70)


def cell_measure(vectors):
    return large.cell_measure(vectors, THRESHOLD)


def measure_of(vectors, probes=None):
    division = Cells.of(vectors)
    return CellCosine.of(vectors, THRESHOLD, replace(division, probes=probes or division.probes))


@pytest.mark.parametrize("probes", [1, 3, 10**6])
def test_every_pair_is_a_true_one_and_all_are_found_in_all_cells(small, probes):
    vectors = corpus()
    search = measure_of(vectors, probes).search()
    for start in range(0, 600, 150):
        search.add(np.arange(start, start + 150))
    got = {}
    for chunk in search.pairs(np.arange(600), THRESHOLD):
        got |= {(i, j): s for i, j, s in zip(*(c.tolist() for c in chunk), strict=True)}
    table = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    true = set(zip(*(x.tolist() for x in np.nonzero(table >= THRESHOLD)), strict=True))
    assert len(search) == 600 and set(got) <= true
    assert all(abs(score - table[pair]) < 1e-5 for pair, score in got.items())
    assert (set(got) == true) == (probes > 3) or probes == 3


def test_blocks_and_threads_change_nothing(small, monkeypatch):
    import faiss

    vectors, before = corpus(), faiss.omp_get_max_threads()
    one = measure_of(vectors, 2)
    faiss.omp_set_num_threads(3)
    monkeypatch.setattr(cells, "usable_cpus", lambda: 5)
    other = measure_of(vectors, 2)
    assert faiss.omp_get_max_threads() == 3
    faiss.omp_set_num_threads(before)
    assert np.array_equal(one.near, other.near)
    whole = select(range(600), None, [one], 600)
    assert 0 < len(whole) < 600
    assert all(select(range(600), None, [other], size) == whole for size in (7, 100))
    found = [groups(vectors, [], THRESHOLD, FlatIndex, 100, measure=measure).tolist() for measure in (one, other)]
    assert found[0] == found[1]


def test_queries_with_many_pairs_are_asked_in_smaller_chunks(monkeypatch):
    vectors = corpus(noise=0.1, twins=0.99)
    whole = select(range(600), None, [measure_of(vectors)], 600)
    for name, value in (("MOST_PAIRS", 300), ("LEAST_QUERIES", 20), ("FIRST_QUERIES", 400)):
        monkeypatch.setattr(cells, name, value)
    measure = measure_of(vectors)
    search = measure.search()
    search.add(np.arange(600))
    found = np.concatenate([np.stack(chunk[:2]) for chunk in search.pairs(np.arange(600), THRESHOLD)], axis=1)
    table = vectors @ vectors.T
    assert np.array_equal(found, np.stack(np.nonzero(table > THRESHOLD))) and measure.size.rows < 400
    assert select(range(600), None, [measure], 600) == whole


@pytest.mark.parametrize("twins", [0.5, 1.0])
def test_memory_is_bounded_however_many_rows_a_cell_has(monkeypatch, twins):
    monkeypatch.setattr(cells, "ROWS_PER_CELL", 10**6)  # one cell
    monkeypatch.setattr(cells, "MOST_PAIRS", 40_000)
    monkeypatch.setattr(cells, "SIDE", 256)
    vectors = corpus(20_000, twins=twins, dimension=4, noise=0.01)
    search = cell_measure(vectors).search()
    search.add(np.arange(20_000))
    tracemalloc.start()
    found = next(search.pairs(np.arange(5000), THRESHOLD))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found[0]) > 0 and peak < 30e6, peak  # 5,000 × 20,000 products of float32 would be 400 MB


def test_a_block_whose_rows_all_match_is_halved(monkeypatch):
    vectors = corpus(noise=0.1, twins=0.99)
    whole = select(range(600), None, [Cosine(vectors, THRESHOLD, FlatIndex)], 600)
    asked, greedy = [], selecting._greedy

    def counted(rows, keys, measures):
        asked.append((len(rows), (found := greedy(rows, keys, measures)) is None))
        return found

    monkeypatch.setattr(selecting, "_greedy", counted)
    monkeypatch.setattr(selecting, "MOST_PAIRS", 500)
    monkeypatch.setattr(selecting, "FEW_ROWS", 10)
    assert select(range(600), None, [Cosine(vectors, THRESHOLD, FlatIndex)], 600) == whole
    assert asked[0] == (600, True) and asked[-1][1] is False


def test_a_search_that_misses_too_much_is_widened_and_the_result_holds(small, monkeypatch):
    monkeypatch.setattr(cells, "PROBES", 1)
    monkeypatch.setattr(large, "SAMPLED_PER_DROPPED", 100)
    monkeypatch.setattr(large, "MOST_SAMPLED", 1.0)
    monkeypatch.setattr(large, "BLOCK_ROWS", 50)
    monkeypatch.setattr(large, "LOW", 0.9)
    vectors, said = corpus(2000, noise=0.3), []
    pairs, recall = large.select_measured(range(2000), None, [], vectors, THRESHOLD, said.append)
    assert any("searching more" in line for line in said)
    assert recall["recall"] >= 0.999
    dropped = {p.dropped for p in pairs}
    wide = vectors.astype(np.float64)
    for pair in pairs:  # always: a kept twin that reaches the threshold
        assert pair.kept not in dropped and wide[pair.dropped] @ wide[pair.kept] >= THRESHOLD - 1e-6
    exact = {p.dropped for p in select(range(2000), None, [Cosine(vectors, THRESHOLD, FlatIndex)])}
    assert len(exact ^ dropped) <= 0.01 * len(exact)


def test_a_search_that_is_good_enough_is_not_widened(small, monkeypatch):
    monkeypatch.setattr(large, "SAMPLED_PER_DROPPED", 100)
    monkeypatch.setattr(large, "MOST_SAMPLED", 1.0)
    monkeypatch.setattr(large, "LOW", 0.9)
    said = []
    pairs, recall = large.select_measured(range(2000), None, [], corpus(2000, noise=0.1), THRESHOLD, said.append)
    assert (said, recall["missed"]) == ([], 0) and 0 < recall["probed"] < 1 and pairs


def test_few_repeats_are_compared_with_every_pair(small):
    vectors, said = corpus(2000, twins=0.01), []
    pairs, recall = large.select_measured(range(2000), None, [], vectors, THRESHOLD, said.append)
    assert "every pair" in said[0] and recall["probed"] == 1.0
    assert pairs == select(range(2000), None, [Cosine(vectors, THRESHOLD, FlatIndex)])


def test_misses_are_counted_against_a_table():
    vectors = corpus(500)
    kept = np.random.default_rng(1).permutation(500)[:400].astype(np.int64)
    table = vectors[kept].astype(np.float64) @ vectors[kept].T.astype(np.float64)
    true = int((np.tril(table, -1) >= THRESHOLD).any(1).sum())
    measure = Cosine(vectors, THRESHOLD, FlatIndex)
    assert missed_twins(measure, kept, 400) == true > 0
    exact = select(kept, None, [measure])
    rest = kept[~np.isin(kept, [p.dropped for p in exact])]
    assert missed_twins(measure, rest, len(rest)) == 0
    assert large.measured(measure, kept, [Pair(int(kept[0]), int(kept[1]), 1.0)]) is None  # one is too few


def test_the_interval_is_wilsons():
    assert wilson(0, 1000) == pytest.approx((0.0, 0.003827), abs=1e-6)  # textbook values
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_groups_are_joined_by_links_that_were_missed():
    vectors = corpus(300)
    whole = groups(vectors, [[None] * 300], THRESHOLD, FlatIndex).tolist()
    table = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    links = list(zip(*(x.tolist() for x in np.nonzero(table >= THRESHOLD)), strict=True))
    assert joined(list(range(300)), links) == whole
    half = joined(list(range(300)), links[::2])
    assert joined(half, links[1::2]) == whole
