"""Store of stage outputs: keys, manifests, leases and atomic commit. Independent of training.

A stage's folder is `ROOT/STAGE/KEY`. Files are written there and synced, and `manifest.json` is written last: a folder
with a readable manifest is complete, any other is a build in progress or an aborted one. No rename, link or lock is
needed, so a mounted Drive or NFS folder works. A builder owns its folder by a lease (pipeline/leases.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash
from pydantic import BaseModel, ValidationError

from finetune.errors import MACHINE, FinetuneError, InputError
from finetune.pipeline.leases import Lease, acquire
from finetune.utils import files as utils_files
from finetune.utils import links

MANIFEST = "manifest.json"
BUILDING = "building.json"
FULL_BYTES = 65536


class FileEntry(BaseModel):
    """One file of a finished folder; `digest` is its xxh3-128."""

    bytes: int
    digest: str
    rows: int | None = None


class Manifest(BaseModel):
    """Content and inputs of a finished stage folder."""

    stage: str
    version: int
    key: str
    spec: dict[str, Any]
    fingerprint: dict[str, Any]
    inputs: dict[str, str]  # stage → digest of its output
    files: dict[str, FileEntry]
    digest: str  # of the files, without the stage's logs
    metrics: dict[str, Any]
    seconds: float
    peak_memory_bytes: int
    environment: dict[str, Any]  # versions, git commit, device: recorded, never part of a key


class Hashed:
    """Digests computed while writing, so that a merged 7B is not read again for its manifest."""

    def __init__(self) -> None:
        self._noted: dict[Path, tuple[tuple[int, int, int], str]] = {}

    def note(self, path: Path, digest: str) -> None:
        """Record the xxh3-128 of a file that is closed and synced."""
        self._noted[path] = (self._state(path), digest)

    def digest(self, path: Path) -> str | None:
        """Return the recorded digest of a file, if the file is unchanged."""
        state, digest = self._noted.get(path, (None, ""))
        return digest if state is not None and state == self._state(path) else None

    @staticmethod
    def _state(path: Path) -> tuple[int, int, int]:
        stat = path.stat()
        return stat.st_size, stat.st_mtime_ns, stat.st_ino


class Store:
    """Two roots: `artifacts` (durable, small) and `scratch` (local, large, can be rebuilt)."""

    def __init__(self, artifacts: Path, scratch: Path) -> None:
        self.artifacts, self.scratch = artifacts.absolute(), scratch.absolute()

    def folder(self, stage: str, key: str, *, large: bool = False) -> Path:
        """Return the folder of the stage with this key, which may not exist."""
        return (self.scratch if large else self.artifacts) / stage / key[:16]

    def root(self, folder: Path) -> Path:
        """Return the root, artifacts or scratch, that `folder` is in; one may be inside the other."""
        roots = [root for root in (self.artifacts, self.scratch) if folder.is_relative_to(root)]
        return max(roots, key=lambda root: len(root.parts), default=self.artifacts)

    def find(self, folder: Path) -> Manifest | None:
        """Return the manifest of a complete folder whose files all exist with their size, else None.

        What is reached only through a link out of the store is not there. Raises FinetuneError if the disk does not
        let it be looked at: a folder that is complete would be built again, and cleared first.
        """
        root = self.root(folder)
        try:
            if links.way_out(folder / MANIFEST, root) is not None:
                return None
            manifest = Manifest.model_validate_json(links.read_regular(folder / MANIFEST))
        except (ValidationError, ValueError):
            return None
        except OSError as error:
            _raise_fault(folder / MANIFEST, error)
            return None
        for name, entry in manifest.files.items():
            path = folder / name
            try:
                if path.stat().st_size != entry.bytes or links.way_out(path, folder) is not None:
                    return None
            except ValueError:
                return None
            except OSError as error:
                _raise_fault(path, error)
                return None
        return manifest

    def older_version(self, parent: Path, version: int, spec: object, inputs: Mapping[str, str]) -> int | None:
        """Return the newest version before `version` with an output for this spec and inputs, or None."""
        versions = []
        for path in parent.glob(f"*/{MANIFEST}"):
            made = self.find(path.parent)
            if made and made.version < version and made.spec == spec and made.inputs.items() <= dict(inputs).items():
                versions.append(made.version)
        return max(versions, default=None)

    def verify(self, folder: Path, manifest: Manifest) -> list[str]:
        """Rehash every file; return a message for each that differs from the manifest."""
        problems = []
        for name, entry in manifest.files.items():
            path = folder / name
            if not path.is_file():
                problems.append(f"{path}: gone")
            elif (digest := hash_file(path)) != entry.digest:
                problems.append(f"{path}: its bytes changed since it was written (xxh3 {digest}, was {entry.digest})")
        return problems

    @contextlib.contextmanager
    def lease(self, folder: Path, on_wait: Callable[[str], None], check: Callable[[], None]) -> Iterator[Lease]:
        """Hold the lease of `folder`; wait for a live owner (reported to `on_wait`), take over from a dead one."""
        links.require_inside(folder, self.root(folder))
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FinetuneError(f"{folder}: cannot be written: {error.strerror}") from None
        links.require_plain(folder, self.root(folder))
        lease = acquire(folder, on_wait, check)
        lease.start()
        try:
            yield lease
        finally:
            lease.release()

    def clear(self, folder: Path, keep: str = "") -> None:
        """Remove the files of an aborted build, but not the lease and not what is named `keep`."""
        for path in folder.iterdir():
            if not path.name.startswith("lease.") and path.name != keep:
                links.remove(path, folder)

    def remove(self, folder: Path) -> None:
        """Delete a stage's or a run's folder, or the link in its place. Concurrent calls are safe.

        The manifest is removed first: a partly deleted folder must not look complete. Raises InputError if a folder
        above it is a link out of the store.
        """
        links.require_inside(folder.parent, self.root(folder))
        if not folder.is_symlink():
            links.remove(folder / MANIFEST, folder)
        links.remove(folder, self.root(folder))

    def commit(self, folder: Path, manifest: Manifest) -> None:
        """Mark the folder complete. The manifest is written last; a truncated one is not valid JSON."""
        utils_files.write_bytes(folder / MANIFEST, manifest.model_dump_json(indent=1).encode())
        _sync_folder(folder)
        # After the manifest: with neither, hours of training would be cleared.
        (folder / BUILDING).unlink(missing_ok=True)

    def read_files(
        self, folder: Path, rows: Mapping[str, int], skip: str = "", hashed: Hashed | None = None
    ) -> dict[str, FileEntry]:
        """Hash and sync every file of a folder before its commit, except those under the folder `skip`.

        A file that was hashed while it was written, and is unchanged since, is not read again.
        """
        entries = {}
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            name = path.relative_to(folder).as_posix()
            if name in (MANIFEST, BUILDING) or name.startswith("lease.") or (skip and name.startswith(f"{skip}/")):
                continue
            with path.open("rb") as file:
                os.fsync(file.fileno())
            digest = (hashed.digest(path) if hashed else None) or hash_file(path)
            entries[name] = FileEntry(bytes=path.stat().st_size, digest=digest, rows=rows.get(name))
        return entries


def is_full(folder: Path) -> bool:
    """Return whether the disk of `folder` is almost full: less space than one large write needs."""
    try:
        return shutil.disk_usage(folder).free < FULL_BYTES
    except OSError:
        return False


def make_key(stage: str, version: int, spec: object, fingerprint: object, inputs: Mapping[str, str]) -> str:
    """Return the content key of a stage: 32 hex digits over exactly the values that may change its output."""
    parts = {"stage": stage, "version": version, "spec": spec, "fingerprint": fingerprint, "inputs": dict(inputs)}
    return xxhash.xxh3_128_hexdigest(
        json.dumps(parts, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
    )


def output_digest(files: Mapping[str, FileEntry], logs: Iterable[str] = ()) -> str:
    """Return the digest of an output: xxh3-128 over its sorted (path, digest) pairs, without logs."""
    skip = set(logs)
    text = "".join(f"{name}\0{files[name].digest}\n" for name in sorted(files) if name not in skip)
    return xxhash.xxh3_128_hexdigest(text.encode())


def hash_file(path: Path) -> str:
    """xxh3-128 of a file's bytes, in hex. Raises InputError, or, for a fault of the disk, FinetuneError."""
    try:
        return utils_files.hash_file(path)
    except OSError as error:
        _raise_fault(path, error)
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _raise_fault(path: Path, error: OSError) -> None:
    """Raise FinetuneError if the cause of `error` is the machine, not the absence of a file."""
    if error.errno in MACHINE:
        raise FinetuneError(f"{path}: cannot be read: {error.strerror}; see to it, and run the same command again")


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system allows opening or syncing a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
