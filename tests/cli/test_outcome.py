"""What a run says beside its table: rows left out anywhere, few steps, private rows, the next command."""

import json
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune.cli.options import SCRATCH
from finetune.cli.run import dropped_rows, next_step, warnings_before_training
from finetune.data.records import Example, Message, write_rows
from finetune.eval.verdict import verdict
from finetune.pipeline.store import Store
from finetune.recipe import Recipe


def step(name, metrics=None, folder=None, **files):
    counted = {f"{n}.parquet": SimpleNamespace(rows=rows) for n, rows in files.items()}
    return SimpleNamespace(
        stage=SimpleNamespace(name=name), manifest=SimpleNamespace(metrics=metrics or {}, files=counted), folder=folder
    )


def recipe(**more):
    data = [{"source": "local", "path": "/x/rows.csv"}]
    return Recipe.model_validate({"name": "x", "model": "builtin:tiny-mistral", "data": data, **more})


def test_rows_are_counted_wherever_they_were_dropped():
    steps = [
        step("ingest", refused=2),
        step("filter", rejects=0, rows=9),
        step("dedup", pairs=3),
        step("render", rejects=6),
    ]
    assert dropped_rows(steps) == {"ingest": 2, "dedup": 3, "render": 6}
    assert dropped_rows([SimpleNamespace(stage=SimpleNamespace(name="filter"), manifest=None)]) == {}


@pytest.mark.parametrize(("batch", "warns"), [(16, True), (1, False)])
def test_few_steps_are_named_before_training_with_what_to_set(batch, warns, tmp_path):
    made = recipe(train={"batch_rows": batch, "epochs": 4})
    said = list(warnings_before_training(made, step("pack", {"bins": 9, "documents": 174}, tmp_path)))
    assert bool(said) == warns
    assert not warns or ("ONLY 4 OPTIMISER STEPS" in said[0] and "pack: null, train.batch_rows: 8" in said[0])


def test_private_rows_are_counted_before_training(tmp_path):
    rows = [
        Example("rows.csv:1", "rows.csv", (Message("user", text), Message("assistant", "ok")))
        for text in ("a@b.example", "hi")
    ]
    write_rows(tmp_path / "train.parquet", rows)
    assert "of 2 rows 1 with e-mail" in next(warnings_before_training(recipe(), step("split", {}, tmp_path)))
    assert not list(warnings_before_training(recipe(), step("render", {}, tmp_path)))


def test_private_text_in_either_answer_of_a_local_pair_is_counted(tmp_path):
    pair = {"prompt": "[]", "chosen": "[]", "tools": None}
    answer = [{"role": "assistant", "content": "", "tool_calls": [{"function": {"arguments": {"to": "a@b.example"}}}]}]
    texts = [
        {**pair, "pair_id": "p.csv:1", "split": "train", "rejected": json.dumps(answer)},
        {**pair, "pair_id": "p.csv:2", "split": "eval", "rejected": "[]"},
        {**pair, "pair_id": "hub/x:3", "split": "eval", "rejected": json.dumps(answer)},
    ]
    pq.write_table(pa.Table.from_pylist(texts), tmp_path / "texts.parquet")
    for split in ("train", "eval"):
        ids = [t["pair_id"] for t in texts if t["split"] == split]
        columns = {"pair_id": ids, "source": [i.partition(":")[0] for i in ids]}
        pq.write_table(pa.table(columns), tmp_path / f"{split}.parquet")
    local = recipe(train=None, preference={"data": [{"source": "local", "path": "/x/p.csv"}]})
    (line,) = warnings_before_training(local, step("pairs", {}, tmp_path))
    assert "before training: of 2 rows 1 with e-mail addresses" in line and "example" not in line
    hub = {"data": [{"source": "hub", "id": "hub/x"}], "eval_data": [{"source": "hub", "id": "hub/x"}]}
    assert not list(warnings_before_training(recipe(preference=hub), step("pairs", {}, tmp_path)))


def test_the_next_command_suits_what_was_found():
    loaded = SimpleNamespace(recipe=SimpleNamespace(name="mine"), path="a/mine.yaml")
    same = {
        "perplexity_base": 9.0,
        "perplexity_adapter": 9.0,
        "perplexity_ratio": 1.0,
        "perplexity_ratio_interval": [0.9, 1.1],
    }
    bad = verdict({"steps": 2}, same, {}, merged=True)
    assert "a/mine.yaml" in next_step(loaded, bad, None) and "report mine" in next_step(loaded, bad, None)
    assert next_step(loaded, verdict({"steps": 99}, {}, {}, merged=True), None) == "next: finetune chat mine"
    assert next_step(loaded, None, "pack") == "next: finetune run a/mine.yaml"
    elsewhere = Store(Path("/my drive/runs"), SCRATCH)
    assert next_step(loaded, None, None, elsewhere) == "next: finetune show mine --artifacts '/my drive/runs'"
