"""What the security tests share: a finished run made by hand, a secret outside it, and the command line in process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.report.made_run import MadeRun, made_run


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str


Command = Callable[..., Ended]


@pytest.fixture
def finetune(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`finetune WORDS…` in this process. An exception that `main` lets through, which would be a traceback, fails."""
    from finetune.cli.main import main

    for name, value in (("PYTHONSAFEPATH", "1"), ("RUST_BACKTRACE", "0")):  # `main` sets them for its children:
        monkeypatch.setenv(name, value)  # not for the tests after this one

    def run(*words: object, status: int | None = None) -> Ended:
        monkeypatch.setattr(sys, "argv", ["finetune", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        ended = Ended(code, *capsys.readouterr())
        assert status is None or ended.status == status, ended
        return ended

    return run


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    """A finished run up to certify."""
    run = made_run(tmp_path)
    run.save()
    return run


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder outside artifacts and scratch that looks like the store's own; its bytes must stay."""
    folder = tmp_path / "foreign"
    (folder / "inner").mkdir(parents=True)
    (folder / "manifest.json").write_text("precious")
    (folder / "inner" / "manifest.json").write_text("precious")
    (folder / "inner" / "run.json").write_text("precious")
    (folder / "shard.parquet").write_text("precious")
    return folder


def roots(run: MadeRun) -> list[str]:
    """The options that name the run's store."""
    return ["--artifacts", str(run.store.artifacts), "--scratch", str(run.store.scratch)]


def listing(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with its bytes."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
