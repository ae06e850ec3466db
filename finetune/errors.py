"""What can go wrong, by what the person should do next; each kind has its own exit status."""

from __future__ import annotations

import errno
import signal
from pathlib import Path

KEPT = "(what was finished is kept; the same command goes on from there)"


class FinetuneError(Exception):
    """Failed while running. The message is one clear sentence for a person; no traceback is shown."""

    exit_status = 1


class InputError(FinetuneError):
    """A recipe, a row, a file or an option is wrong; nothing was built from it."""

    exit_status = 2


class GateRefused(FinetuneError):
    """The input is well-formed, but going on would ruin the model or waste hours."""

    exit_status = 3


class Stopped(FinetuneError):
    """A signal asked the run to stop; what was finished is saved."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by signal {signal_number}; the same command goes on from here")
        self.exit_status = 128 + signal_number


def from_outside(status: int) -> bool:
    """Whether a child's return code is a signal that somebody sent it, and not its own crash (SIGSEGV, SIGABRT)."""
    return -status in {getattr(signal, name, None) for name in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")}


def disk_full(where: str) -> FinetuneError:
    """What to say where nothing more fits on the disk; `where` names the folder."""
    return FinetuneError(f"{where}: no space left on this disk; free some {KEPT}")


def not_written(folder: Path, error: OSError) -> FinetuneError:
    """What to say of a folder that does not take what belongs into it."""
    if error.errno == errno.ENOSPC:
        return disk_full(str(folder))
    return FinetuneError(f"{folder}: cannot be written: {error.strerror or error} {KEPT}")


def how_it_ended(status: int) -> str:
    """What became of a child process, by its return code: `was killed by SIGTERM`, or `failed with status 3`."""
    if status >= 0:
        return f"failed with status {status}"
    known = {s.value: s.name for s in signal.Signals}
    hint = " (out of memory?)" if -status == signal.SIGKILL else ""
    return f"was killed by {known.get(-status, f'signal {-status}')}{hint}"
