"""Several runs on one artifacts folder, builders that die or stand still, and what `clean` leaves alone."""

import json
import os
import re
import shutil
import signal
import time

import pytest

from finetune.pipeline.leases import BEAT_SECONDS
from finetune.pipeline.store import Store
from tests.e2e.conftest import Workspace
from tests.e2e.forked import alive, committed
from tests.e2e.forked import forked as forked


@pytest.fixture
def work(pristine, tmp_path):
    shutil.copytree(pristine.folder, tmp_path / "work")
    return Workspace(tmp_path / "work")


def start(forked, work, log, *words):
    arguments = ["run", str(work.recipe), *words, "--artifacts", str(work.folder / "artifacts")]
    arguments += ["--scratch", str(work.folder / "scratch")]
    return forked.ask(start=arguments, log=str(work.folder / log))["pid"]


@pytest.mark.slow
def test_four_runs_of_two_recipes_build_each_stage_once(forked, work, finished):
    other = ("--set", "dedup.threshold=0.9", "--set", "train.max_steps=4")
    pids = [start(forked, work, f"log{i}", *(other if i % 2 else ())) for i in range(4)]
    statuses = [forked.wait(pid) for pid in pids]
    texts = [(work.folder / f"log{i}").read_text() for i in range(4)]
    assert statuses == [0, 0, 0, 0], texts
    lines = "\n".join(texts).splitlines()
    found = committed(work)
    for stage in {stage for stage, _ in found}:
        built = sum(line == f"{stage} …" for line in lines)
        assert built == sum(name == stage for name, _ in found), stage
    assert sum(stage == "base" for stage, _ in found) == 1
    assert sum(stage == "merge" for stage, _ in found) == 2
    assert committed(finished).items() <= found.items()
    runs = list((work.folder / "artifacts/runs/small").glob("*/run.json"))
    assert len(runs) == len({json.loads(p.read_text())["run"] for p in runs}) >= 2


def stop_between_steps(first, work):
    """Stop a builder in training, once its lease tells of a step: after a halt longer than a beat, that is at once."""

    def tells():
        return any(b'"note": "training ' in p.read_bytes() for p in work.folder.glob("artifacts/train/*/lease.*"))

    while alive(first) and not any(p.read_text() for p in work.folder.glob("artifacts/train/*/metrics.jsonl")):
        time.sleep(0.002)
    os.kill(first, signal.SIGSTOP)
    time.sleep(BEAT_SECONDS)
    os.kill(first, signal.SIGCONT)
    while alive(first) and not tells():
        time.sleep(0.002)
    os.kill(first, signal.SIGSTOP)
    assert tells(), (work.folder / "log").read_text()


@pytest.mark.slow
def test_a_builder_that_stands_still_is_waited_for_by_name_and_a_dead_one_is_replaced(forked, work):
    first = start(forked, work, "log")
    stop_between_steps(first, work)
    second = start(forked, work, "log2")
    while alive(second) and not ((log := work.folder / "log2").exists() and "waiting for" in log.read_text()):
        time.sleep(0.01)
    said = (work.folder / "log2").read_text()
    assert re.search(rf"^train: waiting for process {first} on \S+: training \d+/12\b", said, re.MULTILINE), said
    os.kill(first, signal.SIGKILL)
    assert forked.wait(first) == -9
    assert forked.wait(second) == 0, (work.folder / "log2").read_text()
    assert f"took over from process {first} on " in (work.folder / "log2").read_text()
    assert not list(work.folder.glob("artifacts/*/*/lease.*")) and not list(work.folder.glob("scratch/*/*/lease.*"))


