"""A real run, killed over and over at random moments of every stage, ends with the bytes of one that was let alone."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from finetune.pipeline import STAGE_NAMES
from finetune.store import Store
from tests.e2e.conftest import Workspace

pytestmark = pytest.mark.slow
KILLS = 54
MOST_CHAINS = 40
SIGNALS = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
EXITS = {signal.SIGKILL: {-9}, signal.SIGTERM: {143}, signal.SIGINT: {130}, signal.SIGHUP: {129}}


class Forked:
    """Runs in one workspace after another, without importing torch for each."""

    def __init__(self, environment):
        command = [sys.executable, str(Path(__file__).parent / "fork_server.py")]
        self.server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, **request):
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, work, *sets):
        (work.folder / "log").unlink(missing_ok=True)
        arguments = ["run", str(work.recipe), *sets, "--artifacts", str(work.folder / "artifacts")]
        arguments += ["--scratch", str(work.folder / "scratch")]
        return self.ask(start=arguments, log=str(work.folder / "log"))["pid"]

    def wait(self, pid):
        return self.ask(wait=pid)["status"]


@pytest.fixture(scope="module")
def forked(pristine):
    server = Forked(pristine.environment())
    yield server
    server.server.stdin.close()
    server.server.wait()


def committed(work):
    """Every complete stage folder, as (stage, key): its output's digest. Fails where one is not what it says."""
    store = Store(work.folder / "artifacts", work.folder / "scratch")
    found = {}
    for path in [*store.artifacts.glob("*/*/manifest.json"), *store.scratch.glob("*/*/manifest.json")]:
        manifest = store.find(path.parent)
        assert manifest is not None, f"{path} is there, but its folder is not complete"
        assert store.verify(path.parent, manifest) == []
        found[manifest.stage, manifest.key] = manifest.digest
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def begun(work, stage):
    log = work.folder / "log"
    return log.exists() and f"{stage} …" in log.read_text()


def kill_in(forked, work, stage, delay, number):
    """Start a run, signal it `delay` seconds into `stage`; returns (whether it was alive then, its exit status)."""
    pid = forked.start(work)
    while alive(pid) and not begun(work, stage):
        time.sleep(0.002)
    time.sleep(delay)
    was_alive = alive(pid)
    os.kill(pid, number)
    sent = time.monotonic()
    status = forked.wait(pid)
    if was_alive:
        assert time.monotonic() - sent < 30
    return was_alive, status


def stage_seconds(forked, pristine, folder):
    """How long each stage takes in a process whose libraries are imported already."""
    work = Workspace(folder)
    shutil.copytree(pristine.folder, folder)
    assert forked.wait(forked.start(work)) == 0, (folder / "log").read_text()
    return {stage: s["seconds"] for stage, s in work.show()["stages"].items() if s["status"] == "done"}


def unharmed(seconds, tally):
    """Stages that no signal has come into yet; pack, of milliseconds, may be missed."""
    return [stage for stage in seconds if stage not in tally and stage != "pack"]


def test_more_than_fifty_kills_at_random_points_lose_nothing(forked, pristine, finished, tmp_path):
    chance = random.Random(20261123)
    expected = committed(finished)
    seconds = stage_seconds(forked, pristine, tmp_path / "whole")
    tally, left_by, chain = Counter(), Counter(), 0
    while sum(tally.values()) < KILLS or (unharmed(seconds, tally) and chain < MOST_CHAINS):
        chain += 1
        work = Workspace(tmp_path / str(chain))
        shutil.copytree(pristine.folder, work.folder)
        for stage in seconds if sum(tally.values()) < KILLS else unharmed(seconds, tally):
            for _ in range(chance.choice([1, 1, 2])):
                if any(work.folder.glob(f"*/{stage}/*/manifest.json")):
                    break  # an earlier run got further than the stage it was to die in
                number = chance.choice(SIGNALS)
                hit, status = kill_in(forked, work, stage, chance.uniform(0, seconds[stage]), number)
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
    assert set(STAGE_NAMES) >= set(tally) and not unharmed(seconds, tally)


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
