"""Exceptions, one class for each exit status."""

from __future__ import annotations

import errno
import signal
from pathlib import Path

KEPT = "(finished work is kept; run the same command again to continue)"
# What the machine does, and no file or program: a disk, a mount, permissions, the number of open files.
MACHINE = (
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE,
    errno.ENFILE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENODEV, errno.EBUSY, errno.ETXTBSY,
)  # fmt: skip
OF_A_NAME = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)
# torch, Arrow, Python's threads and C++ have words of their own for it.
NO_MEMORY = (
    "can't allocate memory", "annot allocate memory", "bad_alloc", "Failed to launch worker thread",
    "can't start new thread", "cannot map zero-fill pages", "failed to map segment", "CUDA out of memory",
    "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED",
)  # fmt: skip


class FinetuneError(Exception):
    """Failed while running. The message is one clear sentence for a person; no traceback is shown."""

    exit_status = 1


class InputError(FinetuneError):
    """A recipe, a row, a file or an option is invalid; nothing was built from it."""

    exit_status = 2


class GateRefused(FinetuneError):
    """The input is well-formed, but continuing would damage the model or waste hours."""

    exit_status = 3


class Stopped(FinetuneError):
    """A signal asked the run to stop; what was finished is saved."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by signal {signal_number}; the same command goes on from here")
        self.exit_status = 128 + signal_number


def from_outside(status: int) -> bool:
    """Return whether a child's return code is a signal sent to it and not its own crash (SIGSEGV, SIGABRT)."""
    return -status in {getattr(signal, name, None) for name in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")}


def disk_full(where: str) -> FinetuneError:
    """Return the error for a full disk; `where` names the folder."""
    return FinetuneError(f"{where}: no space left on this disk; free some {KEPT}")


def not_written(folder: Path, error: OSError) -> FinetuneError:
    """Return the error for a folder that cannot be written."""
    if error.errno == errno.ENOSPC:
        return disk_full(str(folder))
    return FinetuneError(f"{folder}: cannot be written: {error.strerror or error} {KEPT}")


def has_no_memory(error: BaseException | None) -> bool:
    """Return whether a failed allocation caused an error, also if a library wrapped it in an error of its own."""
    seen = 0
    while error is not None and seen < 100:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return True
        if any(words in str(error) for words in NO_MEMORY):
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False


def memory_full(where: str) -> FinetuneError:
    """Return the error for an allocation that failed; `where` names the work."""
    return FinetuneError(
        f"{where}: no memory is left, or this process may have no more (ulimit, a container's limit); end other "
        f"programs, raise the limit, or take a larger machine {KEPT}"
    )


def of_the_machine(error: Exception, work: str) -> FinetuneError | None:
    """Return the error for a failure of disk or memory outside any stage; None if it may be a defect."""
    if has_no_memory(error):
        return memory_full(work)
    if isinstance(error, OSError) and error.errno in MACHINE and error.filename:
        return FinetuneError(f"{work}: {error.filename}: {error.strerror}; see to it, and run the same command again")
    if isinstance(error, OSError) and error.errno in OF_A_NAME and error.filename:
        return InputError(f"{work}: {str(error.filename)[:200]}: {error.strerror}; give another path or name")
    return None


def how_it_ended(status: int) -> str:
    """Describe a child's return code: `was killed by SIGTERM`, or `failed with status 3`."""
    if status >= 0:
        return f"failed with status {status}"
    known = {s.value: s.name for s in signal.Signals}
    hint = " (out of memory?)" if -status == signal.SIGKILL else ""
    return f"was killed by {known.get(-status, f'signal {-status}')}{hint}"
