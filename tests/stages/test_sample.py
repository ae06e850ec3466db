from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from finetune.data.records import write_table
from finetune.errors import GateRefused, InputError
from finetune.stages import sample
from finetune.utils.files import write_json
from tests.helpers import tiny_tokenizers
from tests.stages.rows import chat, context, folder, ids, recipe

ROWS = [chat(i, "q", "word " * (i % 7 + 1), source) for source in ("a", "b") for i in range(1, 51)]


def weighted(a=1.0, b=1.0, **sections):
    data = [{"source": "local", "path": f"/none/{n}", "weight": w} for n, w in (("a", a), ("b", b))]
    return recipe(data=data, **sections)


def built(tmp_path, whole, rows=ROWS, base=None, embedded=None):
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    kept = folder(tmp_path / "decontaminate", rows)
    inputs = {"decontaminate": kept, "base": base or tmp_path, "embed": embedded or kept}
    metrics = sample.run(sample.spec(whole), inputs, out, context(tmp_path))
    return ids(out / "rows.parquet"), metrics


def test_it_is_off_when_every_row_is_used_once():
    assert sample.spec(weighted()) is None
    assert sample.spec(weighted(sample={})) is None
    assert sample.spec(weighted(b=2.0)) is not None
    assert sample.spec(weighted(sample={"random": 3})) is not None


def test_weights_leave_out_and_repeat(tmp_path):
    found, metrics = built(tmp_path, weighted(a=0.3, b=2.5))
    assert metrics == {"rows_in": 100, "rows_out": 140, "kept_by": {"weight": {"a": 15, "b": 125}}}
    counts = Counter(row_id.split("~")[0] for row_id in found)
    assert sorted(counts[f"b:{i}"] for i in range(1, 51)) == [2] * 25 + [3] * 25
    assert len(set(found)) == 140
    assert found[15:17] == ["b:1", "b:1~2"]
    assert found == sorted(found, key=lambda x: (x[0], int(x[2:].split("~")[0]), x))


def test_the_choice_hangs_on_the_seed_and_on_nothing_else(tmp_path):
    first, _ = built(tmp_path, weighted(seed=1, sample={"random": 40}))
    assert len(first) == 40 and first == built(tmp_path, weighted(seed=1, sample={"random": 40}))[0]
    assert first != built(tmp_path, weighted(seed=2, sample={"random": 40}))[0]
    fewer, _ = built(tmp_path, weighted(seed=1, sample={"random": 30}))
    assert set(fewer) < set(first)
    assert sample.spec(weighted(seed=1, b=2)) == sample.spec(weighted(seed=2, b=2))


def test_copies_that_stay_count_from_one(tmp_path):
    found, _ = built(tmp_path, weighted(a=3.0, b=3.0, sample={"random": 60}))
    assert len(found) == len(set(found)) == 60
    for row_id in found:
        name, _, number = row_id.partition("~")
        assert not number or name in found


def test_more_than_there_is_takes_all(tmp_path):
    found, metrics = built(tmp_path, weighted(sample={"random": 1000}))
    assert len(found) == 100 and metrics["kept_by"] == {"weight": {}, "random": 100}


def test_top_k_takes_the_rows_with_most_tokens_the_earlier_on_a_tie(tmp_path):
    base = tmp_path / "base"
    tokenizer = tiny_tokenizers.build("byte_level")
    tokenizer.save_pretrained(base)
    write_json(base / "config.json", {"model_type": "mistral"})
    found, metrics = built(tmp_path, weighted(sample={"top_k": 10}), base=base)
    longest = [r.id for r in ROWS if int(r.id[2:]) % 7 == 6]
    assert found == longest[:10]
    tokens = len(tokenizer("q\n" + "word " * 7, add_special_tokens=False)["input_ids"])
    assert metrics["kept_by"] == {"weight": {}, "top_k": 10, "fewest_tokens": tokens}


def test_two_sources_of_one_name_have_their_own_weights():
    data = [{"source": "local", "path": f"/{n}/x.jsonl", "weight": w} for n, w in (("a", 1), ("b", 2))]
    assert sample.spec(recipe(data=data)).weights == {"x.jsonl#2": 2.0}


def test_nothing_left_is_refused(tmp_path):
    with pytest.raises(GateRefused, match="none of 1 rows is left"):
        built(tmp_path, weighted(a=0.1), rows=ROWS[:1])


