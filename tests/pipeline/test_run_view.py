"""Which run a command uses; the list of runs and their removal. Runs are made by hand."""

import itertools
import json
import os
import random

import pytest
from typer.testing import CliRunner

from finetune.cli import runs as cli_runs
from finetune.cli.main import app
from finetune.cli.runs import remove_runs, unused
from finetune.errors import InputError
from finetune.pipeline import preflight, run_view
from finetune.pipeline.runner import Step
from finetune.pipeline.runs import latest_run, run_folders
from finetune.pipeline.stage_list import STAGES, needs_of, spec_of, stage_named
from finetune.pipeline.store import Manifest, Store
from finetune.recipe import Recipe
from finetune.recipe.keys import key_form

BASE_TRAIN = ("base", "train")


def name_of(second):
    return f"20260102T0304{second:02d}Z-01234567"


class Made:
    """Runs of the recipe `made`; a stage marked done has a committed folder with one file."""

    def __init__(self, root):
        self.store = Store(root / "artifacts", root / "scratch")

    def run(self, second, recipe="made", key="a", **statuses):
        stages = {}
        for stage, status in statuses.items():
            folder = self.store.folder(stage, f"{stage}{key:0<20}", large=stage == "merge")
            if status == "done" and self.store.find(folder) is None:
                folder.mkdir(parents=True)
                (folder / "x").write_bytes(b"12345")
                files = self.store.read_files(folder, {})
                made = Manifest(
                    stage=stage, version=1, key=stage, spec={}, fingerprint={}, inputs={}, files=files, digest="0",
                    metrics={}, seconds=1.0, peak_memory_bytes=1, environment={},
                )  # fmt: skip
                self.store.commit(folder, made)
            done = status == "done"
            stages[stage] = {
                "status": status, "path": None, "key": f"{stage}{key:0<20}", "seconds": 1.0 if done else None,
                "metrics": {"perplexity_base": 4.0, "perplexity_adapter": 2.5} if stage == "evaluate" and done else {},
            }  # fmt: skip
        folder = self.store.artifacts / "runs" / recipe / name_of(second)
        folder.mkdir(parents=True)
        value = {"recipe": recipe, "run": folder.name, "sets": [], "stages": stages}
        (folder / "run.json").write_text(json.dumps(value))
        (folder.parent / "latest").write_text(folder.name + "\n")
        return folder


@pytest.fixture
def made(tmp_path):
    return Made(tmp_path)


@pytest.mark.parametrize(
    "attempt",
    [
        {"base": "failed"},
        {"base": "done", "train": "failed"},
        {"base": "done", "train": "partial"},
        {"base": "done", "train": "done", "certify": "refused"},  # trained, but not a finished run
    ],
)
def test_a_failed_attempt_does_not_hide_a_finished_run(made, attempt):
    made.run(1, base="done", train="done")
    made.run(2, base="done", train="done", evaluate="done", certify="done", merge="done")
    made.run(3, key="b", **attempt)
    said = []
    value = run_view.finished(made.store, "made", lambda _: BASE_TRAIN, said.append)
    assert value["run"] == name_of(2)
    assert name_of(3) in said[0] and f"using made@{name_of(2)}" in said[0]
    assert run_view.finished(made.store, f"made@{name_of(3)}", lambda _: BASE_TRAIN)["run"] == name_of(3)
    newest = run_view.read(made.store, "made")
    assert newest["run"] == name_of(3)  # `show`
    assert f"made@{name_of(2)}" in run_view.newer_than_finished(made.store, newest, "made")


def test_the_newest_run_is_used_without_a_word_if_it_has_what_is_needed(made):
    made.run(1, base="done", train="done")
    made.run(2, base="done", train="done", merge="off")
    said = []
    assert run_view.finished(made.store, "made", lambda _: BASE_TRAIN, said.append)["run"] == name_of(2)
    assert said == []
    assert run_view.newer_than_finished(made.store, run_view.read(made.store, "made"), "made") == ""


def test_a_run_without_what_is_needed_is_passed_over(made):
    made.run(1, base="done", train="done", merge="done")
    made.run(2, base="done", train="done")  # --until train
    said = []
    assert run_view.finished(made.store, "made", lambda _: ("merge",), said.append)["run"] == name_of(1)
    assert "until train" in said[0]
    assert run_view.finished(made.store, "made", lambda _: BASE_TRAIN)["run"] == name_of(2)


