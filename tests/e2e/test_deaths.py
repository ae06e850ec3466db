"""A real run, killed over and over at random moments of every stage, ends with the bytes of one that was let alone."""

import contextlib
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter

import psutil
import pytest

from finetune.pipeline.stage_list import STAGE_NAMES
from tests.e2e import launches
from tests.e2e.conftest import Workspace
from tests.e2e.forked import alive, begun, committed, state, undisturbed
from tests.e2e.forked import forked as forked

pytestmark = pytest.mark.slow
MOST_CHAINS = 40
KILLS = 54
QUICK = 0.3  # seconds of a stage that a signal sent by the log can come too late for
SIGNALS = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
EXITS = {signal.SIGKILL: {-9}, signal.SIGTERM: {143}, signal.SIGINT: {130}, signal.SIGHUP: {129}}


def kill_in(forked, work, stage, delay, number):
    """Start a run, signal it `delay` seconds into `stage`, or, with None, where it begins; returns (whether it was
    alive then, its exit status).
    """
    pid = forked.start(work, stop_at=f"{stage} …" if delay is None else None)
    while alive(pid) and not (begun(work, stage) if delay is not None else state(pid) == "T"):
        time.sleep(0.002)
    time.sleep(delay or 0)
    was_alive = alive(pid)
    os.kill(pid, number)
    if was_alive and delay is None:
        os.kill(pid, signal.SIGCONT)
    sent = time.monotonic()
    status = forked.wait(pid)
    if was_alive:
        assert time.monotonic() - sent < 30
    return was_alive, status


def test_more_than_fifty_kills_in_every_stage_lose_nothing(forked, pristine_whole, whole, tmp_path):
    chance = random.Random(20261123)
    expected = committed(whole)
    seconds = {stage: s["seconds"] for stage, s in whole.show()["stages"].items() if stage in STAGE_NAMES}
    assert tuple(seconds) == STAGE_NAMES
    tally, left_by, chain = Counter(), Counter(), 0
    while not (enough := sum(tally.values()) >= KILLS) or set(tally) != set(STAGE_NAMES):
        chain += 1
        assert chain < MOST_CHAINS, f"no signal came into {set(STAGE_NAMES) - set(tally)}"
        work = Workspace(tmp_path / str(chain))
        shutil.copytree(pristine_whole.folder, work.folder)
        for stage in [s for s in STAGE_NAMES if not enough or s not in tally]:
            for _ in range(chance.choice([1, 1, 2])):
                if any(work.folder.glob(f"*/{stage}/*/manifest.json")):
                    break  # an earlier run got further than the stage it was to die in
                number = chance.choice(SIGNALS)
                sure = stage not in tally and (seconds[stage] < QUICK or chain > 1)
                delay = None if sure else chance.uniform(0, seconds[stage])
                hit, status = kill_in(forked, work, stage, delay, number)
                text = (work.folder / "log").read_text()
                assert status in ({*EXITS[number], 0} if hit else {0}), f"{stage} {number} {status}\n{text}"
                assert "Traceback" not in text, text
                assert committed(work).items() <= expected.items()
                if status != 0:
                    tally[stage] += 1
                    left_by[number.name] += 1
        pid = forked.start(work)
        assert forked.wait(pid) == 0, (work.folder / "log").read_text()
        assert committed(work) == expected  # bitwise: adapter, merged model and everything before them
        shutil.rmtree(work.folder)
    print(f"\n{sum(tally.values())} kills: {dict(tally)}, {dict(left_by)}, {chain} runs finished")
    assert set(tally) == set(STAGE_NAMES)


# Where one run after another is killed while it writes a checkpoint → the checkpoint that the next one goes on from.
TORN = {"checkpoint-4/optimizer.pt": None, "checkpoint-4/COMPLETE": None, "checkpoint-8/optimizer.pt": 4}


def test_kills_inside_the_write_of_a_checkpoint_lose_nothing(forked, whole, tmp_path):
    """Each for sure: the run stops itself with half of the optimizer's file written, or all files but the marker."""
    work = Workspace(tmp_path / "work")
    shutil.copytree(whole.folder, work.folder)
    shutil.rmtree(work.folder / "artifacts" / "train")
    expected = committed(whole)
    for place, left in TORN.items():
        pid = forked.start(work, "--until", "train", stop_writing=place)
        while alive(pid) and state(pid) != "T":
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        assert forked.wait(pid) == -9, (work.folder / "log").read_text()
        (checkpoints,) = work.folder.glob("artifacts/train/*/checkpoints")
        torn = checkpoints / place  # the file that was being written, or was next
        assert (torn.parent / "adapter_model.safetensors").is_file() and not (torn.parent / "COMPLETE").exists()
        assert (torn.parent / "trainer_state.json").exists() == (torn.name == "COMPLETE")  # the last of all others
        assert torn.name == "COMPLETE" or torn.stat().st_size > 0
        whole_ones = {int(p.parent.name.rpartition("-")[2]) for p in checkpoints.glob("*/COMPLETE")}
        assert max(whole_ones, default=None) == left
        assert not any(work.folder.glob("artifacts/train/*/manifest.json"))
    pid = forked.start(work, "--until", "train")
    log = work.folder / "log"
    assert forked.wait(pid) == 0, log.read_text()
    assert "train: goes on from checkpoint-4 of 12 steps" in log.read_text()
    assert committed(work) == expected  # bitwise, the adapter included


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_the_same_signal_again_leaves_at_once(number, forked, pristine, tmp_path):
    statuses = []
    while -number not in statuses:  # ended by the signal itself, and not by what the first one had it do
        work = Workspace(tmp_path / f"work{len(statuses)}")
        shutil.copytree(pristine.folder, work.folder)
        pid = forked.start(work, "--set", "train.batch_rows=64")
        while alive(pid) and not any(p.read_text() for p in work.folder.glob("artifacts/train/*/metrics.jsonl")):
            time.sleep(0.002)
        os.kill(pid, number)
        while alive(pid) and "saving and stopping" not in (work.folder / "log").read_text():  # the log is there
            time.sleep(0.002)
        os.kill(pid, number)
        statuses.append(forked.wait(pid))
        assert set(statuses) <= {-number, 128 + number} and len(statuses) < 6, statuses  # saved before it came: again
    pid = forked.start(work, "--set", "train.batch_rows=64")
    assert forked.wait(pid) == 0, (work.folder / "log").read_text()


