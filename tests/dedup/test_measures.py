"""A search in shards gives the result of one search, whatever their number, and after the loss of a shard."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.text import text_key
from finetune.dedup import cells, index, measures
from finetune.dedup.index import FlatIndex
from finetune.dedup.jaccard import Jaccard, word_sets
from finetune.dedup.large import cell_measure
from finetune.dedup.measures import Cosine
from finetune.dedup.select import equal_texts, groups, repeats_of, select
from finetune.engine.local import Here, Local
from tests.dedup.test_large import THRESHOLD, corpus
from tests.dedup.test_select import NumpySearch, small, thresholds, unit


class Sharded(Local):
    """An engine with `count` stateful workers, one of which is lost before each of the calls in `losses`."""

    def __init__(self, count, losses=()):
        super().__init__(1)
        self.count, self.losses, self.calls = count, set(losses), []

    def workers(self, build, rows):
        engine = self

        class Losing(Here):
            def call(self, method, each, shared=None):
                engine.calls.append(method)
                if len(engine.calls) in engine.losses:
                    self._objects[len(engine.calls) % len(self)] = build()
                return super().call(method, each, shared)

        return Losing(*[build] * self.count)


@settings(max_examples=60, deadline=None)
@given(small, thresholds, st.integers(2, 5), st.sets(st.integers(1, 12)), st.sampled_from([1, 5, 64]), st.data())
def test_shards_and_their_loss_change_nothing(rows, threshold, shards, losses, block_rows, data):
    vectors, count = unit(rows), len(rows)
    words = [" ".join(map(str, row)) for row in rows]
    keys = data.draw(st.sampled_from([None, equal_texts([text_key(word) for word in words])]))
    both = [Jaccard(word_sets(words, 2), 0.5), Cosine(vectors, threshold, NumpySearch)]

    def results(engine):
        ours, theirs = np.arange(count // 2), np.arange(count // 2, count)
        return (
            select(range(count), keys, both, block_rows, engine=engine),
            groups(vectors, [[None] * count], threshold, NumpySearch, block_rows, engine=engine).tolist(),
            repeats_of(ours, theirs, None, both, engine),
        )

    engine = Sharded(shards, losses)
    assert results(engine) == results(Local(1))
    assert "pairs" in engine.calls


@pytest.mark.parametrize("shards", [2, 3, 7])
def test_shards_of_cells_change_nothing(monkeypatch, shards):
    monkeypatch.setattr(cells, "ROWS_PER_CELL", 20)
    monkeypatch.setattr(cells, "FIRST_QUERIES", 50)
    vectors = corpus()
    measure = cell_measure(vectors, THRESHOLD)
    for losses in ((), (3, 8, 9)):
        engine = Sharded(shards, losses)
        whole = select(range(600), None, [measure], 100)
        assert select(range(600), None, [measure], 100, engine=engine) == whole and 0 < len(whole) < 600
        found = [groups(vectors, [], THRESHOLD, FlatIndex, 100, measure=measure, engine=e) for e in (engine, Local(1))]
        assert np.array_equal(*found)


def test_shards_with_too_many_pairs_are_asked_fewer_rows(monkeypatch):
    vectors = corpus(noise=0.1, twins=0.99)
    measure = Cosine(vectors, THRESHOLD, FlatIndex)
    whole = repeats_of(np.arange(300), np.arange(300, 600), None, [measure])
    monkeypatch.setattr(measures, "MOST_ANSWERED", 300)
    monkeypatch.setattr(index, "MIN_QUERIES", 20)
    monkeypatch.setattr(measures, "Queries", lambda: index.Queries(200, 200, 4))
    engine = Sharded(3)
    assert repeats_of(np.arange(300), np.arange(300, 600), None, [measure], engine) == whole
    assert engine.calls.count("pairs") > 2


def test_a_search_on_a_gpu_is_not_divided():
    engine = Sharded(3)
    select(range(50), None, [Cosine(corpus(50), THRESHOLD, lambda dimension: FlatIndex(dimension))], engine=engine)
    assert engine.calls == []


def test_equal_texts_have_equal_numbers(monkeypatch):
    keys = [text_key(text) for text in ("a", "b", "", "A", "c", "b ", "")]
    keys += [keys[0][:8] + keys[1][8:], keys[1][:8] + keys[0][8:]]  # halves of others
    found = equal_texts(keys)
    assert [found[i] == found[j] for i, j in ((0, 3), (1, 5), (2, 6))] == [True] * 3 and found[2] == 0
    assert len({found[i] for i in (0, 1, 4, 7, 8)}) == 5 and 0 not in found[:2] and equal_texts([]) == []
