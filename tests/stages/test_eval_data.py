"""Held-out rows of the user's own: read apart, never trained on, and their repeats found as brute force finds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from finetune.data.records import read_rows
from finetune.dedup.index import FlatIndex
from finetune.dedup.measures import Cosine
from finetune.dedup.select import repeats_of
from finetune.errors import GateRefused, InputError
from finetune.pipeline import runner
from finetune.pipeline.stage_list import STAGES, spec_of, stage_named
from finetune.pipeline.store import Store
from finetune.recipe import Recipe
from finetune.stages import certify, decontaminate, evaluate, ingest, sample, split
from tests.stages.rows import chat, context, folder, ids, recipe, sentences

TEXTS = sentences(30)


def built(tmp_path: Path, train: list[Any], held: list[Any], **sections: Any) -> tuple[Path, dict[str, Any]]:
    """The folder with what decontaminate, sample (if the recipe has it) and split leave, and all their figures."""
    whole = recipe(eval_data=[{"source": "local", "path": "/none/b"}], **sections)
    made = folder(tmp_path / "ingest", train)
    (folder(tmp_path / "ingest2", held) / "rows.parquet").rename(made / "eval.parquet")
    out, sampled = tmp_path / "out", tmp_path / "sampled"
    out.mkdir()
    sampled.mkdir()
    inputs = {"dedup": folder(tmp_path / "dedup", train), "embed": tmp_path / "none", "ingest": made}
    spec, chosen = decontaminate.spec(whole), sample.spec(whole)
    assert spec is not None and decontaminate.also(spec) == ("ingest",)
    metrics = decontaminate.run(spec, inputs, out, context(tmp_path))
    if chosen is not None:
        sample.run(chosen, {"decontaminate": out, "base": tmp_path}, sampled, context(tmp_path))
    last = split.spec(whole)
    assert last is not None and split.also(last) == ("ingest",)
    inputs["sample"] = sampled if chosen is not None else out
    return out, metrics | split.run(last, inputs, out, context(tmp_path))


def pairs(out: Path) -> list[tuple[str, str, str]]:
    return [
        (p["dropped_id"], p["evaluation_id"], p["method"]) for p in pq.read_table(out / "pairs.parquet").to_pylist()
    ]


def test_rows_that_repeat_a_held_out_row_are_dropped_and_listed(tmp_path: Path) -> None:
    train = [chat(i, f"q{i}", t) for i, t in enumerate(TEXTS, 1)]
    train += [
        chat(31, "Q3", TEXTS[2].upper()),
        chat(32, "q4", TEXTS[3].replace("w", "v", 1)),
        chat("5~2", "q5", TEXTS[4]),
    ]
    held = [chat(i, f"q{i}", TEXTS[i - 1], source="b") for i in (3, 4, 5)] + [chat(9, "new", "else", source="b")]
    out, metrics = built(tmp_path, train, held, dedup={"threshold": 0.6})
    gone = {"a:3", "a:4", "a:5", "a:31", "a:32", "a:5~2"}
    assert ids(out / "train.parquet") == [r.id for r in train if r.id not in gone]
    assert list(read_rows(out / "eval.parquet")) == held
    assert pairs(out) == [
        ("a:3", "b:3", "exact"),
        ("a:4", "b:4", "exact"),
        ("a:5", "b:5", "exact"),
        ("a:31", "b:3", "exact"),
        ("a:32", "b:4", "embedding"),
        ("a:5~2", "b:5", "exact"),
    ]
    assert (metrics["train_rows"], metrics["eval_rows"], metrics["dropped"], metrics["leaks"]) == (27, 4, 6, 0)
    assert metrics["repeat_eval_data"] == {"exact": 5, "embedding": 1}


def test_the_whole_row_counts_whatever_the_measures_are(tmp_path: Path) -> None:
    train = [chat(i, f"q{i}", t) for i, t in enumerate(TEXTS, 1)]
    out, _ = built(tmp_path, train, [chat(1, "q1", TEXTS[0], source="b")], dedup=None)
    assert pairs(out) == [("a:1", "b:1", "exact")]


def test_a_share_is_held_out_as_well_where_the_recipe_asks(tmp_path: Path) -> None:
    train = [chat(i, f"q{i}", t) for i, t in enumerate(TEXTS, 1)]
    held = [chat(1, "q1", TEXTS[0], source="b")]
    out, metrics = built(tmp_path, train, held, dedup={"embedding": None}, split={"eval_fraction": 0.2})
    kept, tested = ids(out / "train.parquet"), ids(out / "eval.parquet")
    assert tested[0] == "b:1" and len(tested) == 6 and len(kept) == 24 and "a:1" not in kept + tested
    assert not set(kept) & set(tested) and (metrics["train_rows"], metrics["eval_rows"]) == (24, 6)


def test_sampling_gives_the_rows_asked_for_whatever_repeats_a_held_out_row(tmp_path: Path) -> None:
    train = [chat(i, f"q{i}", t) for i, t in enumerate(TEXTS, 1)]
    held = [chat(i, f"q{i}", TEXTS[i - 1], source="b") for i in range(1, 11)]
    out, metrics = built(tmp_path, train, held, dedup={"embedding": None}, sample={"random": 20})
    assert (metrics["train_rows"], metrics["eval_rows"], metrics["dropped"]) == (20, 10, 10)
    assert set(ids(out / "train.parquet")) == {f"a:{i}" for i in range(11, 31)}


def test_both_kinds_of_evaluation_data_are_kept_apart(tmp_path: Path) -> None:
    """A benchmark under decontaminate.against beside held-out rows: each row goes once, with the data it is like."""
    (tmp_path / "bench.jsonl").write_text(json.dumps({"prompt": "other words " + TEXTS[4], "completion": "x"}) + "\n")
    against = {"against": [{"source": "local", "path": str(tmp_path / "bench.jsonl")}], "ngram": 8}
    train = [chat(i, f"q{i}", t) for i, t in enumerate(TEXTS, 1)]
    held = [chat(3, "q3", TEXTS[2], source="b")]
    out, metrics = built(tmp_path, train, held, dedup={"embedding": None}, decontaminate=against)
    assert pairs(out) == [("a:3", "b:3", "exact"), ("a:5", "bench.jsonl:1", "words")]
    assert (metrics["rows_in"], metrics["rows_out"], metrics["words"]) == (28, 28, 1)


def test_all_rows_repeated_is_refused(tmp_path: Path) -> None:
    train = [chat(i, f"q{i}", "yes") for i in range(1, 9)]
    with pytest.raises(GateRefused, match=r"every one of 8 training rows repeats the output .*dedup\.field=both"):
        built(tmp_path, train, [chat(1, "other", "yes", source="b")], dedup={"field": "output", "embedding": None})


def test_repeats_are_those_of_brute_force() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(80, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    keys = [b"%d" % (i % 37) for i in range(80)]
    found = {
        p.dropped: p for p in repeats_of(np.arange(60), np.arange(60, 80), keys, [Cosine(vectors, 0.9, FlatIndex)])
    }
    cosines = vectors[:60].astype(float) @ vectors[60:].astype(float).T
    for row in range(60):
        same = [j for j in range(60, 80) if keys[j] == keys[row]]
        near = cosines[row].max() >= 0.9
        assert (row in found) == (bool(same) or near)
        if row in found:
            assert found[row].kept == (same[0] if same else 60 + int(cosines[row].argmax()))


def rows_file(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_ingest_reads_them_apart_and_its_key_knows_them(tmp_path: Path) -> None:
    (tmp_path / "e").mkdir()
    ours = rows_file(tmp_path / "x.jsonl", *({"prompt": f"q{i}", "completion": t} for i, t in enumerate(TEXTS)))
    theirs = rows_file(tmp_path / "e" / "x.jsonl", {"question": "q0", "answer": TEXTS[0]})
    data = {"data": [{"source": "local", "path": ours}]}
    whole = recipe(**data, eval_data=[{"source": "local", "path": theirs}])
    out = tmp_path / "out"
    out.mkdir()
    metrics = ingest.run(ingest.spec(whole), {}, out, context(tmp_path))
    assert (metrics["rows_out"], metrics["eval_rows"]) == (30, 1)
    assert ids(out / "eval.parquet") == ["x.jsonl#2:1"]
    assert ingest.fingerprint(ingest.spec(whole)) != ingest.fingerprint(ingest.spec(recipe(**data)))
    empty = rows_file(tmp_path / "e" / "bad.jsonl", {"prompt": "q", "completion": None})
    with pytest.raises(InputError, match=r"no row could be read from bad\.jsonl"):
        again = recipe(**data, eval_data=[{"source": "local", "path": empty}], ingest={"max_refused_fraction": 1})
        ingest.run(ingest.spec(again), {}, out, context(tmp_path))


def test_the_recipe_then_holds_nothing_else_out_and_evaluates(tmp_path: Path) -> None:
    held = [{"source": "local", "path": "/none/b"}]
    whole = recipe(eval_data=held, train={"eval_steps": 5})
    assert whole.split is None and whole.holds_out
    assert evaluate.spec(whole) is not None and certify.spec(whole) is not None
    assert recipe(eval_data=held, split={}).split is not None
    assert split.spec(recipe(split=None)) is None and evaluate.spec(recipe(split=None)) is None
    plain = split.spec(recipe())
    assert plain is not None and split.also(plain) == () and decontaminate.spec(recipe()) is None
    for field in ({"weight": 2}, {"rows": 5}):
        with pytest.raises(ValidationError, match="held-out rows are used once each"):
            recipe(eval_data=[{**held[0], **field}])


def test_the_stage_needs_ingest_only_with_them(tmp_path: Path) -> None:
    store = Store(tmp_path / "a", tmp_path / "s")
    outputs = {name: runner.Output(tmp_path, name) for name in ("sample", "embed", "ingest")}

    def step(whole: Recipe) -> runner.Step:
        return runner.locate(stage_named("split"), whole, store, outputs)

    held = [{"source": "local", "path": "/none/b"}]
    assert set(step(recipe()).inputs) == {"sample", "embed"}
    assert set(step(recipe(eval_data=held)).inputs) == {"sample", "embed", "ingest"}


def test_without_training_rows_every_row_is_held_out(tmp_path: Path) -> None:
    """An adapter made elsewhere and rows to certify it on: nothing curates, and no embedding is asked for."""
    held = [{"source": "local", "path": "/none/b"}]
    imports = {"name": "t", "model": "builtin:tiny-mistral", "train": None, "lora": {"start_from": "/none/adapter"}}
    whole = Recipe.model_validate({**imports, "eval_data": held, "dedup": {"embedding": "a/b"}})
    on = {stage.name for stage in STAGES if spec_of(stage, whole) is not None}
    assert on == {"base", "ingest", "split", "render", "train", "evaluate", "certify", "merge"}
    spec = split.spec(whole)
    assert spec is not None
    rows = [chat(i, f"q{i}", t, source="b") for i, t in enumerate(TEXTS, 1)]
    made = folder(tmp_path / "ingest", [])
    (folder(tmp_path / "theirs", rows) / "rows.parquet").rename(made / "eval.parquet")
    out = tmp_path / "out"
    out.mkdir()
    metrics = split.run(spec, {"sample": made, "embed": made, "ingest": made}, out, context(tmp_path))
    assert (metrics["train_rows"], metrics["eval_rows"], metrics["leaks"]) == (0, 30, 0)
    assert list(read_rows(out / "eval.parquet")) == rows and ids(out / "train.parquet") == []
    with pytest.raises(ValidationError, match="there is no data to hold rows out of"):
        Recipe.model_validate({**imports, "eval_data": held, "split": {}})
    nothing = {stage.name for stage in STAGES if spec_of(stage, Recipe.model_validate(imports)) is not None}
    assert nothing == {"base", "train", "merge"}
