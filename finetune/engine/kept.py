"""Keep results of finished partitions until the stage is complete: a restarted run computes only the others."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import pickle
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import xxhash

from finetune import __version__
from finetune.errors import FinetuneError
from finetune.utils.files import cache_file, canonical_json, hash_file

if TYPE_CHECKING:
    from finetune.engine.interface import Engine

T = TypeVar("T")
R = TypeVar("R")
SIGNATURE_BYTES = 32
DISTRIBUTION = "finetune-recipes"
DEVELOPERS = {"test", "check", "docs", "release"}  # extras that no worker imports
ROOM = 2  # times the size of all partitions must be free: their results, and the files that are made of them


class Kept:
    """An engine that writes the result of each partition to `folder`, and reuses results that are already there.

    A file is a keyed BLAKE2b digest followed by a pickle. The key is a secret in this user's cache folder, so only
    files that this user wrote, for the same stage key, partition and versions, are unpickled. On a nearly full disk
    fewer results are kept.
    """

    def __init__(self, engine: Engine, folder: Path, key: str) -> None:
        """Run partitions on `engine`; `key` is the stage's content key."""
        self._engine, self._folder, self._key = engine, folder, key
        self._calls = 0
        self._secret = b""
        self._state = ""  # digest of what the running call was built with

    def map(
        self, build: Callable[[], Callable[[T], R]], parts: Sequence[T], rows: int, part_bytes: int = 0
    ) -> Iterator[R]:
        """As `Engine.map`; partitions that were finished are read, not computed."""
        self._calls += 1
        call = self._calls
        self._secret = self._secret or _secret()
        self._state = ""
        with suppress(Exception):  # what cannot be pickled runs in this process alone, and has no state to compare
            self._state = hashlib.blake2b(pickle.dumps(build)).hexdigest()
        if len(parts) < 2 or not self._secret:
            yield from self._engine.map(build, parts, rows, part_bytes)
            return
        there = {number for number in range(len(parts)) if self._read(call, number) is not None}
        left = [part for number, part in enumerate(parts) if number not in there]
        done = self._engine.map(build, left, rows, part_bytes)
        for number in range(len(parts)):
            if number in there:
                if (content := self._read(call, number)) is None:
                    raise FinetuneError(f"{self._place(call, number)} changed while the stage ran; run again")
                yield pickle.loads(content)  # noqa: S301 - signed by this user
                continue
            result = next(done)
            self._write(call, number, pickle.dumps(result, protocol=5), len(parts))
            yield result

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - group, sort, workers, close: as the engine's own
        return getattr(self._engine, name)

    def _place(self, call: int, number: int) -> Path:
        return self._folder / f"{call}-{number}"

    def _signature(self, call: int, number: int, content: bytes) -> bytes:
        digest = hashlib.blake2b(key=self._secret, digest_size=SIGNATURE_BYTES)
        digest.update(canonical_json([self._key, code_versions(), self._state, call, number]).encode())
        digest.update(content)
        return digest.digest()

    def _read(self, call: int, number: int) -> bytes | None:
        try:
            found = self._place(call, number).read_bytes()
        except OSError:
            return None
        signature, content = found[:SIGNATURE_BYTES], found[SIGNATURE_BYTES:]
        return content if secrets.compare_digest(signature, self._signature(call, number, content)) else None

    def _write(self, call: int, number: int, content: bytes, parts: int) -> None:
        place = self._place(call, number)
        try:
            if shutil.disk_usage(self._folder.parent).free < ROOM * len(content) * parts:
                return
            place.parent.mkdir(exist_ok=True)
            with place.open("wb") as file:
                file.write(self._signature(call, number, content))
                file.write(content)
        except OSError:
            with suppress(OSError):
                place.unlink()


@cache
def code_versions() -> Mapping[str, object]:
    """Return the installed versions of all packages that this one requires; of its own also a digest of its files.

    It requires all that it imports directly, in an extra if that is optional.
    """
    code = Path(__file__).parents[1]
    files = {path.relative_to(code).as_posix(): hash_file(path) for path in code.rglob("*.py")}
    digest = xxhash.xxh3_64(canonical_json(files).encode()).hexdigest()
    python = ".".join(map(str, sys.version_info[:2]))
    return {"finetune": f"{__version__} (files {digest})", **_required(), "python": python}


def _required() -> dict[str, str]:
    from packaging.requirements import Requirement

    try:
        about = importlib.metadata.metadata(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:  # run from its source: any package may be one that it needs
        return {one.name: one.version for one in importlib.metadata.distributions()}
    extras = {"", *(about.get_all("Provides-Extra") or ())} - DEVELOPERS
    versions = {}
    for one in map(Requirement, about.get_all("Requires-Dist") or ()):
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in extras):
            with suppress(importlib.metadata.PackageNotFoundError):
                versions[one.name] = importlib.metadata.version(one.name)
    return versions


def _secret() -> bytes:
    """Return this user's secret, made at the first use; empty if it cannot be read or written, or is another user's."""
    path = cache_file().with_name("parts.key")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.stat().st_size != SIGNATURE_BYTES:  # an earlier process was killed while writing
            part = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
            handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(secrets.token_bytes(SIGNATURE_BYTES))
            part.replace(path)
        status, found = path.stat(), path.read_bytes()
    except OSError:
        return b""
    own = not hasattr(os, "getuid") or (status.st_uid == os.getuid() and not status.st_mode & 0o077)
    return found if own and len(found) == SIGNATURE_BYTES else b""
