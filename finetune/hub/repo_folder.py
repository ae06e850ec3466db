"""A private dataset repository on the Hub used as a folder: list, fetch with verification, commit many files at once.

Its type is dataset because rows and optimizer states are not a model; it must be private because it holds rows.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from finetune.errors import FinetuneError, InputError
from finetune.hub.client import announced, hub_digest, tree_of
from finetune.hub.errors import LOG_IN, retried, sentences
from finetune.utils.quiet import no_bars

T = TypeVar("T")
REPO = re.compile(r"\w[\w.-]*/\w[\w.-]*")
ABOUT = "README.md"
README = b"""---
viewer: false
---
Stages and training checkpoints of `finetune run --mirror`. The same command on another machine goes on from them.
Older checkpoints stay in this repository's history and count as storage: delete the repository once the run is done.
"""


@dataclass(frozen=True)
class Remote:
    """One file as the Hub lists it: `size` in bytes; `kind` is sha256, or git_sha1 for a file kept in git."""

    size: int
    kind: str
    digest: str

    def equals(self, content: Path | bytes) -> bool:
        """Return whether a local file, or a bytes object, has these bytes."""
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        return size == self.size and hub_digest(content, size, self.kind) == self.digest


class HubFolder:
    """The files of one repository. Every method raises InputError for 401, 403, 404, and FinetuneError for the rest."""

    def __init__(self, repo_id: str, wait: Callable[[float], None] = time.sleep) -> None:
        if not REPO.fullmatch(repo_id):
            raise InputError(f"--mirror: found {repo_id!r}; allowed is OWNER/NAME")
        self.repo_id, self._wait, self._commit = repo_id, wait, "main"

    def open(self) -> None:
        """Create the repository if it does not exist. Raises InputError if it is public."""
        from huggingface_hub import HfApi, get_token

        if get_token() is None:
            raise InputError(f"--mirror needs a token that may write: {LOG_IN}")
        api = HfApi()
        with _quietly(), sentences("keep artifacts in", self.repo_id, "dataset"):
            self._again(lambda: api.create_repo(self.repo_id, repo_type="dataset", private=True, exist_ok=True))
            info = self._again(lambda: api.repo_info(self.repo_id, repo_type="dataset"))
        if info.private is False:
            raise InputError(
                f"--mirror: dataset {self.repo_id} is public, so anyone could read the training rows: make it private "
                "in its settings on the Hub, or name another one"
            )

    def listed(self) -> dict[str, Remote]:
        """Return path → file of the newest commit, from which `fetch` then reads."""
        from huggingface_hub import HfApi

        api = HfApi()
        with _quietly(), sentences("list", self.repo_id, "dataset"):
            info = self._again(lambda: api.repo_info(self.repo_id, repo_type="dataset"))
            self._commit = info.sha or "main"
            entries = self._again(lambda: tree_of(api, self.repo_id, "dataset", self._commit))
        return {e.path: Remote(e.size, *announced(e)) for e in entries}

    def fetch(self, files: Mapping[str, Remote], into: Path) -> None:
        """Download files to `into`/path. Raises FinetuneError if one differs from the listing."""
        from huggingface_hub import hf_hub_download

        for name, remote in files.items():
            get = partial(hf_hub_download, self.repo_id, name, repo_type="dataset", revision=self._commit)
            with _quietly(), sentences(f"fetch {name} of", self.repo_id, "dataset"):
                self._again(partial(get, local_dir=into))
            if not remote.equals(into / name):
                raise FinetuneError(f"{self.repo_id}: {name}: the bytes received differ from the Hub's listing")

    def send(self, files: Mapping[str, Path | bytes], gone: Sequence[str], message: str) -> None:
        """Add `files` and delete `gone` in one commit, so that a reader sees all of it or nothing.

        If the response to a commit is lost, the commit is sent again, without deleting files that the Hub no longer
        lists.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

        again = False

        def commit() -> object:
            # built for each attempt: a committed addition cannot be reused
            nonlocal again
            adds = [CommitOperationAdd(n, f if isinstance(f, bytes) else str(f)) for n, f in files.items()]
            there = self.listed() if again and gone else gone
            again = True
            operations: list[Any] = [*adds, *(CommitOperationDelete(n) for n in gone if n in there)]
            return HfApi().create_commit(self.repo_id, operations, commit_message=message, repo_type="dataset")

        with _quietly(), sentences("push to", self.repo_id, "dataset"):
            self._again(commit)

    def _again(self, call: Callable[[], T]) -> T:
        return retried(call, lambda line: None, self._wait)


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence the client's bars and warnings, which would mix with the lines of the run."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with no_bars("huggingface_hub"):
            yield
    finally:
        logger.setLevel(level)