def test_clean_leaves_alone_what_a_running_process_uses(finished, tmp_path):
    """A run that lives (a lease of this process in its folder) is older than the newest, and still keeps its stages."""
    shutil.copytree(finished.folder, tmp_path / "work")
    work = Workspace(tmp_path / "work")
    runs = work.folder / "artifacts" / "runs" / "small"
    store = Store(work.folder / "artifacts", work.folder / "scratch")
    running = next(p.parent for p in runs.glob("*/run.json"))
    newest = runs / "99990101T000000Z-00000000"
    shutil.copytree(running, newest)
    value = json.loads((newest / "run.json").read_text())
    train = work.folder / "artifacts" / "train"
    shutil.copytree(train / value["stages"]["train"]["key"][:16], train / ("0" * 16))
    value["stages"]["train"] |= {"key": "0" * 32}
    (newest / "run.json").write_text(json.dumps(value))
    (runs / "latest").write_text(newest.name)
    with store.lease(running, str, lambda: None):
        assert "nothing to clean" in work.run("clean", "--yes").stdout
    listed = work.run("clean").stdout
    assert str(running) in listed and "/train/" in listed and "nothing deleted" in listed
    shutil.rmtree(train / ("0" * 16))  # commands then use the other run again
    assert "nothing to clean" in work.run("clean", "--yes").stdout


def test_the_run_that_latest_names_stays_though_a_clock_was_set_back(finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "work")
    work = Workspace(tmp_path / "work")
    runs = work.folder / "artifacts" / "runs" / "small"
    latest = runs / (runs / "latest").read_text().strip()
    later = runs / "99990101T000000Z-00000000"
    shutil.copytree(latest, later)
    assert "nothing to clean" in work.run("clean", "--yes").stdout
    assert latest.is_dir()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"stages": 3}', '{"recipe": "small", "sets": [], "stages": {"a": 1}}']
)
def test_a_torn_record_of_a_run_is_one_sentence(content, finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "work")
    work = Workspace(tmp_path / "work")
    path = next((work.folder / "artifacts" / "runs" / "small").glob("*/run.json"))
    path.write_text(content)
    for words in (["show", "small"], ["clean"]):
        refused = work.run(*words, status=2)
        assert str(path) in refused.stderr and "remove" in refused.stderr and "Traceback" not in refused.stderr
    assert "…" not in work.run("run", "small.yaml").stderr  # the record is written anew, and nothing is built
    assert work.show()["stages"]["merge"]["status"] == "done"


@pytest.mark.slow
def test_fresh_says_which_checkpoints_it_removes(work, forked):
    pid = start(forked, work, "log", "--until", "train")
    while alive(pid) and not any(work.folder.glob("artifacts/train/*/checkpoints/checkpoint-4/COMPLETE")):
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    forked.wait(pid)
    pid = start(forked, work, "log2", "--until", "train", "--fresh")
    assert forked.wait(pid) == 0
    assert "train: --fresh removes checkpoint-4" in (work.folder / "log2").read_text()
    assert work.show()["stages"]["train"]["metrics"]["resumed_from_steps"] == 0


def test_what_an_earlier_version_of_a_stage_made_is_never_read(finished, monkeypatch):
    """Another version is another key: dedup and all that depends on it are missing, what lies before it is there."""
    import dataclasses

    from finetune.pipeline import runner
    from finetune.pipeline.stage_list import STAGES
    from finetune.recipe.load import load_recipe

    recipe = load_recipe(str(finished.recipe)).recipe
    store = Store(finished.folder / "artifacts", finished.folder / "scratch")
    newer = tuple(dataclasses.replace(s, version=99) if s.name == "dedup" else s for s in STAGES)
    assert {s.status for s in runner.plan(recipe, store)} == {"done", "off"}
    monkeypatch.setattr(runner, "STAGES", newer)
    statuses = {s.stage.name: s.status for s in runner.plan(recipe, store)}
    assert statuses["embed"] == "done" and statuses["dedup"] == "missing" and statuses["merge"] == "unknown"


def test_a_manifest_of_another_form_is_built_again(finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "work")
    work = Workspace(tmp_path / "work")
    path = next(work.folder.glob("artifacts/dedup/*/manifest.json"))
    value = json.loads(path.read_text())
    del value["digest"]
    path.write_text(json.dumps({**value, "outputs": []}))
    done = work.run("run", "small.yaml", "--until", "dedup")
    assert "dedup …" in done.stderr and committed(work) == committed(finished)
