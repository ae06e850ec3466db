import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.dedup.index import FlatIndex
from finetune.dedup.jaccard import Jaccard, word_sets
from finetune.dedup.measures import Cosine
from finetune.dedup.recall import measured_recall
from finetune.dedup.select import select


def corpus(rows, words, seed):
    """Texts of few words, so that many repeat each other by text, by wording or by their vectors."""
    chance = np.random.default_rng(seed)
    texts = [" ".join(f"w{k}" for k in chance.integers(0, words, chance.integers(0, 9))) for _ in range(rows)]
    vectors = np.stack([np.bincount([int(w[1:]) for w in t.split()], minlength=words) for t in texts]).astype(
        np.float64
    )
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)
    return texts, [Jaccard(word_sets(texts, 1), 0.6), Cosine(unit, 0.9, FlatIndex)]


@given(st.integers(1, 60), st.integers(2, 12), st.integers(0, 2**32))
def test_what_select_dropped_is_all_there_was(rows, words, seed):
    texts, measures = corpus(rows, words, seed)
    order = np.random.default_rng(seed).permutation(rows).tolist()
    dropped = {p.dropped for p in select(order, texts, measures)}
    found = measured_recall(order, dropped, texts, measures)
    assert [f["sampled"] for f in found.values()] == [rows] * 3
    assert {f["recall"] for f in found.values()} <= {1.0, None}
    assert (found["exact"]["recall"] is None) == (not found["exact"]["repeats"])


@pytest.mark.parametrize("method", ["exact", "minhash", "embedding"])
def test_a_row_that_was_missed_is_counted(method):
    texts, measures = corpus(300, 8, 0)
    keys = texts if method == "exact" else None
    chosen = [m for m in measures if m.name == method]
    dropped = {p.dropped for p in select(range(300), keys, chosen)}
    assert measured_recall(range(300), dropped, keys, chosen)[method]["recall"] == 1
    fewer = dropped - set(sorted(dropped)[::4])
    found = measured_recall(range(300), fewer, keys, chosen)[method]
    assert found["repeats"] > 30 and 0.3 < found["recall"] < 0.9


def test_a_sample_and_rows_that_were_not_looked_at():
    texts, measures = corpus(300, 8, 1)
    order = list(range(0, 300, 2))
    dropped = {p.dropped for p in select(order, None, measures)}
    found = measured_recall(order, dropped, None, measures, sampled=40)
    assert {name: f["sampled"] for name, f in found.items()} == {"minhash": 40, "embedding": 40}
    assert found["embedding"]["recall"] == 1
    assert measured_recall([], set(), texts, measures)["exact"] == {"sampled": 0, "repeats": 0, "recall": None}
