"""Artifacts on a file system that can do little (a mounted Drive), under a long unicode path, by a clock that jumps."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import Workspace
from tests.e2e.test_pipeline import outputs

LONG = "a räther lông näme 日本語 " + "x" * 160 + " end"


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    source = Path(__file__).parent / "shim.c"
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to build the shim with")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


def test_the_shim_refuses_what_it_says(shim, tmp_path):
    """Without this the next test could pass because nothing was refused at all."""
    code = (
        "import fcntl, os, struct, time\n"
        "def tried(f):\n"
        "    try: f(); return 'done'\n"
        "    except OSError as e: return e.strerror\n"
        "os.mkdir('d'); f = os.open('f', os.O_RDWR | os.O_CREAT)\n"
        "lock = struct.pack('hhqqi', fcntl.F_WRLCK, 0, 0, 0, 0)\n"
        "print(tried(lambda: os.symlink('f', 's')), tried(lambda: os.link('f', 'l')), "
        "tried(lambda: fcntl.flock(f, fcntl.LOCK_EX)), tried(lambda: fcntl.lockf(f, fcntl.LOCK_EX)), "
        "tried(lambda: os.lockf(f, os.F_LOCK, 0)), tried(lambda: fcntl.fcntl(f, fcntl.F_OFD_SETLK, lock)), "
        "tried(lambda: os.rename('d', 'e')), tried(lambda: os.replace('f', 'g')), sep='\\n')\n"
        "print(fcntl.fcntl(f, fcntl.F_GETFL) & os.O_RDWR == os.O_RDWR)\n"  # other commands go through
        "a = time.time(); time.sleep(1.0); print(abs(time.time() - a) > 80000)\n"
    )
    log = tmp_path.parent / "refused"
    env = {"LD_PRELOAD": str(shim), "SHIM_ROOT": str(tmp_path), "SHIM_CLOCK": "1", "SHIM_LOG": str(log)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["Operation not supported"] * 7 + ["done", "True", "True"]
    logged = ["symlink", "link", "flock", "fcntl", "lockf", "fcntl", "rename of a folder", "rename of a file"]
    assert log.read_text().splitlines() == logged


@pytest.mark.slow
def test_a_run_needs_no_links_locks_or_folder_renames_and_no_steady_clock(shim, pristine, finished, tmp_path):
    folder = tmp_path / LONG
    assert len(LONG.encode()) > 180
    shutil.copytree(pristine.folder, folder)
    work = Workspace(folder)
    log = tmp_path / "calls"
    settings = {
        "LD_PRELOAD": str(shim),
        "SHIM_ROOT": str(folder / "artifacts"),
        "SHIM_CLOCK": "1",
        "SHIM_LOG": str(log),
    }
    process = work.start("run", "small.yaml", **settings)
    while process.poll() is None and not any(folder.glob("artifacts/train/*/checkpoints/checkpoint-4/COMPLETE")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = work.run("run", "small.yaml", **settings)
    assert "goes on from checkpoint-4" in done.stderr
    work.run("show", "small", "--verify", **settings)
    again = work.run("run", "small.yaml", **settings)
    assert "…" not in again.stderr
    assert outputs(work) == outputs(finished)
    work.run("clean", "--yes", **settings)
    assert work.show()["stages"]["merge"]["status"] == "done"
    # The runs went through the shim, which let every rename of a file pass; and nothing it refuses was even tried.
    assert set(log.read_text().splitlines()) == {"rename of a file"}
