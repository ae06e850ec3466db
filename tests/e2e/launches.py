"""Starting a workspace's recipe in several processes, in each of the ways a person can."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.e2e.conftest import ROOT

TRAIN = ("--until", "train")
NO_DROPOUT = ("--set", "lora.dropout=0", *TRAIN)  # each process draws its own dropout
CONFIGS = ROOT / "recipes" / "accelerate"


def ours(work, processes, *arguments):
    return work.command("run", "small.yaml", "--processes", processes, *arguments)


def accelerate(work, processes, *arguments, options=(), config="multi_cpu"):
    launcher = Path(sys.executable).parent / "accelerate"
    command = [launcher, "launch", "--config_file", CONFIGS / f"{config}.yaml", "--num_processes", processes, *options]
    return list(map(str, [*command, *work.command("run", "small.yaml", *arguments)[1:]]))


def begin(work, command, **more):
    return subprocess.Popen(
        command, env=work.environment(PYTHONFAULTHANDLER="1", **more), cwd=work.folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def finish(work, command, status=0, seconds=240, **more):
    """The output of a launch that must end with `status`."""
    process = begin(work, command, **more)
    (text,) = outputs([process], seconds)
    assert process.returncode == status, f"{process.returncode}\n{text}"
    return text


def outputs(processes, seconds=240):
    """What each of several launches printed by its end; one that stands still is made to say where, and fails."""
    deadline = time.monotonic() + seconds
    standing = []
    for process in processes:
        try:
            process.communicate(timeout=max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            standing.append(process)
    for process in standing:
        family = [*psutil.Process(process.pid).children(recursive=True), process]
        for number in (signal.SIGABRT, signal.SIGKILL):  # at the first, faulthandler prints every thread's stack
            for member in family:
                with contextlib.suppress(psutil.Error):
                    member.send_signal(number)
            time.sleep(2)
    texts = [p.communicate()[0] for p in processes]
    assert not standing, "\n".join(["stood still:", *texts])
    return texts


def steps_taken(work):
    return sum(len(p.read_text().splitlines()) for p in work.folder.glob("artifacts/train/*/metrics.jsonl"))


def wait_until(condition, process, seconds=120):
    """Until `condition()`; fails with the output when the launch ended first."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0] or "it ended"
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


def rank_of(process, rank):
    """The process id of one rank of a launch."""
    for child in psutil.Process(process.pid).children(recursive=True):
        if child.environ().get("RANK") == str(rank):
            return child.pid
    raise AssertionError(f"no rank {rank}")


def alive(pids):
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def kill(pid, number=signal.SIGKILL):
    os.kill(pid, number)


def adapter(work):
    return Path(work.show()["stages"]["train"]["path"]) / "adapter" / "adapter_model.safetensors"


def complete(work):
    """The numbers of the checkpoints that carry the marker."""
    found = work.folder.glob("artifacts/train/*/checkpoints/checkpoint-*/COMPLETE")
    return sorted(int(p.parent.name.rpartition("-")[2]) for p in found)
