import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.records import Example, Message
from finetune.data.text import field_text, normalised, text_key
from finetune.dedup.measures import cosines
from finetune.dedup.select import copy_id, exact_duplicates, groups, links_between, original_id
from tests.helpers.cosine import near_duplicates


class NumpySearch:
    """A search by one matrix product, off by `error` to see that the results do not depend on it."""

    def __init__(self, dimension, error=0.0):
        self.rows = np.zeros((0, dimension), np.float32)
        self.error = error

    def add(self, vectors):
        self.rows = np.concatenate([self.rows, vectors])

    def pairs(self, queries, score):
        for start in range(0, len(queries), 3):
            products = queries[start : start + 3] @ self.rows.T
            signs = np.where(np.indices(products.shape).sum(0) % 2, 1, -1)
            products = (products + np.float32(self.error) * signs).astype(np.float32)
            i, j = np.nonzero(products > score)
            yield i + start, j, products[i, j]


def unit(rows):
    rows = np.asarray(rows, np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def cosine_table(vectors):
    wide = vectors.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1)
    table = wide @ wide.T / np.maximum(np.outer(norms, norms), 1e-300)
    return np.round(table, 12)


# Few small whole numbers make many ties, copies and zero rows; 3-4-5 triangles make cosines that are round.
small = st.lists(st.lists(st.integers(-2, 4), min_size=3, max_size=3), min_size=1, max_size=40)
thresholds = st.sampled_from([0.2, 0.6, 0.8, 0.9, 0.96, 1.0]) | st.floats(0.05, 1.0)


@settings(max_examples=300, deadline=None)
@given(small, thresholds, st.sampled_from([1, 2, 5, 64]), st.randoms(use_true_random=False))
def test_greedy_selection_holds_what_it_promises(rows, threshold, block_rows, random):
    vectors = unit(rows)
    order = list(range(len(rows)))
    random.shuffle(order)
    pairs = near_duplicates(vectors, order, threshold, NumpySearch, block_rows)
    table = cosine_table(vectors)
    dropped = {p.dropped: p for p in pairs}
    assert len(dropped) == len(pairs)
    kept = [r for r in order if r not in dropped]
    for place, row in enumerate(kept):
        assert all(table[row, other] < threshold for other in kept[:place])  # no two kept rows reach it
    rank = {row: place for place, row in enumerate(order)}
    for row, pair in dropped.items():
        earlier = [k for k in kept if rank[k] < rank[row]]
        best = max(earlier, key=lambda k: (table[row, k], -rank[k]))
        assert pair.kept in earlier
        assert pair.score >= threshold
        assert pair.score == pytest.approx(table[row, best], abs=2e-12)
    assert not any(row in dropped or row in {p.kept for p in pairs} for row in np.flatnonzero(~vectors.any(1)))


@settings(max_examples=200, deadline=None)
@given(small, thresholds)
def test_neither_blocks_nor_float32_errors_change_a_result(rows, threshold):
    vectors = unit(rows)
    want = near_duplicates(vectors, range(len(rows)), threshold, NumpySearch)
    for error, block_rows in ((3e-5, 64), (-3e-5, 7), (0, 1)):

        def search(dimension, error=error):
            return NumpySearch(dimension, error)

        assert near_duplicates(vectors, range(len(rows)), threshold, search, block_rows) == want
        first = groups(vectors, [], threshold, NumpySearch).tolist()
        assert groups(vectors, [], threshold, search, block_rows).tolist() == first


@settings(max_examples=200, deadline=None)
@given(small, thresholds, st.integers(1, 9), st.data())
def test_groups_are_the_connected_parts(rows, threshold, block_rows, data):
    vectors = unit(rows)
    keys = data.draw(st.lists(st.sampled_from(["", "a", "b", "c"]), min_size=len(rows), max_size=len(rows)))
    found = groups(vectors, [keys], threshold, NumpySearch, block_rows)
    linked = (cosine_table(vectors) >= threshold) & vectors.any(1)[:, None] & vectors.any(1)[None, :]
    linked |= np.array([[a == b != "" for b in keys] for a in keys])
    want = np.arange(len(rows))
    for _ in rows:
        for i in range(len(rows)):
            want[i] = min([want[i], *want[linked[i]]])
    assert found.tolist() == want.tolist()


