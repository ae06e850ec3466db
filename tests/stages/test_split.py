from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.records import read_rows, write_table
from finetune.errors import FinetuneError, GateRefused
from finetune.recipe import Split
from finetune.stages import embed, split
from tests.stages.rows import chat, context, folder, ids, recipe, sentences


def built(tmp_path, rows, vectors="lsa", embedded_rows=None, **section):
    whole = recipe(
        dedup={"field": "output"},
        split={"eval_fraction": 0.2, **section},
        seed=section.pop("seed", 0) if "seed" in section else 0,
    )
    filtered = folder(tmp_path / "filter", embedded_rows or rows)
    embedded = filtered
    if vectors is not None:
        embedded = tmp_path / "embed"
        embedded.mkdir(exist_ok=True)
        if isinstance(vectors, str):
            embed.run(embed.spec(whole), {"filter": filtered}, embedded, context(tmp_path))
        else:
            np.save(embedded / "vectors.npy", np.asarray(vectors, np.float32))
            write_table(embedded / "ids.parquet", {"id": [r.id for r in embedded_rows or rows]})
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    sampled = folder(tmp_path / "sample", rows)
    metrics = split.run(split.spec(whole), {"sample": sampled, "embed": embedded}, out, context(tmp_path))
    return ids(out / "train.parquet"), ids(out / "eval.parquet"), metrics


def test_near_duplicates_stay_on_one_side(tmp_path):
    texts = [t for t in sentences(40) for t in (t, t + " also")]
    rows = [chat(i, f"q{i}", t) for i, t in enumerate(texts, 1)]
    train, held, metrics = built(tmp_path, rows, group_threshold=0.6)
    assert metrics["rows_in"] == 80 and metrics["groups"] == 40 and metrics["leaks"] == 0
    assert (metrics["train_rows"], metrics["eval_rows"]) == (len(train), len(held)) == (64, 16)
    assert sorted(train + held) == sorted(r.id for r in rows)
    sides = [{(int(i[2:]) - 1) // 2 for i in side} for side in (train, held)]
    assert not sides[0] & sides[1]
    assert train == [r.id for r in rows if r.id in set(train)]


def test_copies_and_equal_texts_stay_together_without_vectors(tmp_path):
    rows = [chat(i, f"q{i}", "a") for i in range(1, 31)]
    rows += [chat(f"{i}~2", f"Q{i} ", "A") for i in range(1, 11)] + [
        chat(100 + i, f"Q{i} ", "A") for i in range(11, 21)
    ]
    train, held, metrics = built(tmp_path, rows, None)
    assert metrics["compared_by"] == "text" and metrics["groups"] == 30
    texts = {r.id: r.joined("user").strip().casefold() for r in rows}
    assert not {texts[i] for i in train} & {texts[i] for i in held}
    assert len(held) == 10


def test_vectors_are_found_by_id_when_rows_were_left_out_or_repeated(tmp_path):
    everything = [chat(i, f"q{i}", "a") for i in range(1, 13)]
    vectors = np.eye(12)
    vectors[8] = vectors[3]  # a:9 is like a:4
    rows = [everything[8], *everything[3:8], chat("9~2", "q9", "a")]
    train, held, metrics = built(tmp_path, rows, vectors, everything, eval_fraction=0.5)
    assert metrics["groups"] == 5 and metrics["largest_group"] == 3
    assert {"a:9", "a:9~2", "a:4"} <= set(train) or {"a:9", "a:9~2", "a:4"} <= set(held)


def test_one_row_and_one_group_are_refused(tmp_path):
    with pytest.raises(GateRefused, match=r"there is 1 row.*split: null"):
        built(tmp_path, [chat(1, "q", "a")])
    with pytest.raises(GateRefused, match="there are no rows"):
        built(tmp_path, [], None)
    same = [chat(i, f"q{i}", "the very same answer") for i in range(1, 9)]
    with pytest.raises(GateRefused, match=r"all 8 rows are one near-duplicate group .* raise split.group_threshold"):
        built(tmp_path, same)
    with pytest.raises(GateRefused, match=r"room for 0 held-out rows.*eval_fraction to 0.25 or more"):
        built(tmp_path, [chat(i, f"q{i}", t) for i, t in enumerate(sentences(4), 1)])
    assert (
        built(tmp_path, [chat(i, f"q{i}", t) for i, t in enumerate(sentences(4), 1)], eval_fraction=0.25)[2][
            "eval_rows"
        ]
        == 1
    )


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=60),
    st.floats(0.01, 0.5),
    st.integers(1, 20),
    st.integers(0, 3),
)
def test_the_held_out_share_is_never_exceeded(group, fraction, most, seed):
    settings_ = Split(eval_fraction=fraction, max_eval_rows=most)
    sizes = Counter(group)
    names = [b"%d/%d" % (g, i) for i, g in enumerate(group)]
    allowed = min(int(fraction * len(group) + 1e-9), most, len(group) - 1)
    if min(sizes.values()) > allowed:
        with pytest.raises(GateRefused):
            split.choose(group, names, settings_, seed)
        return
    chosen = split.choose(group, names, settings_, seed)
    rows = sum(sizes[g] for g in chosen)
    assert 0 < rows <= allowed
    # and no group that is left out would still fit
    assert all(sizes[g] > allowed - rows for g in sizes if g not in chosen)


