"""A builder that stands still too long, or whose folder becomes read-only, on folders that other machines use too."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.e2e.conftest import Workspace
from tests.e2e.forked import alive, committed, undisturbed
from tests.e2e.forked import forked as forked

pytestmark = pytest.mark.slow
MACHINE = """\
import socket, sys
from finetune.pipeline import leases
host, leases.LEASE_SECONDS, leases.BEAT_SECONDS = sys.argv.pop(1), 3.0, 0.2
socket.gethostname = lambda: host
from finetune.cli.main import main
main()
"""


@pytest.fixture
def work(pristine, tmp_path):
    return Workspace(shutil.copytree(pristine.folder, tmp_path / "work"))


def start(work, host, *words, before=()):
    """A run on a machine of another name, which judges a lease by whether it moves."""
    command = [*before, sys.executable, "-P", "-c", MACHINE, host, *work.command("run", "small.yaml", *words)[3:]]
    log = (work.folder / host).open("w")
    return subprocess.Popen(command, env=work.environment(), cwd=work.folder, stdout=log, stderr=log, stdin=-3)


def said(work, host):
    return (work.folder / host).read_text()


def wait_for(condition, process):
    while alive(process.pid) and not condition():
        time.sleep(0.005)
    assert process.poll() is None


def training(work):
    return any(p.read_text() for p in work.folder.glob("artifacts/train/*/metrics.jsonl"))


def test_a_builder_that_was_stopped_leaves_what_another_machine_finished(forked, pristine, work, tmp_path):
    """SIGSTOP in training for longer than a lease lasts; the other machine goes on, and the first wakes up last."""
    expected = committed(undisturbed(forked, pristine, tmp_path / "whole", "--until", "train"))
    first = start(work, "one", "--until", "train")
    wait_for(lambda: training(work), first)
    os.kill(first.pid, signal.SIGSTOP)
    second = start(work, "two", "--until", "train")
    assert second.wait(240) == 0, said(work, "two")
    assert "took over from process" in said(work, "two")
    assert committed(work) == expected
    os.kill(first.pid, signal.SIGCONT)
    assert first.wait(120) == 1, said(work, "one")
    assert "took this folder over while this process was suspended" in said(work, "one")
    assert "Traceback" not in said(work, "one")
    assert committed(work) == expected  # and not a byte of it was written again
    again = start(work, "one", "--until", "train")
    assert again.wait(120) == 0 and "train …" not in said(work, "one")


def test_a_folder_that_becomes_read_only_in_training_is_one_sentence(forked, pristine, work, tmp_path):
    """Root may write anywhere, so the run has no such right (CAP_DAC_OVERRIDE)."""
    if shutil.which("setpriv") is None or os.geteuid() != 0:
        pytest.skip("needs root, and setpriv to give that right up")
    expected = committed(undisturbed(forked, pristine, tmp_path / "whole", "--until", "train"))
    drop = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", "--inh-caps", "-all"]
    process = start(work, "one", "--until", "train", before=drop)
    wait_for(lambda: training(work), process)
    (folder,) = work.folder.glob("artifacts/train/*/checkpoints")
    places = [p for p in (folder, *folder.rglob("*")) if p.is_dir()]
    for place in places:
        place.chmod(0o555)
    status = process.wait(120)
    text = said(work, "one")
    assert status == 1 and "Traceback" not in text, text
    line = next(line for line in text.splitlines() if "Permission denied" in line)
    assert line.startswith("train: ") and str(folder) in line and "run the same command again" in line
    assert not any(work.folder.glob("artifacts/train/*/manifest.json"))
    for place in places:
        place.chmod(0o755)
    again = start(work, "two", "--until", "train", before=drop)
    assert again.wait(240) == 0, said(work, "two")
    assert committed(work) == expected
