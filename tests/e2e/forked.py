"""Runs in forked processes of one server, and what can be seen of them from outside."""

import atexit
import functools
import json
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

    def run(self, command, folder, **environment):
        """A `subprocess.CompletedProcess` of [python, -m, finetune, …] run in `folder`."""
        with tempfile.TemporaryDirectory() as outputs:
            out, err = Path(outputs, "out"), Path(outputs, "err")
            asked = {"start": command[3:], "log": str(out), "said": str(err), "folder": str(folder)}
            status = self.wait(self.ask(**asked, environment=environment)["pid"])
            return subprocess.CompletedProcess(command, status, out.read_text(), err.read_text())


@functools.cache
def shared():
    """The server of all tests of this process that ask for no environment of their own."""
    server = Forked(Workspace(Path(tempfile.mkdtemp())).environment())
    atexit.register(server.server.communicate)  # which closes its stdin
    return server


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