def test_without_a_finished_run_the_newest_with_what_is_needed_is_used(made):
    made.run(1, base="done", train="done", certify="refused")
    made.run(2, key="b", base="failed")
    assert run_view.finished(made.store, "made", lambda _: BASE_TRAIN)["run"] == name_of(1)
    assert run_view.finished(made.store, "made", lambda _: ("merge",))["run"] == name_of(2)


def test_a_torn_record_is_passed_over_and_named(made):
    made.run(1, base="done", train="done")
    (made.run(2, base="done", train="done") / "run.json").write_text('{"rec')
    said = []
    assert run_view.finished(made.store, "made", lambda _: BASE_TRAIN, said.append)["run"] == name_of(1)
    assert any("truncated or edited" in line for line in said)


def test_every_run_is_listed_with_status_perplexity_and_bytes(made):
    made.run(1, base="done", train="done", evaluate="done")
    made.run(2, key="b", base="failed")
    made.run(1, recipe="other", base="done")
    lines = {(line["recipe"], line["run"]): line for line in cli_runs.list_runs(made.store)}
    assert len(lines) == 3
    whole = lines["made", name_of(1)]
    assert whole["status"] == "until evaluate" and whole["perplexity_adapter"] == 2.5 and whole["bytes"] > 15
    assert whole["time"] == "2026-01-02T03:04:01Z"
    assert lines["made", name_of(2)]["status"] == "failed in base"
    roots = ["--artifacts", str(made.store.artifacts), "--scratch", str(made.store.scratch)]
    shown = CliRunner().invoke(app, ["runs", "made", "--json", *roots])
    assert {line["run"] for line in json.loads(shown.stdout)} == {name_of(1), name_of(2)}
    with pytest.raises(InputError, match="has not run yet"):
        cli_runs.list_runs(made.store, "nothing")


def test_a_removed_run_leaves_what_others_use(made):
    made.run(1, base="done", train="done")
    made.run(2, base="done", key="a", train="done", merge="done")
    before = {u.folder for u in unused(made.store, 1)}
    assert remove_runs([f"made@{name_of(2)}"], made.store)[0].endswith(f"the newest run left is made@{name_of(1)}")
    parent = made.store.artifacts / "runs" / "made"
    assert latest_run(parent).name == name_of(1) and [f.name for f in run_folders(parent)] == [name_of(1)]
    gone = {u.folder for u in unused(made.store, 1)} - before
    assert [f.parent.name for f in gone] == ["merge"]  # left for `clean`; base and train are used by the first run
    assert remove_runs([name_of(1)], made.store)[0].endswith("made has no run left")
    assert not parent.exists()


@pytest.mark.parametrize("seed", range(6))
def test_clean_keeps_every_run_that_a_command_chooses(made, seed):
    """Whatever the needs of a command are, the run it uses before `clean` is there after it; its stages as well."""
    chance = random.Random(seed)
    for second in range(1, 8):
        ways = {stage: chance.choice(("done", "done", "off", "failed", "missing")) for stage in ("train", "merge")}
        made.run(second, key="abcdefgh"[second], base="done", render=chance.choice(("done", "partial")), **ways)
    needs = [set(c) for n in range(4) for c in itertools.combinations(("base", "train", "merge", "render"), n)]
    before = [run_view.finished(made.store, "made", lambda _, n=n: n) for n in needs]
    listed = unused(made.store, 1)
    assert listed
    cli_runs.remove(made.store, listed)
    for asked, was in zip(needs, before, strict=True):
        now = run_view.finished(made.store, "made", lambda _, n=asked: n)
        if all(was["stages"][stage]["status"] == "done" for stage in asked):
            assert (now["run"], now["stages"]) == (was["run"], was["stages"])


def test_clean_drops_an_earlier_run_of_the_same_stages_and_keeps_it_for_a_failed_one(made):
    old = made.run(1, key="b", base="done", train="done", merge="done")
    assert old not in {u.folder for u in unused(made.store, 1)}
    made.run(2, key="c", base="done", train="failed")
    made.run(3, key="d", base="done", train="done", merge="refused")
    assert old not in {u.folder for u in unused(made.store, 1)}
    made.run(4, key="e", base="done", train="done", merge="done", export="off")
    gone = {u.folder for u in unused(made.store, 1)}
    assert {old, made.store.folder("merge", f"merge{'b':0<20}", large=True)} <= gone
    assert old not in {u.folder for u in unused(made.store, 4)}


