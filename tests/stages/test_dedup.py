import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from finetune.context import StopFlag
from finetune.errors import GateRefused, InputError, Stopped
from finetune.stages import dedup, embed
from tests.stages.rows import chat, context, folder, ids, recipe, sentences

LONG = " ".join(sentences(9))


def built(tmp_path, rows, vectors="lsa", **section):
    whole = recipe(dedup={"threshold": 0.9, "field": "output", **section})
    kept = folder(tmp_path / "filter", rows)
    embedded = kept
    if vectors is not None:
        embedded = tmp_path / "embed"
        embedded.mkdir(exist_ok=True)
        if isinstance(vectors, str):
            embed.run(embed.spec(whole), {"filter": kept}, embedded, context(tmp_path))
        else:
            np.save(embedded / "vectors.npy", np.asarray(vectors, np.float32))
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    metrics = dedup.run(dedup.spec(whole), {"filter": kept, "embed": embedded}, out, context(tmp_path))
    return out, metrics, pq.read_table(out / "pairs.parquet").to_pylist()


def test_copies_and_near_copies_go_and_say_whom_they_repeat(tmp_path):
    texts = sentences(30)
    rows = [chat(i, "q", t) for i, t in enumerate(texts, 1)]
    rows += [chat(31, "q", LONG), chat(32, "q", texts[4].upper() + " \n"), chat(33, "q", LONG.replace("w", "v", 1))]
    rows += [chat(34, "q", ""), chat(35, "q", "")]
    out, metrics, pairs = built(tmp_path, rows)
    assert metrics == {"rows_in": 35, "rows_out": 33, "exact": 1, "minhash": 0, "embedding": 1}
    assert ids(out / "rows.parquet") == [r.id for r in rows if r.id not in ("a:5", "a:33")]  # a:32 is longer than a:5
    assert [(p["dropped_id"], p["kept_id"], p["method"]) for p in pairs] == [
        ("a:5", "a:32", "exact"),
        ("a:33", "a:31", "embedding"),
    ]
    assert pairs[0]["score"] == 1 and 0.9 <= pairs[1]["score"] < 1


def test_without_vectors_only_exact_copies_go(tmp_path):
    rows = [chat(1, "q", "A  b"), chat(2, "q", "a b"), chat(3, "q", "a b c")]
    out, metrics, pairs = built(tmp_path, rows, None, keep="first")
    assert metrics == {"rows_in": 3, "rows_out": 2, "exact": 1, "minhash": 0, "embedding": 0}
    assert ids(out / "rows.parquet") == ["a:1", "a:3"]
    _, metrics, pairs = built(tmp_path, rows, None, exact=False)
    assert metrics["rows_out"] == 3 and pairs == []


def test_the_copy_of_a_dropped_row_needs_a_kept_twin_of_its_own(tmp_path):
    rows = [chat(1, "q", "same"), chat(2, "q", "Same"), chat(3, "q", "SAME"), chat(4, "q", "longer text")]
    _, metrics, pairs = built(tmp_path, rows, [[1, 0], [1, 0], [0, 1], [0.96, 0.28]])
    assert [(p["dropped_id"], p["kept_id"], p["method"]) for p in pairs] == [
        ("a:1", "a:4", "embedding"),
        ("a:2", "a:4", "embedding"),
    ]
    assert metrics["rows_out"] == 2  # a:3 has the text of a dropped row, and no kept row is like it
    assert [p["score"] for p in pairs] == pytest.approx([0.96, 0.96], abs=1e-6)


def test_rows_of_like_wording_go_by_the_share_of_their_runs(tmp_path):
    base = " ".join(f"w{k}" for k in range(40))
    near = base.replace("w39", "other")  # 35 runs of 5 in common, 37 in all
    far = base.replace("w20", "other")  # 31 in common, 41 in all
    rows = [chat(1, "q", base), chat(2, "q", near), chat(3, "q", far), chat(4, "q", base.upper())]
    _, metrics, pairs = built(tmp_path, rows, None, keep="first", jaccard={"threshold": 0.9})
    assert metrics == {"rows_in": 4, "rows_out": 2, "exact": 1, "minhash": 1, "embedding": 0}
    assert [(p["dropped_id"], p["kept_id"], p["method"], p["score"]) for p in pairs] == [
        ("a:2", "a:1", "minhash", 35 / 37),
        ("a:4", "a:1", "exact", 1.0),
    ]
    assert built(tmp_path, rows, None, keep="first", jaccard={"threshold": 0.75})[1]["rows_out"] == 1
    assert built(tmp_path, rows, None, keep="first", jaccard={"threshold": 0.95})[1]["minhash"] == 0
    assert built(tmp_path, rows, None, keep="first")[1]["minhash"] == 0


