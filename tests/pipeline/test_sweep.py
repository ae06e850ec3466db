"""Sweeps: points of a grid, stages shared through the store, results, a stop and a continuation.

The stages are stubs here; tests/e2e/test_sweep_command.py runs real ones.
"""

import dataclasses
import json
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from finetune.cli.main import app
from finetune.context import Context
from finetune.errors import FinetuneError, GateRefused, InputError, Stopped
from finetune.pipeline import launch, runner
from finetune.pipeline import sweep as sweeps
from finetune.pipeline.recipe_names import load_recipe
from finetune.pipeline.runs import Run
from finetune.pipeline.store import Store
from finetune.report import sweep_page

RECIPE = "schema: 1\nname: small\nmodel: builtin:tiny-mistral\ndata:\n  - {source: local, path: rows.jsonl}\n"
FOUR = ("render.max_length_tokens=[100, 128]", "lora.r=[2, 4]")


def stub(spec, inputs, folder, ctx):
    """A stage that writes its spec; its metrics are the spec's numbers."""
    value = spec.model_dump(mode="json")
    (folder / "spec.json").write_text(json.dumps(value, sort_keys=True))
    tokens = value.get("render", value).get("max_length_tokens") or 0
    return {"tokens": tokens, "share": {"kept": 0.5}, "tokens_interval": [tokens - 1, tokens + 1], "name": "a text"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "small.yaml").write_text(RECIPE)
    monkeypatch.setattr(runner, "STAGES", tuple(dataclasses.replace(s, run=stub) for s in runner.STAGES))
    return tmp_path


class Starts:
    """Stands for the processes of a sweep: runs them here, unless `instead` has a status or an error for the call."""

    def __init__(self, instead=None):
        self.instead, self.calls, self.results = instead or {}, [], []

    def __call__(self, arguments):
        self.calls.append(arguments)
        outcome = self.instead.get(len(self.calls), 0)
        if isinstance(outcome, Exception):
            raise outcome
        if outcome == 0:
            _, path, _, until, _, artifacts, _, scratch, *options = arguments
            store = Store(Path(artifacts), Path(scratch))
            sets = [o.removeprefix("--set=") for o in options if o.startswith("--set=")]
            recipe = load_recipe(path, sets, store.artifacts).recipe
            ctx = Context(store.scratch, recipe.runtime, recipe.tracking)
            runner.run(recipe, store, ctx, Run(store.artifacts, recipe.name, "", (), "0", write=False), until=until)
        return outcome


def swept(folder, starts, metric="render.tokens", grid=FOUR):
    store = Store(folder / "artifacts", folder / "scratch")
    planned = sweeps.plan_sweep(str(folder / "small.yaml"), grid, metric, [], store.artifacts, highest=True)
    for results in sweeps.run_points(planned, store, lambda line: None, starts):
        starts.results = results
    return planned, starts.results, store