def counted(a=None, b=None, **sections):
    data = [{"source": "local", "path": f"/none/{n}", "rows": r} for n, r in (("a", a), ("b", b))]
    return recipe(data=data, **sections)


def test_a_number_of_rows_of_each_source(tmp_path):
    found, metrics = built(tmp_path, counted(a=7, b=20))
    assert Counter(i[0] for i in found) == {"a": 7, "b": 20} and len(set(found)) == 27
    assert metrics["kept_by"] == {"weight": {}, "rows": {"a": 7, "b": 20}}
    assert found == built(tmp_path, counted(a=7, b=20))[0]
    assert found != built(tmp_path, counted(a=7, b=20, seed=1))[0]
    more, _ = built(tmp_path, counted(a=9, b=20))
    assert set(found) < set(more)
    reversed_rows, _ = built(tmp_path, counted(a=7, b=20), rows=ROWS[::-1])
    assert set(reversed_rows) == set(found)


def test_more_rows_than_a_source_has_are_all_of_them(tmp_path):
    found, metrics = built(tmp_path, counted(a=500))
    assert len(found) == 100 and metrics["kept_by"]["rows"] == {"a": 50}


@settings(max_examples=20, deadline=None)
@given(a=st.integers(1, 60), b=st.floats(0.1, 3), keep=st.integers(1, 200))
def test_every_count_is_exact(tmp_path_factory, a, b, keep):
    data = [{"source": "local", "path": "/none/a", "rows": a}, {"source": "local", "path": "/none/b", "weight": b}]
    found, metrics = built(tmp_path_factory.mktemp("s"), recipe(data=data, sample={"random": keep}))
    total = min(a, 50) + int(b * 50 + 0.5)
    assert len(found) == len(set(found)) == metrics["rows_out"] == min(keep, total)


SCORED = [chat(i, "q", "x", extra=f'{{"score":{s}}}') for i, s in enumerate(["3", "9.5", '"7"', "true", '""'], 1)]
SCORED.append(chat(6, "q", "x"))


def test_top_k_by_a_column_of_the_source(tmp_path):
    found, metrics = built(tmp_path, recipe(sample={"top_k": 3, "by": "column:score"}), rows=SCORED)
    assert found == ["a:1", "a:2", "a:3"] and metrics["kept_by"] == {"weight": {}, "lowest": 3.0, "top_k": 3}
    found, metrics = built(tmp_path, recipe(sample={"top_k": 5, "by": "column:score"}), rows=SCORED)
    assert found == ["a:1", "a:2", "a:3", "a:4", "a:5"] and metrics["kept_by"]["lowest"] is None


def test_a_column_that_is_not_there_or_no_figure(tmp_path):
    with pytest.raises(InputError, match="no row has a figure in a column 'quality'"):
        built(tmp_path, recipe(sample={"top_k": 3, "by": "column:quality"}), rows=SCORED)
    with pytest.raises(InputError, match="column 'score' of row a:9 is 'good'; only numbers"):
        bad = chat(9, "q", "x", extra='{"score":"good"}')
        built(tmp_path, recipe(sample={"top_k": 3, "by": "column:score"}), rows=[*SCORED, bad])


def blobs(tmp_path, sizes):
    """Rows around far corners, most of them around the first."""
    rng = np.random.default_rng(0)
    corners = np.eye(len(sizes), dtype=np.float32)
    near = np.concatenate([corners[i] + 0.01 * rng.standard_normal((n, len(sizes))) for i, n in enumerate(sizes)])
    rows = [chat(i, "q", f"answer {i}") for i in range(1, len(near) + 1)]
    embedded = tmp_path / "embed"
    embedded.mkdir(exist_ok=True)
    np.save(embedded / "vectors.npy", near.astype(np.float32))
    write_table(embedded / "ids.parquet", {"id": [r.id for r in rows]})
    of = dict(zip((r.id for r in rows), np.repeat(range(len(sizes)), sizes), strict=True))
    return rows, embedded, of


