"""Where stages leave what they made: keys, manifests, leases and atomic commit. Knows nothing of training.

A stage's folder is `ROOT/STAGE/KEY`. Files are written there and synced, and `manifest.json` is written last: a folder
with a readable manifest is complete, any other is a build in progress or one that died. No rename, link or lock is
needed, so a mounted Drive or NFS folder will do. A builder owns its folder by a numbered lease file that it keeps
touching; another run waits for a live lease and takes over a dead one by creating the next number exclusively.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from pydantic import BaseModel, ValidationError

from finetune import digests
from finetune.errors import FinetuneError, InputError

MANIFEST = "manifest.json"
BUILDING = "building.json"
LEASE_SECONDS = 60.0  # a lease of another machine that has not moved for so long is dead
BEAT_SECONDS = 5.0
FULL_BYTES = 65536
LEASE_BYTES = 2048


class FileEntry(BaseModel):
    """One file of a finished folder; `digest` is its xxh3-128."""

    bytes: int
    digest: str
    rows: int | None = None


class Manifest(BaseModel):
    """What a finished stage folder holds, and what it was made from."""

    stage: str
    version: int
    key: str
    spec: dict[str, Any]
    fingerprint: dict[str, Any]
    inputs: dict[str, str]  # stage → digest of its output
    files: dict[str, FileEntry]
    digest: str  # of the files, less the stage's logs
    metrics: dict[str, Any]
    seconds: float
    peak_memory_bytes: int
    environment: dict[str, Any]  # versions, git commit, device: recorded, never part of a key


@dataclass
class Lease:
    """The right to build one folder. `note` is shown to whoever waits."""

    path: Path
    token: str
    note: str = ""
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Keep the lease moving, so that another machine sees that this one lives."""
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lease")
        self._thread.start()

    def _beat(self) -> None:
        beat = 0
        while not self._stop.wait(BEAT_SECONDS):
            beat += 1
            with contextlib.suppress(OSError):  # a full disk must not kill the build
                # In place and of one length: no room is needed, and what is there is never cut off.
                with self.path.open("r+b") as file:
                    file.write(_lease_bytes(self.token, beat, self.note))
                    file.flush()
                    os.fsync(file.fileno())

    def require(self) -> None:
        """Raise FinetuneError where another run took the folder over, because this process stood still for too long."""
        others = [p for p in _leases(self.path.parent) if p.name > self.path.name]
        if others or not self.path.exists():
            owner = _owner(_read(max(others))) if others else "another run"
            raise FinetuneError(
                f"{self.path.parent}: {owner} took this folder over while this process stood still; run again: what it "
                "finishes is used"
            )

    def release(self) -> None:
        """Give the folder back; older, dead leases go first, and a later one is not ours."""
        self._stop.set()
        if self._thread:
            self._thread.join()
        for path in sorted(_leases(self.path.parent)):
            if path.name <= self.path.name:
                path.unlink(missing_ok=True)


class Hashed:
    """Digests that a stage took while it wrote: a merged 7B need not be read a second time for its manifest."""

    def __init__(self) -> None:
        self._noted: dict[Path, tuple[tuple[int, int, int], str]] = {}

    def note(self, path: Path, digest: str) -> None:
        """Remember the xxh3-128 of a file that is closed and synced."""
        self._noted[path] = (self._state(path), digest)

    def digest(self, path: Path) -> str | None:
        """What was noted of a file, if it is still that one."""
        state, digest = self._noted.get(path, (None, ""))
        return digest if state is not None and state == self._state(path) else None

    @staticmethod
    def _state(path: Path) -> tuple[int, int, int]:
        stat = path.stat()
        return stat.st_size, stat.st_mtime_ns, stat.st_ino