def folders(folder, stage):
    return list((folder / "artifacts" / stage).glob("*"))


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("train.learning_rate", "write FIELD="),
        ("train.learning_rate=1e-4", "write FIELD="),
        ("train.learning_rate=[]", "write FIELD="),
        ("train.learning_rate=[1e-4", "--grid train.learning_rate"),
        ("train.learning_rate=[1e-4, 0.0001]", "0.0001 is in the list twice"),
        ("name=[a, b]", "a run's name is no setting"),
        ("runtime.micro_batch_rows=[1, 2]", "changes no result"),
        ("tracking=[null]", "changes no result"),
        ("seed=[" + ",".join(map(str, range(1001))) + "]", "1,001 runs; at most 1,000"),
    ],
)
def test_a_grid_that_is_no_list_of_different_values_is_refused(option, words):
    with pytest.raises(InputError, match=words.replace("[", r"\[")):
        sweeps.read_grid([option])
    assert sweeps.read_grid(["train.learning_rate=[1e-4, 2e-4]", "pack=[null, {}]"]) == {
        "train.learning_rate": ["0.0001", "0.0002"], "pack": ["null", "{}"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("grid", "metric", "words"),
    [
        ("lora.rank=[1]", "train.loss", "unknown field"),
        ("lora.r=[1, -1]", "train.loss", "lora.r"),
        ("lora.r=[1]", "loss", "write STAGE.NAME"),
        ("lora.r=[1]", "training.loss", "no stage named"),
        ("lora.r=[1]", "export.difference", "the recipe turns export off"),
    ],
)
def test_every_point_is_validated_before_the_first_runs(folder, grid, metric, words):
    with pytest.raises(InputError, match=words):
        sweeps.plan_sweep(str(folder / "small.yaml"), [grid], metric, [], folder / "artifacts", highest=False)


def test_points_share_stages_and_a_stopped_sweep_goes_on(folder):
    stopped = Starts({2: Stopped(signal.SIGTERM)})
    with pytest.raises(Stopped):
        swept(folder, stopped)
    # lora.r changes nothing before training: the first run has built what the second point reads
    same = "same as render.max_length_tokens=100 lora.r=2"
    assert [r.status for r in stopped.results] == ["done", same, "not run", "not run"]
    rest = Starts()
    planned, results, store = swept(folder, rest)
    assert (len(stopped.calls), len(rest.calls)) == (2, 1)
    assert [len(folders(folder, stage)) for stage in ("ingest", "dedup", "split", "render")] == [1, 1, 1, 2]
    assert results[0].value == results[1].value
    again = Starts()
    assert swept(folder, again)[1] == results and again.calls == []
    value = sweeps.as_json(planned, results)
    assert {frozenset(run["values"].items()) for run in value["runs"]} == {
        frozenset({("render.max_length_tokens", length), ("lora.r", r)}) for length in (100, 128) for r in (2, 4)
    }
    page = sweep_page.write_page(store, planned, results, "finetune run small.yaml").read_text()
    assert all(r.point.recipe.name in page for r in results) and page.count('class="whisker"') == 4
    assert "4 of 4 runs have render.tokens (higher is better)" in page and "<svg" in page
    best = max(run["value"] for run in value["runs"])
    assert next(run["value"] for run in value["runs"] if run["name"] == value["best"]) == best


def test_a_point_that_fails_does_not_stop_the_others_and_is_named(folder):
    starts = Starts({1: GateRefused.exit_status})
    with pytest.raises(FinetuneError, match=r"1 of 2 runs have no .*: seed=0 \(failed with status 3\)"):
        swept(folder, starts, grid=["seed=[0, 1]"])
    assert [r.status for r in starts.results] == ["failed with status 3", "done"]


def test_wrong_input_stops_the_sweep(folder):
    starts = Starts({1: InputError.exit_status})
    with pytest.raises(InputError, match="the run was refused"):
        swept(folder, starts)
    assert len(starts.calls) == 1


def test_the_next_command_names_roots_and_processes(folder, monkeypatch):
    monkeypatch.setattr(launch, "run_alone", Starts())
    monkeypatch.chdir(folder)
    command = ["sweep", "small.yaml", "--grid", "seed=[1]", "--metric", "render.tokens"]
    assert "next  finetune run small.yaml --set=seed=1\n" in CliRunner().invoke(app, command).stdout
    command += ["--processes", "2", "--artifacts", "my rows", "--scratch", "scratch"]
    shown = CliRunner().invoke(app, command, catch_exceptions=False).stdout
    assert f"next  finetune run small.yaml --set=seed=1 --processes 2 --artifacts '{folder}/my rows'\n" in shown


def test_an_unknown_metric_lists_the_numbers_of_its_stage(folder):
    with pytest.raises(InputError, match=r"render has no such number; it has share\.kept, tokens\. Finished"):
        swept(folder, Starts(), metric="render.token")


@pytest.mark.parametrize("odd", [None, float("inf"), float("nan")])
def test_a_point_without_the_number_does_not_stop_the_others_wherever_it_is(folder, monkeypatch, odd):
    for value, grid in ((100, [100, 128]), (128, [100, 128])):

        def diverged(spec, inputs, folder, ctx, value=value):
            metrics = stub(spec, inputs, folder, ctx)
            return metrics | {"tokens": odd} if metrics["tokens"] == value else metrics

        monkeypatch.setattr(
            runner, "STAGES", tuple(dataclasses.replace(s, run=diverged, version=value) for s in runner.STAGES)
        )
        for calls in (2, 0):
            starts = Starts()
            with pytest.raises(FinetuneError, match=rf"1 of 2 runs have no .*={value} \(no such number\)"):
                swept(folder, starts, grid=[f"render.max_length_tokens={grid}"])
            assert len(starts.calls) == calls
        assert [r.status for r in starts.results].count("done") == 1


def test_no_section_in_a_stages_key_is_refused_in_a_grid(folder):
    """Each of the sections that a grid refuses reaches no stage's spec, other sections do."""
    recipe = load_recipe(str(folder / "small.yaml"), [], folder / "artifacts").recipe
    for section in sweeps.KEYLESS:
        changed = recipe.model_copy(update={section: object()})
        assert all(s.spec(changed) == s.spec(recipe) for s in runner.STAGES), section