def test_all_three_steps_at_once(tmp_path):
    texts = sentences(30)
    long = " ".join(texts[:3])
    rows = [chat(i, "q", t) for i, t in enumerate(texts, 1)]
    rows += [chat(31, "q", texts[4] + " "), chat(32, "q", long + " end"), chat(33, "q", long)]
    _, metrics, pairs = built(tmp_path, rows, threshold=0.95, jaccard={})
    assert [(p["dropped_id"], p["method"]) for p in pairs] == [("a:5", "exact"), ("a:33", "minhash")]
    assert metrics["rows_out"] == 31


def test_of_many_rows_the_recall_of_each_step_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(dedup, "MEASURED_FROM", 20)
    rows = [chat(i, "q", t) for i, t in enumerate([*sentences(19), LONG], 1)]
    assert "recall" not in built(tmp_path / "few", rows, jaccard={})[1]
    rows += [chat(21, "q", LONG.upper()), chat(22, "q", LONG + " x")]
    recall = built(tmp_path / "many", rows, jaccard={})[1]["recall"]
    assert recall == {
        "exact": {"sampled": 22, "repeats": 0, "recall": None},  # the longest of the three is kept, and has no copy
        "minhash": {"sampled": 22, "repeats": 2, "recall": 1.0},
        "embedding": {"sampled": 22, "repeats": 2, "recall": 1.0},
    }


@pytest.mark.parametrize(
    ("keep", "kept"), [("first", "a:1"), ("longest", "a:2"), ("column:score", "a:3"), ("column:flag", "a:3")]
)
def test_which_of_two_stays(tmp_path, keep, kept):
    rows = [
        chat(1, "q", "x", extra=json.dumps({"score": 2})),
        chat(2, "q long", "x", extra=None),
        chat(3, "q", "x", extra=json.dumps({"score": 2.5, "flag": True})),
    ]
    out, _, _ = built(tmp_path, rows, None, keep=keep)
    assert ids(out / "rows.parquet") == [kept]


def test_a_column_that_cannot_rank_is_refused(tmp_path):
    rows = [chat(1, "q", "x", extra=json.dumps({"score": "high"})), chat(2, "q", "x")]
    with pytest.raises(InputError, match="column 'score' of row a:1 is 'high'"):
        built(tmp_path, rows, None, keep="column:score")
    with pytest.raises(InputError, match="no row has a column 'other'"):
        built(tmp_path, rows, None, keep="column:other")


def test_off_and_no_rows(tmp_path):
    assert dedup.spec(recipe(dedup=None)) is None
    _, metrics, pairs = built(tmp_path, [])
    assert metrics == {"rows_in": 0, "rows_out": 0, "exact": 0, "minhash": 0, "embedding": 0} and pairs == []


def test_the_same_input_gives_the_same_bytes(tmp_path):
    rows = [chat(i, "q", t) for i, t in enumerate(sentences(9) * 2, 1)]
    out, _, _ = built(tmp_path, rows)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    built(tmp_path, rows)
    assert before == {p.name: p.read_bytes() for p in out.iterdir()}


def test_a_signal_stops_it(tmp_path):
    kept = folder(tmp_path / "filter", [chat(1, "q", "x")])
    with pytest.raises(Stopped):
        dedup.run(dedup.spec(recipe()), {"filter": kept, "embed": kept}, tmp_path, context(tmp_path, stop=StopFlag(15)))


def test_a_field_that_nearly_every_row_shares_is_refused(tmp_path):
    """Yes or no to four hundred questions is no data set of two rows."""
    rows = [chat(i, f"question {i}?", "yes" if i % 2 else "no") for i in range(1, 41)]
    with pytest.raises(GateRefused, match=r"dedup\.field=both"):
        built(tmp_path, rows, None)
    assert built(tmp_path, rows, None, field="both")[1]["rows_out"] == 40


def test_many_rows_are_searched_by_cells_unless_every_pair_is_asked_for(tmp_path, monkeypatch):
    from finetune.dedup import cells, large

    rows = [chat(i, "q", t + " end" * (i % 3)) for i, t in enumerate([s for s in sentences(40) for _ in range(2)], 1)]
    small = built(tmp_path / "small", rows)
    monkeypatch.setattr(large, "LARGE_ROWS", 20)
    monkeypatch.setattr(dedup, "MEASURED_FROM", 20)
    for module, name, value in (
        (cells, "ROWS_PER_CELL", 8), (cells, "PROBES", 3), (large, "LOW", 0.5),
        (large, "BLOCK_ROWS", 16), (large, "SAMPLED_PER_DROPPED", 1), (large, "MOST_SAMPLED", 1.0),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    by_cells, every = built(tmp_path / "cells", rows), built(tmp_path / "every", rows, exhaustive=True)
    found = by_cells[1]["recall"]["embedding"]
    assert 0 < found["probed"] < 1 and found["sampled"] and found["missed"] == 0, found
    assert every[1]["recall"]["embedding"]["recall"] == 1.0 and "probed" not in every[1]["recall"]["embedding"]
    assert by_cells[2] == every[2] == small[2]
