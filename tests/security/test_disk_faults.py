"""A disk that fails at any one file operation of a command: one sentence, exit 1, and nothing is lost."""

from __future__ import annotations

import errno
import os
import random
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.report.made_run import RUN, MadeRun
from tests.security.conftest import Command, roots

TIMES = int(os.environ.get("FINETUNE_FUZZ", "1"))
ERRORS = (errno.ESTALE, errno.EIO, errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENOMEM)
EVENTS = ("open", "os.listdir", "os.scandir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree")
WORDS = (
    "show made", "show made --verify", "runs", f"show made@{RUN} made@{RUN}", "report made", "clean --yes",
    "publish made --dry-run", f"rm made@{RUN}",
)  # fmt: skip


class Faulty:
    """The file operations below a folder, counted; one, or all from one on, fail. An audit hook cannot be taken out."""

    def __init__(self) -> None:
        self.root = ""
        self.count = self.first = self.last = self.error = 0
        sys.addaudithook(self.see)

    def see(self, event: str, given: tuple[object, ...]) -> None:
        """Called by Python before each operation; what it raises, the operation raises."""
        if not self.root or event not in EVENTS or not isinstance(given[0], str | os.PathLike):
            return
        path = os.fspath(given[0])
        if isinstance(path, str) and path.startswith(self.root):
            self.count += 1
            if self.first <= self.count <= self.last:
                raise OSError(self.error, os.strerror(self.error), path)

    @contextmanager
    def below(self, root: Path, first: int, last: int, error: int) -> Iterator[None]:
        """Let the operations `first` to `last` below `root` fail."""
        self.count, self.first, self.last, self.error, self.root = 0, first, last, error, str(root)
        try:
            yield
        finally:
            self.root = ""


@pytest.fixture(scope="module")
def faulty() -> Faulty:
    """One hook for all cases."""
    return Faulty()


@pytest.mark.parametrize("words", WORDS)
def test_a_disk_that_fails_at_any_one_moment_of_a_command(
    words: str, faulty: Faulty, made: MadeRun, tmp_path: Path, finetune: Command
) -> None:
    chance = random.Random(words)
    store = made.store.artifacts
    old = made.folder("dedup")
    needed = {p.relative_to(store) for p in store.glob("*/*/manifest.json")}
    shutil.copytree(old, old.with_name("old00000"))
    shutil.copytree(store, tmp_path / "kept")

    def restore() -> None:
        shutil.rmtree(store)
        shutil.copytree(tmp_path / "kept", store)

    with faulty.below(store, 0, -1, 0):
        status = finetune(*words.split(), *roots(made)).status
    count = faulty.count
    restore()
    moments = range(1, count + 1) if count <= 5 * TIMES else sorted(chance.sample(range(1, count + 1), 5 * TIMES))
    for moment in moments:
        error = chance.choice(ERRORS)
        with faulty.below(store, moment, moment if chance.random() < 0.5 else count * 10, error):
            ended = finetune(*words.split(), *roots(made))
        assert ended.status in (0, 1, 2), (moment, error, ended)
        assert "Traceback" not in ended.err and len(ended.err) < 4000
        kept = {p.relative_to(store) for p in store.glob("*/*/manifest.json")}
        assert words.startswith("rm") or needed <= kept, (moment, error, ended)
        again = finetune(*words.split(), *roots(made))
        assert again.status in (status, 2 if words.startswith("rm") else status), (moment, error, ended, again)
        restore()


@pytest.mark.parametrize("error", [errno.EACCES, errno.ESTALE, errno.EIO])
@pytest.mark.parametrize("place", ["runs", "runs/made", f"runs/made/{RUN}", f"runs/made/{RUN}/run.json"])
def test_clean_deletes_nothing_where_it_cannot_read_which_runs_there_are(
    place: str, error: int, faulty: Faulty, made: MadeRun, finetune: Command
) -> None:
    """A folder of runs that refuses to be read is not an empty one: then no run would use any stage."""
    before = sorted(made.store.artifacts.rglob("*"))
    with faulty.below(made.store.artifacts / place, 1, 10**9, error):
        ended = finetune("clean", "--yes", *roots(made), status=1)
    assert str(made.store.artifacts / place) in ended.err and "Traceback" not in ended.err
    assert sorted(made.store.artifacts.rglob("*")) == before


@pytest.mark.parametrize("error", [errno.EACCES, errno.ESTALE, errno.EIO])
def test_a_finished_stage_whose_manifest_cannot_be_read_now_is_not_built_again(
    error: int, faulty: Faulty, made: MadeRun
) -> None:
    """Its folder would be cleared first: ten hours of training for one answer of a file server."""
    from finetune.errors import FinetuneError

    folder = made.folder("train")
    with faulty.below(folder / "manifest.json", 1, 10**9, error), pytest.raises(FinetuneError, match="cannot be read"):
        made.store.find(folder)
    assert made.store.find(folder) is not None
    (folder / "manifest.json").unlink()
    assert made.store.find(folder) is None