def swept(made, name, at, points):
    """Write the results of a sweep, as sweep_page does; points are digests and seconds."""
    for digest, second in points.items():
        if not (made.store.artifacts / "runs" / f"made-sweep-{digest}").exists():
            made.run(second, recipe=f"made-sweep-{digest}", key=digest, base="done", train="done")
    path = made.store.artifacts / "sweeps" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    value = {"recipe": "made", "runs": [{"name": f"made-sweep-{digest}"} for digest in points]}
    path.write_text(json.dumps(value))
    os.utime(path, (at, at))
    return path


def test_clean_frees_figures_that_waited_for_a_judge_of_no_kept_run(made):
    made.run(1, base="done", train="done", evaluate="failed")
    kept = made.store.folder("evaluate", f"evaluate{'a':0<20}").name
    files = [made.store.scratch / f"evaluate-{key}.json" for key in (kept, "0123456789abcdef")]
    made.store.scratch.mkdir(exist_ok=True)
    for file in files:
        file.write_text("{}")
    assert [(u.folder, u.bytes) for u in unused(made.store, 1)] == [(files[1], 2)]
    assert cli_runs.remove(made.store, unused(made.store, 1)) == 2 and files[0].exists() and not files[1].exists()


def test_clean_frees_all_sweeps_of_a_recipe_but_the_newest(made):
    made.run(1, key="a", base="done", train="done")
    swept(made, "made-1", 1000, {"0000000a": 2, "0000000b": 3})
    swept(made, "made-2", 2000, {"0000000b": 3, "0000000c": 4})
    gone = {u.folder for u in unused(made.store, 1)}
    runs = made.store.artifacts / "runs"
    assert gone == {
        runs / "made-sweep-0000000a" / name_of(2), *(made.store.folder(s, f"{s}{'0000000a':0<20}") for s in BASE_TRAIN)
    }  # fmt: skip
    assert unused(made.store, 2) == []
    with made.store.lease(runs / "made-sweep-0000000a" / name_of(2), lambda line: None, lambda: None):
        assert unused(made.store, 1) == []


@pytest.mark.parametrize("content", ["{", "[]", '{"recipe": "made", "runs": [{"name": "made"}]}'])
def test_a_file_of_a_sweep_that_is_damaged_or_names_other_runs_frees_nothing(made, content):
    made.run(1, key="a", base="done", train="done")
    swept(made, "made-1", 1000, {"0000000a": 2})
    swept(made, "made-2", 3000, {"0000000c": 4})
    damaged = swept(made, "made-0", 500, {})
    damaged.write_text(content)
    os.utime(damaged, (500, 500))
    gone = {u.folder.parent.name for u in unused(made.store, 1)}
    assert "made" not in gone and ("made-sweep-0000000a" in gone) == content.endswith("]}")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("made", "is a recipe; name one of its runs"),
        ("made@nothing", "no run 'nothing'"),
        ("made@../../../secret", "not the name"),
        ("../runs/made@" + name_of(1), "not the name"),
        ("..@made", "not the name"),
        ("gone", "no run 'gone'"),
        ("@" + name_of(1), "no run"),
    ],
)
def test_a_name_that_is_no_run_removes_nothing(made, tmp_path, name, words):
    made.run(1, base="done")
    (tmp_path / "secret").mkdir()
    with pytest.raises(InputError, match=words):
        remove_runs([f"made@{name_of(1)}", name], made.store)
    assert (made.store.artifacts / "runs" / "made" / name_of(1) / "run.json").exists()


def test_no_symbolic_link_is_followed_out_of_the_root(made, tmp_path):
    folder = made.run(1, base="done")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").write_text("x")
    (folder / "link").symlink_to(outside)
    elsewhere = tmp_path / "elsewhere" / name_of(2)
    elsewhere.mkdir(parents=True)
    (elsewhere / "run.json").write_text((folder / "run.json").read_text())
    (folder.parent / name_of(2)).symlink_to(elsewhere)
    (made.store.artifacts / "runs" / "whole").symlink_to(elsewhere.parent)
    for name in (f"made@{name_of(2)}", f"whole@{name_of(2)}"):
        with pytest.raises(InputError, match="link to"):
            remove_runs([name], made.store)
    (made.store.artifacts / "runs" / "whole").unlink()
    (folder.parent / name_of(2)).unlink()
    with pytest.raises(InputError, match="link to"):
        remove_runs([f"made@{name_of(1)}"], made.store)
    (folder / "link").unlink()
    remove_runs([f"made@{name_of(1)}"], made.store)
    assert (outside / "keep").exists() and (elsewhere / "run.json").exists() and not folder.exists()


