"""Exceptions, one class for each exit status."""

from __future__ import annotations

import errno
import signal
from pathlib import Path

KEPT = "(finished work is kept; run the same command again to continue)"


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


def how_it_ended(status: int) -> str:
    """Describe a child's return code: `was killed by SIGTERM`, or `failed with status 3`."""
    if status >= 0:
        return f"failed with status {status}"
    known = {s.value: s.name for s in signal.Signals}
    hint = " (out of memory?)" if -status == signal.SIGKILL else ""
    return f"was killed by {known.get(-status, f'signal {-status}')}{hint}"
