"""Write a large file at disk speed: synced and hashed while it is written, then dropped from the page cache.

By default the kernel collects gigabytes of dirty pages, blocks the writer while it flushes them, and keeps the clean
pages in place of more useful ones. On a virtual machine 4 GB take a fifth of the time this way
(docs/lab-notes.md), because the same few pages are reused.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import xxhash

SYNC_BYTES = 64 << 20
MOST_WAITING = 2  # chunks being synced: 128 MB of dirty pages at most, and the one being filled


class SyncedFile:
    """A new file, written sequentially; synced when the `with` block ends without an error."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._hash = xxhash.xxh3_128()
        self._end = 0
        self._synced = 0
        self._waiting: list[Future[None]] = []

    def __enter__(self) -> SyncedFile:
        """Create the file."""
        self._file = self._path.open("wb", buffering=0)
        self._syncer = ThreadPoolExecutor(1, "sync")
        return self

    def write(self, data: memoryview) -> None:
        """Append bytes; waits for a slow disk. Raises OSError, also for an earlier write that failed."""
        self._hash.update(data)
        done = 0
        while done < len(data):
            done += self._file.write(data[done:])
        self._end += done
        if self._end - self._synced >= SYNC_BYTES:
            self._waiting.append(self._syncer.submit(self._sync, self._synced, self._end))
            self._synced = self._end
        while len(self._waiting) > MOST_WAITING:
            self._waiting.pop(0).result()

    def digest(self) -> str:
        """Return the xxh3-128 of the bytes written, 32 hexadecimal digits."""
        return self._hash.hexdigest()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Sync what is left, unless the block failed; close the file."""
        with self._file:
            self._syncer.shutdown(cancel_futures=kind is not None)
            if kind is None:
                for waiting in self._waiting:
                    waiting.result()
                os.fsync(self._file.fileno())
                forget_pages(self._file.fileno(), 0, 0)

    def _sync(self, start: int, end: int) -> None:
        if sys.platform == "linux":
            os.fdatasync(self._file.fileno())
            forget_pages(self._file.fileno(), start, end - start)


def forget_pages(descriptor: int, start: int, length: int) -> None:
    """Drop clean pages of a file from the page cache (to its end if `length` is 0); Linux only."""
    if sys.platform == "linux":
        os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)
