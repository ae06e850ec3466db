"""A disk that fills up while a stage writes: one sentence, nothing committed, and the same command again."""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from finetune.cli.main import main
from finetune.context import Context
from finetune.errors import FinetuneError
from finetune.pipeline import runner, runs
from finetune.pipeline.runs import Run
from finetune.pipeline.stage_list import STAGE_NAMES
from finetune.pipeline.store import Store
from finetune.recipe.load import load_recipe
from finetune.utils.files import replace_bytes
from tests.e2e.conftest import Workspace
from tests.e2e.forked import alive, committed, state, undisturbed
from tests.e2e.forked import forked as forked

ROOM = 200_000_000


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, 200 MB large, and a function that leaves so many bytes of it free."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", folder], check=False)
    if mounted.returncode:
        pytest.skip("a small disk must be mounted: needs root")

    def leave(free):
        filler = folder / "filler"
        filler.unlink(missing_ok=True)
        if free is not None:
            with filler.open("wb") as file, contextlib.suppress(OSError):
                os.posix_fallocate(file.fileno(), 0, max(0, shutil.disk_usage(folder).free - free))

    yield folder, leave
    subprocess.run(["umount", folder], check=True)


def build(workspace, store, until=None, say=str, record=None):
    """The steps of a run in this process; without a `record`, which would be on the full disk too, none is written."""
    recipe = load_recipe(str(workspace.recipe)).recipe
    ctx = Context(store.scratch, recipe.runtime, recipe.tracking, device="cpu", say=say)
    record = record or Run(store.artifacts, recipe.name, "", (), "0" * 8, write=False)
    return runner.run(recipe, store, ctx, record, until=until)


@pytest.fixture(scope="module")
def with_room(pristine_whole, tmp_path_factory):
    """The manifest of every stage, built where there was room."""
    folder = tmp_path_factory.mktemp("with_room")
    steps = build(pristine_whole, Store(folder / "artifacts", folder / "scratch"))
    assert tuple(s.stage.name for s in steps if s.manifest) == STAGE_NAMES
    return {s.stage.name: s.manifest for s in steps if s.manifest}


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.5], ids=["nothing-left", "half-of-what-it-writes"])
def test_every_stage_that_meets_a_full_disk_says_so_and_goes_on_later(share, small_disk, pristine_whole, with_room):
    disk, leave = small_disk
    store = Store(disk / "artifacts", disk / "scratch")
    for stage, expected in with_room.items():
        free = int(share * sum(f.bytes for f in expected.files.values()))

        def fill(line, beginning=f"{stage} …", free=free):
            if line == beginning:
                leave(free)

        with pytest.raises(FinetuneError, match=r"no space left on this disk|GB are free") as failed:
            build(pristine_whole, store, stage, fill)
        assert stage in str(failed.value) and failed.value.exit_status == 1
        leave(None)
        assert not any(disk.glob(f"*/{stage}/*/manifest.json"))
        done = build(pristine_whole, store, stage)[-1]
        assert done.manifest is not None and store.verify(done.folder, done.manifest) == []
        assert (done.key, done.manifest.digest) == (expected.key, expected.digest)


