"""Write a large file at the speed of the disk: synced as it goes, hashed as it goes, and out of the page cache after.

Left alone, the kernel gathers gigabytes of dirty pages, stops the writer while it throws them out, and then keeps the
clean ones in place of what the machine needs. Measured on a virtual machine (docs/lab-notes.md), 4 GB take a fifth of
the time this way: the same few pages are used over and over.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import xxhash

SYNC_BYTES = 64 << 20
MOST_WAITING = 2  # stretches on their way to the disk: 128 MB of dirty pages at most, and the one being filled


class SyncedFile:
    """A new file, written from its start; on the disk when the `with` block ends without an error."""

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
        """Append bytes; waits when the disk is behind. Raises OSError, also for bytes that were taken earlier."""
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
        """The xxh3-128 of what was written, 32 hexadecimal digits."""
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
    """Give clean pages of a file back to the system (to the end of the file where `length` is 0); on Linux only."""
    if sys.platform == "linux":
        os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)