class Store:
    """Two roots: `artifacts` (durable, small) and `scratch` (local, large, can be made again)."""

    def __init__(self, artifacts: Path, scratch: Path) -> None:
        self.artifacts, self.scratch = artifacts.absolute(), scratch.absolute()

    def folder(self, stage: str, key: str, *, large: bool = False) -> Path:
        """Where the stage of this key lies, whether or not it exists."""
        return (self.scratch if large else self.artifacts) / stage / key[:16]

    def find(self, folder: Path) -> Manifest | None:
        """The manifest of a complete folder whose files are all there at their size, else None."""
        try:
            manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
        except (OSError, ValidationError, ValueError):
            return None
        for name, entry in manifest.files.items():
            try:
                if (folder / name).stat().st_size != entry.bytes:
                    return None
            except OSError:
                return None
        return manifest

    def verify(self, folder: Path, manifest: Manifest) -> list[str]:
        """Rehash every file; returns a sentence for each that differs from the manifest."""
        problems = []
        for name, entry in manifest.files.items():
            path = folder / name
            if not path.is_file():
                problems.append(f"{path}: gone")
            elif (found := hash_file(path)) != entry.digest:
                problems.append(f"{path}: its bytes changed since it was written (xxh3 {found}, was {entry.digest})")
        return problems

    @contextlib.contextmanager
    def lease(self, folder: Path, on_wait: Callable[[str], None], check: Callable[[], None]) -> Iterator[Lease]:
        """Own `folder` for a build; waits for a live owner (`on_wait` gets one line), takes over from a dead one."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FinetuneError(f"{folder}: cannot be written: {error.strerror}") from None
        lease = _acquire(folder, on_wait, check)
        lease.start()
        try:
            yield lease
        finally:
            lease.release()

    def clear(self, folder: Path) -> None:
        """Remove what a build that died left behind, but not the lease."""
        for path in folder.iterdir():
            if not path.name.startswith("lease."):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def commit(self, folder: Path, manifest: Manifest) -> None:
        """Declare the folder complete. The manifest is written last; a torn write of it is not valid JSON."""
        _write_synced(folder / MANIFEST, manifest.model_dump_json(indent=1))
        _sync_folder(folder)
        (folder / BUILDING).unlink(
            missing_ok=True
        )  # after the manifest: with neither, hours of training would be cleared

    def read_files(
        self, folder: Path, rows: Mapping[str, int], skip: str = "", hashed: Hashed | None = None
    ) -> dict[str, FileEntry]:
        """Hash and sync every file of a folder that is about to be committed, less those under the folder `skip`.

        A file that was hashed while it was written, and has not been touched since, is not read again.
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
    """Whether the disk under `folder` has next to nothing left: less than one large write would need."""
    try:
        return shutil.disk_usage(folder).free < FULL_BYTES
    except OSError:
        return False


def is_being_built(folder: Path) -> bool:
    """Whether a lease in the folder may belong to a living process; one of another machine counts as living."""
    held = sorted(_leases(folder))
    return bool(held) and not _is_dead(held[-1], _read(held[-1]), {})


