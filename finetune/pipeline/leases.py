"""Lease on a stage folder: a numbered file in the folder with owner, heartbeat and expiry.

Another run waits for a live lease, printing owner and progress, and takes over a dead one by creating the next number
exclusively. The file system needs no locks, links or renames.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from finetune.errors import FinetuneError
from finetune.utils.links import names_in, read_regular

LEASE_SECONDS = 60.0  # a lease of another machine without a heartbeat for this long is dead
BEAT_SECONDS = 5.0
ABANDONED_SECONDS = 600.0  # the same by the file's time and this machine's clock, which may differ by minutes
LEASE_BYTES = 2048
SOMEBODY = "another run"  # owner of an unreadable lease
WAIT_SECONDS = 15.0  # interval at which a waiting run prints the owner's progress


@dataclass
class Lease:
    """The right to build one folder. `note` is shown to waiting runs; a thread calls `on_lost` once."""

    path: Path
    token: str
    note: str = ""
    on_lost: Callable[[FinetuneError], None] = lambda error: None
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the heartbeat, by which other machines see that this process is alive."""
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lease")
        self._thread.start()

    def say(self, line: str) -> None:
        """Set the note that waiting runs read from the next heartbeat on; no I/O."""
        self.note = line

    def _beat(self) -> None:
        beat = 0
        while not self._stop.wait(BEAT_SECONDS):
            beat += 1
            try:
                self.require()
            except FinetuneError as error:  # this process was stopped, or its machine slept
                self.on_lost(error)
                return
            except OSError:
                continue  # a file server that does not answer now
            with contextlib.suppress(OSError):  # a full disk must not kill the build
                # In place and of constant length: needs no disk space and never truncates the file.
                with self.path.open("r+b") as file:
                    file.write(_lease_bytes(self.token, beat, self.note))
                    file.flush()
                    os.fsync(file.fileno())

    def require(self) -> None:
        """Raise FinetuneError if another run took the folder over because this process was suspended for too long."""
        others = [p for p in _leases(self.path.parent) if p.name > self.path.name]
        if others or not self.path.exists():
            owner = _owner(_read(max(others))) if others else "another run"
            raise FinetuneError(
                f"{self.path.parent}: {owner} took this folder over while this process was suspended; run "
                "again to use its result"
            )

    def release(self) -> None:
        """Release the folder: remove older, dead leases, then this one; later ones belong to others."""
        self._stop.set()
        if self._thread:
            self._thread.join()
        for path in sorted(_leases(self.path.parent)):
            if path.name <= self.path.name:
                path.unlink(missing_ok=True)


def acquire(folder: Path, on_wait: Callable[[str], None], check: Callable[[], None]) -> Lease:
    """Acquire the lease of an existing folder. `on_wait` receives a line with the owner, then its progress at
    intervals; `check` may raise. Raises FinetuneError if the folder cannot be written.
    """
    token = uuid.uuid4().hex
    watch: dict[Path, tuple[bytes, float]] = {}
    reported, reported_at = ("", ""), 0.0
    while True:
        check()
        held = sorted(_leases(folder))
        current = held[-1] if held else None
        before = _read(current) if current else b""
        if current is None or _is_dead(current, before, watch):
            number = int(current.name.split(".")[1]) + 1 if current else 1
            mine = folder / f"lease.{number:06d}.json"
            if _create(mine, token):
                # The judgement may be on an outdated state: the lease judged dead must still exist,
                # unchanged, and there must be no other lease.
                others = [p for p in _leases(folder) if p != mine and p not in held]
                if not others and (current is None or _read(current) == before):
                    if current is not None:
                        on_wait(f"{folder.name}: took over from {_owner(before)}, which is gone")
                    return Lease(mine, token)
                mine.unlink(missing_ok=True)
            time.sleep(random.uniform(0.01, 0.1))  # noqa: S311 - jitter, so that two runs do not collide again
            continue
        who, note = _owner_and_note(before)
        unreadable = who == SOMEBODY and (reported[0] or not before)  # being written or removed: try again later
        recently = time.monotonic() - reported_at < WAIT_SECONDS
        if not unreadable and (who != reported[0] or (note != reported[1] and not recently)):
            reported, reported_at = (who, note), time.monotonic()
            on_wait(f"waiting for {_owner(before)}")
        time.sleep(0.25)


def _is_dead(path: Path, content: bytes, watch: dict[Path, tuple[bytes, float]]) -> bool:
    now = time.monotonic()  # not the wall clock: it may jump, and differs between machines
    if path not in watch or watch[path][0] != content:
        watch[path] = (content, now)
    ended = _ended_here(content)
    return now - watch[path][1] > LEASE_SECONDS if ended is None else ended


def _ended_here(content: bytes) -> bool | None:
    """Return whether the owner, a process of this machine, has ended; None for an owner elsewhere."""
    try:
        owner = json.loads(content)
        me = _identity()
        if all(owner[k] == me[k] for k in ("host", "boot", "namespace")):
            return bool(_process_start(int(owner["pid"])) != owner["start"])
    except (ValueError, KeyError, TypeError):
        pass  # incomplete: judged by whether it still changes
    return None


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
        path.unlink(missing_ok=True)  # a truncated lease would look like one of another machine
        raise FinetuneError(f"{path.parent}: cannot be written: {error.strerror}") from None
    return True


def _lease_bytes(token: str, beat: int, note: str) -> bytes:
    # A character takes up to 6 bytes in escaped ASCII, so 200 of them would not always fit into the length.
    text = json.dumps({**_identity(), "token": token, "beat": beat, "note": note[:200]}, ensure_ascii=False)
    return text.encode("utf-8", "replace").ljust(LEASE_BYTES)


def _leases(folder: Path) -> list[Path]:
    names = (name.split(".") for name in names_in(folder))  # none if another process removed the folder meanwhile
    return [
        folder / ".".join(n) for n in names if n[0] == "lease" and n[-1] == "json" and len(n) == 3 and n[1].isdigit()
    ]


def _read(path: Path) -> bytes:
    try:
        return read_regular(path)
    except OSError:
        return b""


def _owner(content: bytes) -> str:
    return ": ".join(part for part in _owner_and_note(content) if part)


def _owner_and_note(content: bytes) -> tuple[str, str]:
    """Return owner and last note of a lease."""
    try:
        lease = json.loads(content)
        return f"process {lease['pid']} on {lease['host']}", str(lease.get("note") or "")
    except (ValueError, KeyError, TypeError, AttributeError):
        return SOMEBODY, ""


def is_running(pid: int) -> bool:
    """Return whether this machine has a process with this id."""
    return _process_start(pid) != ""


def _identity() -> dict[str, object]:
    """Return the identity of this process, which differs from that of a later process with the same id."""

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
    """Return a start time that distinguishes processes with the same id; "" if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        after_name = stat.rpartition(")")[2].split()
        return "" if after_name[0] in "ZX" else after_name[19]  # a zombie counts as dead; field 22 is starttime
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


def is_being_built(folder: Path) -> bool:
    """Return whether a lease in the folder may belong to a live process: one of this machine that runs, or one of
    another (or of this one before a reboot) with a heartbeat in the last ABANDONED_SECONDS.
    """
    held = sorted(_leases(folder))
    if not held:
        return False
    ended = _ended_here(_read(held[-1]))
    if ended is not None:
        return not ended
    try:
        return time.time() - held[-1].lstat().st_mtime < ABANDONED_SECONDS
    except OSError:
        return True  # not known: remove nothing