def test_the_choice_is_stable_and_follows_the_seed():
    group = list(range(400))
    names = [b"%d" % i for i in group]
    wanted = Split(eval_fraction=0.1)
    first = split.choose(group, names, wanted, 0)
    assert first == split.choose(group, names, wanted, 0) != split.choose(group, names, wanted, 1)
    fewer = split.choose(group[:380], names[:380], wanted, 0)
    assert len(fewer - first) <= 4  # five per cent fewer rows do not make another evaluation set


def test_large_groups_wait():
    group = [0] * 15 + list(range(1, 86))
    chosen = split.choose(group, [b"%d" % g for g in group], Split(eval_fraction=0.2), 0)
    assert len(chosen) == 20 and 0 not in chosen


def test_leaks_are_counted_and_stop_the_run(tmp_path, monkeypatch):
    vectors = np.array([[1, 0], [0, 1], [0.96, 0.28]], np.float32)
    assert split.count_leaks(vectors, [], [0, 1], [2], 0.95) == 1
    assert split.count_leaks(vectors, [], [0, 1], [2], 0.97) == 0
    assert split.count_leaks(None, [["x", "y", "x"], ["", "", ""]], [0, 1], [2], 0.9) == 1
    rows = [chat(i, f"q{i}", "a") for i in range(1, 11)]
    monkeypatch.setattr(split, "choose", lambda group, names, settings, seed: {group[0]})
    monkeypatch.setattr("finetune.dedup.select.groups", lambda *a, **k: np.arange(10))
    with pytest.raises(FinetuneError, match="9 of 9 training rows"):
        built(tmp_path, rows)


def test_off():
    assert split.spec(recipe(split=None)) is None


def test_the_rows_are_unchanged(tmp_path):
    rows = [chat(i, f"q{i}", t) for i, t in enumerate(sentences(20), 1)]
    built(tmp_path, rows)
    found = [*read_rows(tmp_path / "out" / "train.parquet"), *read_rows(tmp_path / "out" / "eval.parquet")]
    assert sorted(found, key=lambda r: int(r.id[2:])) == rows


def test_many_rows_are_grouped_by_real_cells_and_no_pair_is_on_two_sides(tmp_path, monkeypatch):
    from finetune.dedup import cells, large

    searches, pairs = [], cells.CellIndex.pairs

    def counted(index, queries, score):
        searches.append((index._near.shape[1], len(set(index._near[:, 0].tolist()))))
        return pairs(index, queries, score)

    texts = [s for s in sentences(40) for _ in range(2)]
    rows = [chat(i, f"{t} {'x' * (i % 2)}", t) for i, t in enumerate(texts, 1)]
    section = {"eval_fraction": 0.2, "group_threshold": 0.8}
    exact = built(tmp_path / "exact", rows, **section)
    monkeypatch.setattr(large, "LARGE_ROWS", 20)
    for name, value in (("ROWS_PER_CELL", 8), ("PROBES", 3)):
        monkeypatch.setattr(cells, name, value)
    monkeypatch.setattr(cells.CellIndex, "pairs", counted)
    assert built(tmp_path / "cells", rows, **section) == exact and exact[2]["leaks"] == 0
    assert searches and all(probes < there for probes, there in searches)


def test_a_pair_that_a_search_by_cells_missed_is_found_before_rows_are_held_out(tmp_path, monkeypatch):
    """Of many rows, groups come from a search that may miss; what is held out is compared with every other row."""
    from finetune.dedup import cells, large

    texts = [s for s in sentences(40) for _ in range(2)]
    rows = [chat(i, f"{t} {'x' * (i % 2)}", t) for i, t in enumerate(texts, 1)]
    monkeypatch.setattr(large, "LARGE_ROWS", 20)
    monkeypatch.setattr(cells.CellIndex, "pairs", lambda index, queries, score: iter(()))
    _, held, metrics = built(tmp_path, rows, eval_fraction=0.2, group_threshold=0.8)
    assert metrics["leaks"] == 0 and held
    numbers = {int(i.partition(":")[2]) for i in held}
    assert all((n + 1 if n % 2 else n - 1) in numbers for n in numbers)  # both of each pair