QUANTIZER = """\
#!{python} -IS
import shutil, sys, time
source, target, kind = sys.argv[1:]
open(target, "wb").write(b"half")
time.sleep(0.3)  # long enough to be found, and killed
shutil.copy(source, target)
"""
CHILDREN = ("--set", "export.gguf=[q4_k_m]", "--set", "tracking.wandb=true")
# Those that a run cannot do without: a word of the command line → the stage that ends with it, what it says, the signal
ENDS = {
    "pydoc_reader.py": (
        "ingest",
        r"the process that reads the documentation of \S+ was killed by SIGKILL \(out of memory\?\): no output",
        signal.SIGKILL,
    ),
    "template_sandbox_child.py": (
        "render",
        "the process that tries a chat template out was killed by SIGTERM; run again",
        signal.SIGTERM,
    ),
    "llama-quantize": (
        "export",
        r"llama-quantize was killed by SIGKILL \(out of memory\?\) while it made q4_k_m; run again",
        signal.SIGKILL,
    ),
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """A folder with a slow llama-quantize, and a git and a uname that are killed at once."""
    folder = tmp_path_factory.mktemp("bin")
    for name in ("git", "uname"):
        (folder / name).write_text('#!/bin/sh\n: > "$0.called"\nkill -9 $$\n')
    (folder / "llama-quantize").write_text(QUANTIZER.format(python=sys.executable))
    for path in folder.iterdir():
        path.chmod(0o755)
    return folder


def children(pid):
    try:
        return psutil.Process(pid).children()
    except psutil.Error:
        return []


def child_of(pid, word):
    """The number of the run's child whose command line holds `word`, as soon as there is one."""
    while alive(pid):
        for child in children(pid):
            with contextlib.suppress(psutil.Error):  # it has just ended
                if any(word in part for part in child.cmdline()):
                    return child.pid
        time.sleep(0.002)
    raise AssertionError(f"no {word}")


def kill_child(pid, word, number, ready=lambda: True):
    """Kill that child of a run once it is `ready`."""
    child = child_of(pid, word)
    while alive(pid) and not ready():
        time.sleep(0.002)
    os.kill(child, number)


def test_a_run_whose_children_are_killed_one_by_one_loses_nothing(forked, pristine_whole, programs, tmp_path):
    """All that a run starts but training processes (tests/e2e/test_processes.py): the reader of Python's documentation,
    the trial of a chat template, llama-quantize, W&B's process, git and uname.
    """
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    environment = {"PATH": path, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    work = Workspace(tmp_path / "work")
    shutil.copytree(pristine_whole.folder, work.folder)
    work.recipe.write_text(work.recipe.read_text().replace("data:\n", "data:\n  - {source: pydoc, take: 30}\n", 1))
    expected = committed(undisturbed(forked, work, tmp_path / "whole", *CHILDREN, **environment))
    assert {stage for stage, _ in expected} == set(STAGE_NAMES)
    for word, (stage, says, number) in ENDS.items():
        pid = forked.start(work, *CHILDREN, **environment)
        if stage == "export":  # this run trains, too, and goes on when the process that tracks it dies
            kill_child(pid, "wandb-core", signal.SIGKILL, ready=lambda: launches.steps_taken(work))
        kill_child(pid, word, number)
        status = forked.wait(pid)
        log = (work.folder / "log").read_text()
        assert status == 1 and "Traceback" not in log, log
        assert any(re.fullmatch(says, line) for line in log.splitlines()[-2:]), log  # W&B may have the last word
        assert not any(work.folder.glob(f"*/{stage}/*/manifest.json"))
        assert committed(work).items() <= expected.items()
    assert log.count("tracking: W&B failed") == 1 and "the training continues without it" in log
    pid = forked.start(work, *CHILDREN, **environment)
    assert forked.wait(pid) == 0, (work.folder / "log").read_text()
    assert committed(work) == expected
    assert {p.stem for p in programs.glob("*.called")} == {"git", "uname"}  # killed in every run, and missed by none