def test_a_run_in_progress_is_not_removed(made):
    folder = made.run(1, base="done")
    with made.store.lease(folder, lambda line: None, lambda: None), pytest.raises(InputError, match="is running"):
        remove_runs([f"made@{name_of(1)}"], made.store)
    assert (folder / "run.json").exists()


# --- more epochs, and recipes without rows


def recipe_with(**sections):
    raw = {"name": "made", "model": "builtin:tiny-mistral", "data": [{"source": "pydoc"}], **sections}
    return Recipe.model_validate({k: v for k, v in raw.items() if v is not ...})


@pytest.mark.parametrize(
    ("was", "now", "told"),
    [
        ({"epochs": 1}, {"epochs": 3}, "train.epochs was 1.0, is 3.0"),
        ({"max_steps": 10}, {"max_steps": 20}, "train.max_steps was 10, is 20"),
        ({"epochs": 3}, {"epochs": 1}, None),
        ({"epochs": 1}, {"epochs": 1, "learning_rate": 1e-5}, None),
    ],
)
def test_more_epochs_say_that_training_begins_again_and_name_the_other_way(made, was, now, told):
    done = made.run(1, train="done")
    folder = next((made.store.artifacts / "train").iterdir())
    manifest = made.store.find(folder)
    spec = key_form(stage_named("train").spec(recipe_with(train=was)))
    made.store.commit(folder, manifest.model_copy(update={"spec": spec}))
    asked = recipe_with(train=now)
    step = Step(stage_named("train"), "missing", stage_named("train").spec(asked))
    line = preflight.more_epochs(asked, [step], made.store)
    assert (line is None) == (told is None)
    if told:
        assert told in line and f"lora.start_from: made@{done.name}" in line
    other = recipe_with(train=now, lora={"r": 4})  # another adapter could not be gone on with
    step = Step(stage_named("train"), "missing", stage_named("train").spec(other))
    assert preflight.more_epochs(other, [step], made.store) is None
    assert preflight.more_epochs(asked, [Step(stage_named("train"), "done")], made.store) is None
    assert preflight.more_epochs(asked, [step], Store(made.store.artifacts / "none", made.store.scratch)) is None


def test_every_stage_is_given_its_needs_but_in_a_recipe_without_rows():
    whole = recipe_with(filter=None, dedup=None, sample=None, split=None, evaluate=None, pack=None, certify=None)
    for stage in STAGES:
        assert needs_of(stage, whole) == tuple(need for need in stage.needs if need != "generate")  # passes nothing on
    bare = recipe_with(data=..., lora={"start_from": "./adapter"}, train=None)
    found = {stage.name: needs_of(stage, bare) for stage in STAGES if spec_of(stage, bare) is not None}
    assert found == {"base": (), "train": ("base",), "merge": ("certify", "train", "base")}


def test_a_run_is_named_by_recipe_or_by_recipe_and_run(made):
    made.run(1, base="done", train="done")
    (made.store.artifacts / "runs" / "made" / name_of(1) / "recipe.yaml").write_text("")
    for name, words in (("made", name_of(1)), (f"made@{name_of(1)}", name_of(1))):
        found = run_view.with_start(recipe_with(name="next", lora={"start_from": name}), made.store)
        assert found.lora.start_folder.parent.parent.name == "train" and words
        assert run_view.with_start(found, made.store) is found
    made.run(2, key="b", base="done", train="failed")
    found = run_view.with_start(recipe_with(name="next", lora={"start_from": "made"}), made.store)
    assert "made" in str(found.lora.start_from) and found.lora.start_folder.is_relative_to(made.store.artifacts)
    for name, words in (("other", "has not run yet"), (f"made@{name_of(2)}", "train of made"), ("made@x", "no run")):
        with pytest.raises(InputError, match=words):
            run_view.with_start(recipe_with(name="next", lora={"start_from": name}), made.store)