@pytest.mark.slow
def test_a_disk_that_fills_in_training_is_named_by_the_command(small_disk, forked, pristine, tmp_path):
    """`finetune run`, as a person reads it: full as the training begins, and within its first checkpoint."""
    disk, _ = small_disk

    def leave(free):
        size = 2_000_000_000 if free is None else shutil.disk_usage(disk).used + free
        subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)

    leave(None)
    expected = committed(undisturbed(forked, pristine, tmp_path / "whole", "--until", "train"))
    work = Workspace(shutil.copytree(pristine.folder, tmp_path / "work"))  # its log is not on the full disk
    (disk / "artifacts").mkdir()
    (work.folder / "artifacts").symlink_to(disk / "artifacts")
    for free in (0, 60_000):
        pid = forked.start(work, "--until", "train", stop_at="train …")
        while state(pid) != "T":
            assert alive(pid), (work.folder / "log").read_text()
            time.sleep(0.01)
        leave(free)
        os.kill(pid, signal.SIGCONT)
        status = forked.wait(pid)
        leave(None)
        said = (work.folder / "log").read_text()
        assert status == 1 and "Traceback" not in said, said
        line = next(line for line in said.splitlines() if line.startswith("train: ") and "no space left" in line)
        assert str(work.folder) in line and "run the same command again" in line
        assert not any(work.folder.glob("artifacts/train/*/manifest.json"))
    assert forked.wait(forked.start(work, "--until", "train")) == 0, (work.folder / "log").read_text()
    assert committed(work) == expected


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=["full", "broken"])
@pytest.mark.parametrize("file", ["recipe.yaml", "run.json", "latest"])
def test_a_record_that_cannot_be_written_between_two_stages_is_one_sentence(
    file, error, pristine, tmp_path, monkeypatch, capsys
):
    def write(path, content):
        if path.name == file and any(tmp_path.glob("artifacts/base/*/manifest.json")):
            raise OSError(error, os.strerror(error))
        replace_bytes(path, content)

    line = Workspace(tmp_path).command("run", pristine.recipe, "--until", "ingest")
    monkeypatch.setattr(sys, "argv", line[2:])
    with monkeypatch.context() as full:
        full.setattr(runs, "replace_bytes", write)
        with pytest.raises(SystemExit) as left:
            main()
    said = capsys.readouterr().err
    assert left.value.code == 1 and "Traceback" not in said
    words = "no space left on this disk; free some" if error == errno.ENOSPC else "cannot be written"
    assert said.count(words) == 1 and str(tmp_path / "artifacts" / "runs" / "small") in said, said
    assert "the same command again" in said and "was not written" not in said, said
    (base,) = tmp_path.glob("artifacts/base/*/manifest.json")
    assert not any(tmp_path.glob("artifacts/ingest/*/manifest.json"))
    written = base.stat().st_mtime_ns
    with contextlib.suppress(SystemExit):
        main()
    said = capsys.readouterr().err
    assert "ingest …" in said and "base …" not in said, said
    assert base.stat().st_mtime_ns == written
    assert any(tmp_path.glob("artifacts/ingest/*/manifest.json"))


class Filling(Run):
    """A run whose disk fills up as soon as it has finished `stage`."""

    def fill_after(self, stage, leave):
        self.stage, self.leave = stage, leave
        return self

    def note(self, record):
        super().note(record)
        if (record.name, record.status) == (self.stage, "done"):
            self.leave(0)


def test_a_disk_that_fills_up_between_two_stages_keeps_what_is_there(small_disk, pristine):
    disk, leave = small_disk
    store = Store(disk / "artifacts", disk / "scratch")
    record = Filling(store.artifacts, "small", "", (), "0" * 8, write=True).fill_after("base", leave)
    with pytest.raises(FinetuneError, match="small: no space left on this disk; free some") as failed:
        build(pristine, store, "ingest", record=record)
    assert failed.value.exit_status == 1 and record.refused
    assert any(disk.glob("artifacts/base/*/manifest.json"))
    before = runs.read_run(store.artifacts, "small", None)  # whole, as it was written before the disk was full
    assert before["stages"]["base"]["status"] == "partial"
    assert not any(record.folder.glob(".*"))  # and no half file takes room
    leave(None)
    again = Run(store.artifacts, "small", "", (), "0" * 8, write=True)
    build(pristine, store, "ingest", record=again)
    assert again.stages["base"].status == again.stages["ingest"].status == "done"


def test_a_disk_too_small_is_refused_before_anything_is_built(small_disk, pristine):
    disk, leave = small_disk
    leave(None)
    work = Workspace(pristine.folder)
    refused = subprocess.run(
        [*work.command("validate", "small.yaml")[:3], "run", "small.yaml", "--artifacts", disk, "--scratch", disk],
        env=work.environment(), cwd=work.folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert refused.returncode == 1
    assert "GB free, about" in refused.stderr and "--artifacts" in refused.stderr
    assert not any(disk.glob("*/*/manifest.json"))


def test_a_read_only_folder_can_be_looked_at_and_a_build_in_it_is_one_sentence(finished, tmp_path):
    """Also a second run that has nothing to build: it writes nothing."""
    folder = tmp_path / "artifacts"
    folder.mkdir()
    if subprocess.run(["mount", "--bind", finished.folder / "artifacts", folder], check=False).returncode:
        pytest.skip("needs root to mount")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        roots = ["--artifacts", str(folder), "--scratch", str(finished.folder / "scratch")]

        def command(*words):
            line = [*finished.command("validate")[:3], *words, *roots]
            return subprocess.run(
                line, env=finished.environment(), cwd=finished.folder, capture_output=True, text=True, check=False
            )

        for words in (["show", "small", "--verify"], ["plan", "small.yaml"], ["run", "small.yaml"]):
            done = command(*words)
            assert done.returncode == 0, (words, done.stderr)
        refused = command("run", "small.yaml", "--set", "seed=5")
        assert refused.returncode == 1 and "cannot be written" in refused.stderr, refused.stderr
        assert "Traceback" not in refused.stderr
    finally:
        subprocess.run(["umount", folder], check=True)
