"""Replace stdin, stdout and stderr by streams that never raise: unwritable output is dropped or escaped."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

from finetune.utils.format import visible

if TYPE_CHECKING:
    from typing_extensions import Buffer

STUCK_SECONDS = 60.0  # how long to wait for a full non-blocking pipe


class Steady(io.RawIOBase):
    """The bytes of a descriptor; once it refuses them (closed pipe, full disk), they and all later ones are dropped."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.lost: OSError | None = None

    def writable(self) -> bool:
        """It writes."""
        return True

    def fileno(self) -> int:
        """The descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        with suppress(OSError):
            return os.isatty(self._descriptor)
        return False

    def write(self, data: Buffer) -> int:
        """Write all of `data`, or drop it; returns its length either way."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        while len(rest) and self.lost is None:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:
                if not select.select([], [self._descriptor], [], STUCK_SECONDS)[1]:
                    self.lost = OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            except OSError as error:
                self.lost = error
                self._tell(error)
        return size

    def _tell(self, error: OSError) -> None:
        """Report once on stderr that output of stdout is lost; not for a closed pipe."""
        if self._descriptor == 1 and error.errno != errno.EPIPE:
            with suppress(OSError):
                os.write(2, f"stdout: output is lost: {error.strerror}\n".encode())


def steady() -> None:
    """Replace the three streams of this process by Steady ones. No effect in a notebook, a test, on Windows or twice.

    A closed descriptor is opened on the null device: otherwise a file opened later would take its number and receive
    the printed lines.
    """
    if sys.platform == "win32":
        return
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            with suppress(OSError):  # the lowest free number is this one
                os.open(os.devnull, os.O_RDWR)
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: PTH123 - for as long as the process lives
    sys.stdout = _steady(sys.stdout, 1)
    sys.stderr = _steady(sys.stderr, 2)


def print_text(text: object) -> None:
    """Print a line of a command's result: no markup, every control character visible."""
    sys.stdout.write(f"{visible(str(text))}\n")


def _steady(stream: TextIO | None, descriptor: int) -> TextIO:
    if stream is None:
        return _wrapped(descriptor, "utf-8", lines=True)
    if type(stream) is not io.TextIOWrapper or isinstance(getattr(stream.buffer, "raw", None), Steady):
        return stream
    try:
        if stream.fileno() != descriptor:
            return stream
        stream.flush()
    except (OSError, ValueError):
        return stream
    return _wrapped(descriptor, stream.encoding, lines=stream.line_buffering)


def _wrapped(descriptor: int, encoding: str, *, lines: bool) -> io.TextIOWrapper:
    return io.TextIOWrapper(
        io.BufferedWriter(Steady(descriptor)), encoding=encoding, errors="backslashreplace", line_buffering=lines
    )
