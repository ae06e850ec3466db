from collections import Counter

import pytest

from finetune.errors import GateRefused
from finetune.records import write_json
from finetune.stages import sample
from tests import tiny_tokenizers
from tests.stages.rows import chat, context, folder, ids, recipe

ROWS = [chat(i, "q", "word " * (i % 7 + 1), source) for source in ("a", "b") for i in range(1, 51)]


def weighted(a=1.0, b=1.0, **sections):
    data = [{"source": "local", "path": f"/none/{n}", "weight": w} for n, w in (("a", a), ("b", b))]
    return recipe(data=data, **sections)


def built(tmp_path, whole, rows=ROWS, base=None):
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    kept = folder(tmp_path / "decontaminate", rows)
    inputs = {"decontaminate": kept, "base": base or tmp_path, "embed": kept}
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
