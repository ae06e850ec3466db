from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.text import normalised, text_key
from finetune.dedup import jaccard as set_similarity
from finetune.dedup.jaccard import WORD_OR_SIGN, Jaccard, SetSearch, jaccard, word_sets
from finetune.dedup.measures import Cosine
from finetune.dedup.select import select
from tests.dedup.test_select import NumpySearch, cosine_table, unit

# Few words make many shared runs, copies, ties and texts shorter than a run.
texts = st.lists(st.lists(st.sampled_from(list("abcdE,")), max_size=12).map(" ".join), min_size=1, max_size=30)
thresholds = st.sampled_from([0.25, 0.5, 0.6, 0.75, 0.8, 1.0]) | st.floats(0.05, 1.0)


def sets_of(rows, ngram):
    found = []
    for row in rows:
        words = WORD_OR_SIGN.findall(normalised(row))
        found.append({tuple(words[k : k + ngram]) for k in range(max(1, len(words) - ngram + 1))} if words else set())
    return found


def jaccard_table(rows, ngram):
    sets = sets_of(rows, ngram)
    return np.array([[len(a & b) / len(a | b) if a | b else 0.0 for b in sets] for a in sets])


@settings(max_examples=120, deadline=None)
@given(texts, st.integers(1, 4), thresholds, st.integers(1, 5), st.sampled_from([1, 40, 4_000_000]))
def test_every_pair_at_the_threshold_is_found_with_its_exact_score(rows, ngram, threshold, adds, candidates):
    table = jaccard_table(rows, ngram)
    sets = word_sets(rows, ngram)
    search = SetSearch(threshold)
    for part in np.array_split(np.arange(len(rows)), adds):
        search.add(sets.take(part))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(set_similarity, "MAX_CANDIDATES", candidates)
        chunks = list(search.pairs(sets, threshold))
    found = {(i, j): s for c in chunks for i, j, s in zip(*(a.tolist() for a in c), strict=True)}
    # a row of nothing but runs of its own has no need to find itself
    want = {(i, j): table[i, j] for i, j in zip(*np.nonzero(table >= threshold), strict=True) if i != j}
    assert {pair: score for pair, score in found.items() if pair[0] != pair[1]} == want
    assert all(list(zip(c[0], c[1], strict=True)) == sorted(zip(c[0], c[1], strict=True)) for c in chunks)
    assert sum(len(c[0]) for c in chunks) == len(found)


@settings(max_examples=120, deadline=None)
@given(texts, st.data())
def test_selection_by_text_wording_and_vectors_together(rows, data):
    """Both promises, against every pair: no two kept rows are alike, and every dropped row has a kept twin."""
    count = len(rows)
    vectors = unit(
        data.draw(st.lists(st.lists(st.integers(-2, 4), min_size=3, max_size=3), min_size=count, max_size=count))
    )
    by_words, by_vector = data.draw(thresholds), data.draw(thresholds)
    keys = data.draw(st.sampled_from([None, [text_key(t) for t in rows]]))
    block_rows = data.draw(st.sampled_from([1, 3, 64]))
    order = data.draw(st.permutations(range(count)))
    measures = [Jaccard(word_sets(rows, 2), by_words), Cosine(vectors, by_vector, NumpySearch)]
    pairs = select(order, keys, measures, block_rows)
    assert pairs == select(order, keys, measures, 7)

    words, cosine = jaccard_table(rows, 2), cosine_table(vectors)
    alike = {
        "exact": np.array([[bool(keys and a) and a == b for b in keys or rows] for a in keys or rows]),
        "minhash": words >= by_words,
        "embedding": (cosine >= by_vector) & vectors.any(1)[:, None] & vectors.any(1)[None, :],
    }
    score = {"exact": np.ones_like(words), "minhash": words, "embedding": cosine}
    kept, want = [], {}
    for row in order:
        for method in alike:
            twins = [k for k in kept if alike[method][row, k]]
            if twins:
                want[row] = (max(twins, key=lambda k, row=row, method=method: score[method][row, k]), method)
                break
        else:
            kept.append(row)
    assert [p.dropped for p in pairs] == [r for r in order if r in want]
    for pair in pairs:
        assert (pair.kept in kept, pair.method) == (True, want[pair.dropped][1])
        assert pair.score == pytest.approx(score[pair.method][pair.dropped, want[pair.dropped][0]], abs=2e-12)
        if pair.method != "embedding":  # there the last digits of float64 may break a tie
            assert pair.kept == want[pair.dropped][0]


def test_a_set_is_the_runs_of_words_and_signs():
    sets = word_sets(["A b  C d", "a B c d", "a b", "a b!", "", "¿", "a b c d e"], 3)
    assert sets.sizes.tolist() == [2, 2, 1, 1, 0, 1, 3]
    first = np.zeros(6, np.int64)
    assert jaccard(sets, first, sets, np.arange(1, 7)).tolist() == [1, 0, 0, 0, 0, 2 / 3]
    assert len(word_sets([], 5)) == 0 and word_sets([" "] * 3, 5).sizes.tolist() == [0, 0, 0]


def test_chunks_of_words_change_nothing(monkeypatch):
    rows = [f"w{i % 7} x{i % 3} y{i % 5} z{i % 2}" for i in range(60)]
    whole = word_sets(rows, 2)
    monkeypatch.setattr(set_similarity, "CHUNK_WORDS", 10)
    cut = word_sets(rows, 2)
    assert all(np.array_equal(getattr(whole, n), getattr(cut, n)) for n in ("tokens", "starts", "sizes", "kinds"))


def test_shards_of_ngrams_change_nothing(monkeypatch):
    texts = [f"word{i % 9} and {i % 7} or sea {i} blue" for i in range(200)]
    whole = word_sets(texts, 2)
    monkeypatch.setattr("finetune.engine.local.SORTED_TOGETHER", 100)
    shards = word_sets(texts, 2)
    assert all(np.array_equal(getattr(whole, f), getattr(shards, f)) for f in ("tokens", "starts", "sizes"))
    assert whole.kinds == shards.kinds > 0


def test_many_rows_against_a_count_by_dictionary():
    generator = np.random.default_rng(0)
    words = np.array([f"w{k}" for k in range(400)])
    rows = [" ".join(words[generator.integers(0, 400, 25)]) for _ in range(300)]
    rows += [
        " ".join([*r.split()[:k], "x", *r.split()[k + 1 :]]) for k, r in zip([0, 3, 12, 24] * 75, rows, strict=True)
    ]
    sets = sets_of(rows, 3)
    owners = defaultdict(list)
    for i, members in enumerate(sets):
        for member in members:
            owners[member].append(i)
    near = {(i, j) for group in owners.values() for i in group for j in group if i < j}
    want = {(i, j) for i, j in near if len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= 0.8}
    found = word_sets(rows, 3)
    search = SetSearch(0.8)
    search.add(found)
    got = {(i, j) for a, b, _ in search.pairs(found, 0.8) for i, j in zip(a.tolist(), b.tolist(), strict=True) if i < j}
    assert got == want and 50 < len(got) < 300
