"""Runs in forked processes of one server, and what can be seen of them from outside."""

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from finetune.pipeline.store import Store
from tests.e2e.conftest import Workspace


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

    def start(self, work, *sets, stop_at=None, stop_writing=None, **environment):
        (work.folder / "log").unlink(missing_ok=True)
        arguments = ["run", str(work.recipe), *sets, "--artifacts", str(work.folder / "artifacts")]
        arguments += ["--scratch", str(work.folder / "scratch")]
        log = str(work.folder / "log")
        stops = {"stop_at": stop_at, "stop_writing": stop_writing}
        return self.ask(start=arguments, log=log, **stops, environment=environment)["pid"]

    def wait(self, pid):
        return self.ask(wait=pid)["status"]

    def run(self, command, folder, typed="", **environment):
        """A `subprocess.CompletedProcess` of [python, -m, finetune, …] run in `folder` with `typed` on stdin."""
        with tempfile.TemporaryDirectory() as outputs:
            out, err, keys = (Path(outputs, name) for name in ("out", "err", "typed"))
            keys.write_text(typed)
            asked = {"start": command[3:], "log": str(out), "said": str(err), "typed": str(keys), "folder": str(folder)}
            status = self.wait(self.ask(**asked, environment=environment)["pid"])
            return subprocess.CompletedProcess(command, status, out.read_text(), err.read_text())


@functools.cache
def shared():
    """The server of all tests of this process that ask for no environment of their own."""
    server = Forked(Workspace(Path(tempfile.mkdtemp())).environment())
    atexit.register(server.server.communicate)  # which closes its stdin
    return server


@pytest.fixture(scope="session")
def forked():
    return shared()


class Begun:
    """A forked run that is still going on, with the methods of `subprocess.Popen` that tests need."""

    def __init__(self, command, folder, **environment):
        self.log, self.returncode = Path(tempfile.mkstemp(suffix=".log", dir=folder)[1]), None
        asked = {"start": command[3:], "log": str(self.log), "folder": str(folder), "environment": environment}
        self.pid = shared().ask(**asked)["pid"]

    def poll(self):
        return None if self.returncode is None and alive(self.pid) else self.wait()

    def wait(self):
        self.returncode = shared().wait(self.pid) if self.returncode is None else self.returncode
        return self.returncode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def communicate(self):
        self.wait()
        return self.log.read_text(), None


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


def state(pid):
    """R, S, D … as ps shows it, T for a stopped process; Z for one that ended, or is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def alive(pid):
    return state(pid) not in "ZX"


def begun(work, stage):
    log = work.folder / "log"
    return log.exists() and f"{stage} …" in log.read_text()


def undisturbed(forked, pristine, folder, *sets, **environment):
    """A workspace whose recipe ran to the end in a process whose libraries were imported already."""
    work = Workspace(folder)
    shutil.copytree(pristine.folder, folder)
    assert forked.wait(forked.start(work, *sets, **environment)) == 0, (folder / "log").read_text()
    return work
