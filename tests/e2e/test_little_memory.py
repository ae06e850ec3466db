"""Memory that runs out in dedup, merge or export: one sentence, nothing half-written, and the same command goes on."""

import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import EVERY_STAGE, Workspace
from tests.e2e.forked import alive, committed, state
from tests.e2e.forked import forked as forked

resource = pytest.importorskip("resource")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="limits memory by RLIMIT_DATA")]
MEGABYTES = (16, 33, 40)  # the first is under what every stage asks for at its beginning
BEFORE = {"dedup": "embed", "merge": "certify", "export": "merge"}


def run_in(megabytes, stage, forked, work):
    """Run until `stage`; from its beginning on the process may have so much more memory. Its status and its words."""
    pid = forked.start(work, "--until", stage, stop_at=f"{stage} …", OMP_NUM_THREADS="1")
    while state(pid) != "T":
        assert alive(pid), (work.folder / "log").read_text()
        time.sleep(0.01)
    used = int(Path(f"/proc/{pid}/statm").read_text().split()[5]) * resource.getpagesize()
    limit = used + int(megabytes * 1e6)
    resource.prlimit(pid, resource.RLIMIT_DATA, (limit, limit))
    os.kill(pid, signal.SIGCONT)
    return forked.wait(pid), (work.folder / "log").read_text()


@pytest.mark.parametrize("stage", sorted(BEFORE))
def test_a_stage_whose_memory_runs_out_says_so_and_goes_on_later(stage, forked, pristine_whole, whole, tmp_path):
    assert re.search(r"^export:", EVERY_STAGE, re.M)
    work = Workspace(shutil.copytree(pristine_whole.folder, tmp_path / "work"))
    assert forked.wait(forked.start(work, "--until", BEFORE[stage])) == 0
    before = committed(work)
    for megabytes in MEGABYTES:
        status, said = run_in(megabytes, stage, forked, work)
        assert status == 1 or (status == 0 and megabytes != MEGABYTES[0]), (status, said)
        if status == 0:
            break
        assert said.count(f"{stage}: no memory is left") == 1 and "Traceback" not in said, said
        assert committed(work) == before
    assert forked.wait(forked.start(work, "--until", stage)) == 0
    done = {key: digest for key, digest in committed(work).items() if key not in before}
    assert {name for name, _ in done} == {stage}
    assert done.items() <= committed(whole).items()