@settings(max_examples=100, deadline=None)
@given(small, small, thresholds)
def test_links_between_two_sides(left, right, threshold):
    a, b = unit(left), unit(right)
    rows, partners, scores = links_between(a, b, threshold, NumpySearch)
    table = cosine_table(np.concatenate([a, b]))[: len(a), len(a) :]
    table[~a.any(1)] = -1
    table[:, ~b.any(1)] = -1
    assert rows.tolist() == np.flatnonzero(table.max(1) >= threshold).tolist()
    np.testing.assert_allclose(scores, table.max(1)[rows], atol=2e-12)
    np.testing.assert_allclose(table[rows, partners], scores, atol=2e-12)


def test_a_chain_loses_every_second_row_and_is_one_group():
    angles = np.arange(2000) * 0.02
    chain = unit(np.c_[np.cos(angles), np.sin(angles)][:150])
    threshold = float(np.cos(0.021))  # neighbours reach it, the next but one does not
    pairs = near_duplicates(chain, range(150), threshold, NumpySearch, block_rows=16)
    assert [p.dropped for p in pairs] == list(range(1, 150, 2))
    assert set(groups(chain, [], threshold, NumpySearch, block_rows=16).tolist()) == {0}


def test_fifty_thousand_copies_cost_no_list_of_links():
    widest = 0

    class Counting(NumpySearch):
        def pairs(self, queries, score):
            nonlocal widest
            widest = max(widest, len(self.rows))
            yield from super().pairs(queries, score)

    vectors = np.zeros((50_000, 4), np.float32)
    vectors[:, 1] = 1
    vectors[::2] = (0.6, 0.8, 0, 0)
    assert set(groups(vectors, [], 0.9, Counting, block_rows=512).tolist()) == {0, 1}
    pairs = near_duplicates(vectors[:4000], range(4000), 0.9, Counting, block_rows=100)
    assert {p.kept for p in pairs} == {0, 1} and len(pairs) == 3998
    assert widest <= 100


def test_a_tie_at_the_threshold_is_a_duplicate():
    vectors = unit([[1, 0, 0], [3, 4, 0], [0, 0, 1]])  # cosine 0.6, which float32 only comes near
    score = float(cosines(vectors[:1], vectors[1:2])[0])
    assert len(near_duplicates(vectors, range(3), score, NumpySearch)) == 1
    assert near_duplicates(vectors, range(3), np.nextafter(score, 1), NumpySearch) == []
    assert cosines(vectors, vectors).tolist() == [1, 1, 1]


def test_rows_left_out_of_the_order_take_no_part():
    vectors = unit([[1, 0], [1, 0], [1, 0]])
    assert [(p.dropped, p.kept) for p in near_duplicates(vectors, [2, 1], 0.9, NumpySearch)] == [(1, 2)]
    assert near_duplicates(vectors, [], 0.9, NumpySearch) == []


@pytest.mark.parametrize("bad", [[0.5, 0.5], [np.nan, 1], [np.inf, 0]])
def test_vectors_of_another_length_are_refused(bad):
    with pytest.raises(ValueError, match="row 1 has length"):
        near_duplicates(np.array([[1, 0], bad], np.float32), [0, 1], 0.9, NumpySearch)


def test_columns_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="same length"):
        groups(unit([[1, 0]]), [["a", "b"]], 0.9, NumpySearch)


def test_exact_duplicates_name_the_first_in_order_and_empty_texts_are_none():
    keys = [text_key(t) for t in ("Stra\u00dfe  1", "", "STRASSE\n1", " \t", "\ufb01n", "FIN")]
    assert [(p.dropped, p.kept) for p in exact_duplicates(keys, [2, 0, 1, 3, 4, 5])] == [(0, 2), (5, 4)]


@given(st.text())
def test_normalising_twice_is_normalising_once(text):
    assert normalised(normalised(text)) == normalised(text)
    assert normalised(f"  {text}\n") == normalised(text)


def test_fields_and_copies():
    row = Example(
        "a:1", "a", (Message("system", "S"), Message("user", "Q"), Message("assistant", "A"), Message("user", "R"))
    )
    assert [field_text(row, f) for f in ("instruction", "output", "both")] == ["Q\nR", "A", "Q\nA\nR"]
    assert field_text(Example("a:2", "a", text="T"), "output") == "T"
    assert [copy_id("a:1", n) for n in (1, 2)] == ["a:1", "a:1~2"]
    assert original_id("x~1.jsonl:7~12") == "x~1.jsonl:7" and original_id("x~1:7") == "x~1:7"