def test_diverse_sees_every_theme_where_random_sees_the_large_one(tmp_path):
    rows, embedded, of = blobs(tmp_path, [300] + [4] * 9)
    diverse = recipe(sample={"diverse": 20, "clusters": 20})
    found, metrics = built(tmp_path, diverse, rows=rows, embedded=embedded)
    by_chance, _ = built(tmp_path, recipe(sample={"random": 20}), rows=rows, embedded=embedded)
    assert len(found) == len(set(found)) == 20 == metrics["kept_by"]["diverse"]
    assert len({of[i] for i in found}) > len({of[i] for i in by_chance})
    assert metrics["kept_by"]["clusters_kept"] == metrics["kept_by"]["clusters"] == 20
    assert found == built(tmp_path, diverse, rows=rows, embedded=embedded)[0]
    shuffled = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
    assert set(built(tmp_path, diverse, rows=shuffled, embedded=embedded)[0]) == set(found)


def test_diverse_counts_copies_last_and_needs_vectors(tmp_path):
    rows, embedded, _ = blobs(tmp_path, [10, 10])
    data = [{"source": "local", "path": "/none/a", "weight": 2.0}]
    found, _ = built(tmp_path, recipe(data=data, sample={"diverse": 25}), rows=rows, embedded=embedded)
    assert len(found) == 25 and sum("~" in i for i in found) == 5
    with pytest.raises(InputError, match=r"sample\.diverse needs vectors"):
        built(tmp_path, recipe(sample={"diverse": 5}), rows=rows)


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"sample": {"top_k": 1, "diverse": 1}}, "top_k and diverse are different rules"),
        ({"sample": {"random": 1, "by": "column:x"}}, "only top_k ranks rows"),
        ({"sample": {"by": "column:x"}}, "only top_k ranks rows"),
        ({"sample": {"top_k": 1, "by": "x"}}, "by"),
        ({"sample": {"random": 5, "clusters": 2}}, "only diverse makes clusters"),
        ({"sample": {"diverse": 5, "clusters": 6}}, "6 clusters are more than diverse 5 rows"),
        ({"sample": {"diverse": 5}, "dedup": None}, "needs the vectors"),
        ({"sample": {"diverse": 5}, "dedup": {"embedding": None}}, "needs the vectors"),
        ({"data": [{"source": "pydoc", "rows": 5, "weight": 2.0}]}, "rows and weight"),
        ({"data": [{"source": "pydoc", "rows": 5, "take": 4}]}, "only take 4 are read"),
    ],
    ids=range(10),
)
def test_contradictions_are_refused(sections, says):
    with pytest.raises(ValidationError, match=says):
        recipe(**sections)


def test_what_fits_together_is_taken():
    recipe(sample={"diverse": 5, "clusters": 5})
    recipe(data=[{"source": "pydoc", "rows": 5, "take": 5}], sample={"top_k": 2, "by": "column:x"})


def rejects(tmp_path):
    return {r["id"]: r for r in pq.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()}


@pytest.mark.parametrize(
    ("whole", "reason"),
    [
        (weighted(a=0.3), "weight"),
        (recipe(data=[{"source": "local", "path": "/none/a", "rows": 20}]), "rows"),
        (weighted(sample={"random": 10}), "random"),
        (weighted(sample={"random": 10}, b=2.0), "random"),
    ],
    ids=["weight", "rows", "random", "copies"],
)
def test_every_row_that_is_not_used_has_its_reason(tmp_path, whole, reason):
    found, _ = built(tmp_path, whole)
    used = {row_id.split("~")[0] for row_id in found}
    table = rejects(tmp_path)
    assert set(table) == {row.id for row in ROWS} - used and table
    assert {r["reason"] for r in table.values()} == {reason}
    assert all("seed 0 and row id" in r["detail"] and r["text"].startswith("q\nword") for r in table.values())


def test_a_row_that_was_outranked_says_by_how_much(tmp_path):
    rows = [chat(i, "q", "x", extra=None if i == 3 else f'{{"score":{i}}}') for i in range(1, 5)]
    built(tmp_path, weighted(sample={"top_k": 2, "by": "column:score"}), rows)
    table = rejects(tmp_path)
    assert [(r["reason"], r["value"], r["limit"]) for r in table.values()] == [("top_k", 1, 2), ("top_k", None, 2)]
    assert table["a:1"]["detail"] == "column:score 1; the last of the 2 rows that are used has 2"
    built(tmp_path, weighted(sample={"top_k": 9, "by": "column:score"}), rows)
    assert rejects(tmp_path) == {}
