"""Faults of the machine: a kill in `clean`, a stale or read-only folder within a run, another user, a full /tmp."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from finetune.errors import FinetuneError
from finetune.pipeline import runner
from finetune.pipeline.runner import Step
from finetune.pipeline.stage_list import stage_named
from finetune.utils import files
from tests.report.made_run import MadeRun
from tests.security.conftest import Command, roots
from tests.stages.finished import context

NOBODY = 65534


def test_a_kill_at_any_moment_of_clean_leaves_no_half_folder_that_looks_whole(made: MadeRun, tmp_path: Path) -> None:
    """What `find` calls complete is complete; the next `clean` ends the work."""
    whole = made.folder("dedup")
    for number in range(60):
        shutil.copytree(whole, whole.with_name(f"old{number:03d}"))
        for name in range(20):
            (whole.with_name(f"old{number:03d}") / f"file{name}").write_text("x")
    command = [sys.executable, "-P", "-m", "finetune", "clean", "--yes", *roots(made)]
    for delay in (0.0, 0.004, 0.012):
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout is not None
        process.stdout.readline()  # the list comes before anything is deleted
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for folder in whole.parent.iterdir():
            manifest = made.store.find(folder)
            assert manifest is None or made.store.verify(folder, manifest) == []
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in whole.parent.iterdir()] == [whole.name] and made.store.find(whole) is not None


def test_several_cleans_at_once_end_well(made: MadeRun, tmp_path: Path) -> None:
    whole = made.folder("dedup")
    for number in range(80):
        shutil.copytree(whole, whole.with_name(f"old{number:03d}"))
    command = [sys.executable, "-P", "-m", "finetune", "clean", "--yes", *roots(made)]
    running = [
        subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in running:
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
    assert [p.name for p in whole.parent.iterdir()] == [whole.name]


@pytest.mark.parametrize(
    "number", [errno.ESTALE, errno.EROFS, errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EMFILE]
)
def test_an_error_of_the_disk_in_any_stage_is_one_sentence_that_names_it(number: int, tmp_path: Path) -> None:
    error = OSError(number, os.strerror(number), str(tmp_path / "rows.parquet"))
    status, told = runner._failure(error, Step(stage_named("dedup"), "missing", folder=tmp_path), context(tmp_path))
    assert status == "failed" and isinstance(told, FinetuneError) and told.exit_status == 1
    assert str(tmp_path) in str(told) and "\n" not in str(told)


def test_a_library_that_wraps_a_full_disk_in_its_own_words_is_understood(tmp_path: Path) -> None:
    """torch raises a RuntimeError, and by then the half file may be gone and the disk have room again."""
    for wrapped in (RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"), ValueError("x")):
        try:
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            except OSError as error:
                raise wrapped from error
        except (RuntimeError, ValueError) as error:
            caught = error
        step = Step(stage_named("train"), "missing", folder=tmp_path)
        status, told = runner._failure(caught, step, context(tmp_path))
        assert status == "failed" and "no space left on this disk" in str(told), told


def test_an_error_of_our_own_is_still_shown_whole(tmp_path: Path) -> None:
    error = KeyError("a defect")
    told = runner._failure(error, Step(stage_named("dedup"), "missing", folder=tmp_path), context(tmp_path))
    assert told == ("failed", error)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("words", [["show", "made"], ["clean", "--yes"], ["report", "made"]])
def test_another_user_reads_and_is_refused_in_one_sentence(words: list[str], made: MadeRun, finetune: Command) -> None:
    """In a fork, as Python itself may lie in a folder of root's; what a command imports is imported before."""
    root = Path(tempfile.mkdtemp(prefix="finetune-shared-", dir="/tmp"))
    try:
        shutil.copytree(made.store.artifacts, root / "artifacts")
        root.chmod(0o755)
        options = ["--artifacts", root / "artifacts", "--scratch", root / "artifacts"]
        finetune(*words, *options, status=0)
        for old in (made.folder("dedup"), made.folder("ingest")):
            shutil.copytree(old, root / "artifacts" / "dedup" / f"old-{old.parent.name}")
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            status = 99
            try:
                os.setgid(NOBODY)
                os.setuid(NOBODY)
                ended = finetune(*words, *options)
                os.write(write, ended.err.encode())
                status = ended.status
            finally:
                os._exit(status)
        os.close(write)
        with os.fdopen(read) as pipe:
            err = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert "Traceback" not in err and status == (0 if words[0] == "show" else 1), err
        assert words[0] == "show" or "Permission denied" in err
    finally:
        shutil.rmtree(root)


def test_a_cache_of_digests_that_nobody_can_write_only_costs_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    (tmp_path / "x").write_bytes(b"x" * (files.REMEMBERED_FROM_BYTES + 1))
    assert files.file_digest(tmp_path / "x") == files.hash_file(tmp_path / "x")


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/full").exists(), reason="needs root and Linux")
def test_a_full_or_absent_temporary_folder(made: MadeRun, tmp_path: Path, finetune: Command) -> None:
    """`show`, `report` and `validate` need none."""
    command = [sys.executable, "-P", "-m", "finetune", "report", "made", *roots(made)]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, env={**os.environ, "TMPDIR": "/dev/full"}
    )
    assert done.returncode == 0, done.stderr


def test_memory_that_runs_out_outside_a_stage_is_one_sentence(
    made: MadeRun, finetune: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*words: object) -> None:
        raise MemoryError

    monkeypatch.setattr("finetune.cli.show.print_runs", refuse)
    ended = finetune("show", "made", *roots(made), status=1)
    assert ended.err.startswith("finetune: no memory is left") and ended.err.count("\n") <= 3


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory"), RuntimeError("can't start new thread"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
        ValueError("Unknown error: Failed to launch worker thread: Resource temporarily unavailable"),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"), RuntimeError("std::bad_alloc"),
    ],
    ids=repr,
)  # fmt: skip
def test_memory_that_runs_out_in_a_stage_is_one_sentence(error: Exception, tmp_path: Path) -> None:
    outer = ValueError("a library's own words")
    outer.__cause__ = error
    for raised in (error, outer):
        step = Step(stage_named("dedup"), "missing", folder=tmp_path)
        status, told = runner._failure(raised, step, context(tmp_path))
        assert status == "failed" and isinstance(told, FinetuneError) and told.exit_status == 1
        assert "dedup: no memory is left" in str(told) and "\n" not in str(told)


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory by RLIMIT_DATA")
@pytest.mark.parametrize("kind", ["tokenizer", "template"])
def test_a_limit_of_the_users_own_blames_no_file(kind: str, tmp_path: Path) -> None:
    """`ulimit -d` below what the trial's own limit is: the trial keeps the lower one."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_DATA, (1 << 30,) * 2)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30,) * 2); resource.setrlimit(resource.RLIMIT_CPU, (5, 5))\n"
    ) + {
        "tokenizer": "from pathlib import Path; from tokenizers import Tokenizer, models\n"
        "Tokenizer(models.WordLevel({'a': 0}, 'a')).save('t.json')\n"
        "from finetune.models.base_limits import check_tokenizer; check_tokenizer(Path('t.json'))",
        "template": "from finetune.tokenization.template_sandbox import check_template as c; c('{{1}}', {}, 'x')",
    }[kind]
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
