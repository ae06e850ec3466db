"""Memory that runs out in dedup, merge or export: one sentence, nothing half-written, and the same command goes on."""

import faulthandler
import os
import resource
import shutil
import sys
from pathlib import Path

import pytest

from finetune.errors import FinetuneError
from finetune.pipeline.store import Store
from tests.e2e.conftest import Workspace
from tests.e2e.test_full_disk import build
from tests.e2e.test_full_disk import with_room as with_room

MEGABYTES = (0.3, 2, 10)


def private_bytes():
    return int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()


def take_all_but(free):
    """What keeps this process from having more than `free` bytes: its limit, and all that its heap has free."""
    resource.setrlimit(resource.RLIMIT_DATA, (private_bytes(), private_bytes()))
    blocks, size = [], 1 << 26
    while size >= 128:
        try:
            blocks.append(bytearray(size))
        except MemoryError:
            size //= 2
    while blocks and free > 0:
        free -= len(blocks.pop(0 if len(blocks[0]) <= free else -1))
    return blocks


def build_in(megabytes, stage, workspace, store, log):
    """The exit status of a process that builds `stage` in so much more memory than it has where the stage begins."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    faulthandler.dump_traceback_later(120, exit=True)
    status, held = 99, []
    try:
        with log.open("w") as said:

            def limit(line):
                if line == f"{stage} …":
                    held.extend(take_all_but(megabytes * 1e6))

            try:
                build(workspace, store, stage, limit)
                status = 0
            except FinetuneError as error:
                held.clear()
                said.write(str(error))
                status = error.exit_status
            except BaseException as error:
                held.clear()
                said.write(f"raised {type(error).__name__}: {error}")
    finally:
        os._exit(status)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory by RLIMIT_DATA")
def test_a_stage_whose_memory_runs_out_says_so_and_goes_on_later(pristine_whole, with_room, tmp_path):
    work = Workspace(shutil.copytree(pristine_whole.folder, tmp_path / "work"))
    store, log = Store(tmp_path / "artifacts", tmp_path / "scratch"), tmp_path / "log"
    for before, stage in (("embed", "dedup"), ("certify", "merge"), (None, "export")):
        if before:
            build(work, store, before)
        refused = 0
        for megabytes in MEGABYTES:
            status = build_in(megabytes, stage, work, store, log)
            said = log.read_text()
            assert status in (0, 1), (stage, megabytes, status, said)
            if status == 0:
                break
            refused += 1
            assert said.startswith(f"{stage}: no memory is left") and "\n" not in said, said
            assert not any(tmp_path.glob(f"*/{stage}/*/manifest.json"))
        assert refused, stage
        done = build(work, store, stage)[-1]
        assert done.manifest is not None and store.verify(done.folder, done.manifest) == []
        assert (done.key, done.manifest.digest) == (with_room[stage].key, with_room[stage].digest)