def make_key(stage: str, version: int, spec: object, fingerprint: object, inputs: Mapping[str, str]) -> str:
    """The content key of a stage: 32 hex digits over everything that may change its output, and nothing else."""
    parts = {"stage": stage, "version": version, "spec": spec, "fingerprint": fingerprint, "inputs": dict(inputs)}
    return xxhash.xxh3_128_hexdigest(
        json.dumps(parts, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
    )


def output_digest(files: Mapping[str, FileEntry], logs: Iterable[str] = ()) -> str:
    """The digest of an output: xxh3-128 over its sorted (path, digest) pairs; logs tell of one run and do not count."""
    skip = set(logs)
    text = "".join(f"{name}\0{files[name].digest}\n" for name in sorted(files) if name not in skip)
    return xxhash.xxh3_128_hexdigest(text.encode())


def hash_file(path: Path) -> str:
    """xxh3-128 of a file's bytes, in hex. Raises InputError where it cannot be read."""
    try:
        return digests.hash_file(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _acquire(folder: Path, on_wait: Callable[[str], None], check: Callable[[], None]) -> Lease:
    token = uuid.uuid4().hex
    watch: dict[Path, tuple[bytes, float]] = {}
    said = ""
    while True:
        check()
        held = sorted(_leases(folder))
        current = held[-1] if held else None
        before = _read(current) if current else b""
        if current is None or _is_dead(current, before, watch):
            number = int(current.name.split(".")[1]) + 1 if current else 1
            mine = folder / f"lease.{number:06d}.json"
            if _create(mine, token):
                # Whoever took a judgement on an older state gives way: the lease judged dead must still be there,
                # unchanged, and no other may have appeared beside it.
                others = [p for p in _leases(folder) if p != mine and p not in held]
                if not others and (current is None or _read(current) == before):
                    if current is not None:
                        on_wait(f"{folder.name}: took over from {_owner(before)}, which is gone")
                    return Lease(mine, token)
                mine.unlink(missing_ok=True)
            time.sleep(random.uniform(0.01, 0.1))  # noqa: S311 - jitter, so that two that gave way do not meet again
            continue
        line = f"waiting for {_owner(before)}"
        if line != said:
            on_wait(line)
            said = line
        time.sleep(0.25)


def _is_dead(path: Path, content: bytes, watch: dict[Path, tuple[bytes, float]]) -> bool:
    now = time.monotonic()  # never the wall clock: it may jump, and two machines never agree on it
    if path not in watch or watch[path][0] != content:
        watch[path] = (content, now)
    try:
        owner = json.loads(content)
        me = _identity()
        if all(owner[k] == me[k] for k in ("host", "boot", "namespace")):
            return bool(_process_start(int(owner["pid"])) != owner["start"])
    except (ValueError, KeyError, TypeError):
        pass  # torn or half-written: judged by whether it still changes
    return now - watch[path][1] > LEASE_SECONDS


def _create(path: Path, token: str) -> bool:
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    except OSError as error:
        raise FinetuneError(f"{path.parent}: cannot be written: {error.strerror}") from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_lease_bytes(token, 0, ""))
    except OSError as error:
        path.unlink(missing_ok=True)  # cut off, it would be taken for a lease of another machine
        raise FinetuneError(f"{path.parent}: cannot be written: {error.strerror}") from None
    return True


def _lease_bytes(token: str, beat: int, note: str) -> bytes:
    text = json.dumps({**_identity(), "token": token, "beat": beat, "note": note[:200]})
    return text.encode().ljust(LEASE_BYTES)


def _leases(folder: Path) -> list[Path]:
    return [p for p in folder.glob("lease.*.json") if p.name.split(".")[1].isdigit()]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _owner(content: bytes) -> str:
    try:
        lease = json.loads(content)
        note = f": {lease['note']}" if lease.get("note") else ""
        return f"process {lease['pid']} on {lease['host']}{note}"
    except (ValueError, KeyError, TypeError):
        return "another run"


def is_running(pid: int) -> bool:
    """Whether this machine has a process of that number."""
    return _process_start(pid) != ""


def _identity() -> dict[str, object]:
    """Who this process is: enough to tell a live one from a later one that was given the same number."""

    def first_line(path: str) -> str:
        try:
            return Path(path).read_text().strip()
        except OSError:
            return ""

    try:
        namespace = os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - not a path: pid:[4026531836]
    except OSError:
        namespace = ""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "boot": first_line("/proc/sys/kernel/random/boot_id"),
        "namespace": namespace,
        "pid": pid,
        "start": _process_start(pid),
    }


def _process_start(pid: int) -> str:
    """Something that differs between two processes of one number; "" if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        after_name = stat.rpartition(")")[2].split()
        return "" if after_name[0] in "ZX" else after_name[19]  # a zombie builds nothing; field 22 is starttime
    except (OSError, IndexError):
        pass
    if Path("/proc/self").exists():
        return ""
    try:
        os.kill(pid, 0)  # no /proc (macOS): signal 0 asks whether the process exists
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "alive"


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system lets a folder be opened or synced
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
