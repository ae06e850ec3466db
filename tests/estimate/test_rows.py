"""Rows and tokens estimated from files before anything ran, beside what is really there."""

import json

from finetune.estimate import rows as estimate_rows
from finetune.estimate.rows import expect
from finetune.pipeline import plan, runner
from finetune.pipeline.store import Store
from finetune.recipe import Recipe


def recipe(path, **more):
    raw = {"name": "x", "model": "builtin:tiny-mistral", "data": [{"source": "local", "path": str(path)}], **more}
    return Recipe.model_validate(raw)


def write(path, count):
    line = json.dumps({"prompt": "What is it?", "completion": "It is a thing of forty letters, more or less."})
    path.write_text(f"{line}\n" * count)
    return path


def test_a_small_file_is_counted_and_few_steps_are_named(tmp_path):
    found = recipe(write(tmp_path / "a.jsonl", 174), split={"eval_fraction": 0.5}, dedup=None)
    expected = expect(found)
    assert expected.documents == 87 and expected.rows < 10
    store = Store(tmp_path / "artifacts", tmp_path / "scratch")
    result = plan.predict(found, runner.plan(found, store))
    assert result["estimated"] and result["steps"] == 1
    said = plan.describe(result)
    assert "estimated from the files" in said and "ONLY 1 OPTIMISER STEP " in said and "train.batch_rows" in said


def test_a_large_file_is_measured_by_its_first_rows(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", 3000)
    whole = expect(recipe(path))
    monkeypatch.setattr(estimate_rows, "MOST_ROWS", 300)
    part = expect(recipe(path))
    assert whole.documents == 2850 and 0.7 < part.documents / whole.documents < 2


def test_what_is_no_file_is_not_guessed(tmp_path):
    made = Recipe.model_validate({"name": "x", "model": "a/b", "data": [{"source": "hub", "id": "c/d"}]})
    assert expect(made) is None
