"""Safe reading of untrusted files: library errors become InputError; CPU time and memory are bounded."""

from __future__ import annotations

import mmap
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TypeVar

from finetune.errors import MACHINE, FinetuneError, InputError
from finetune.utils.format import clipped, gb, visible

SHORT_BYTES = 1 << 25
WATCH_SECONDS = 0.1  # between two looks at what native code has used
T = TypeVar("T")


class OutOfTime(BaseException):
    """The work inside `bounded` took too long. A BaseException, so that no library catches it."""


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn a library's error about a file into InputError: `what`, the error's type and its first line.

    Rust extensions (tokenizers, safetensors) panic with an exception that is no Exception. FinetuneError, signals and
    errors of the machine itself (its disks, permissions, open files) pass.
    """
    try:
        yield
    except FinetuneError:
        raise
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"
        if not (isinstance(error, Exception) or panic):
            raise
        if isinstance(error, OSError) and error.errno in MACHINE:
            raise
        raise InputError(f"{what}: {first_line(error)}") from error


def require_space(folder: Path, needed: int, what: str, fix: str) -> None:
    """Raise FinetuneError if the disk of `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise FinetuneError(
            f"{what} needs {gb(needed)} in {folder} and {gb(free)} are free; free {gb(needed - free)}, or {fix}"
        )


def first_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message, at most 300 characters."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, MemoryError):
        return "it takes more memory than there is"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = type(error).__name__
    return f"{kind}: {visible(clipped(lines[0], 300))}" if lines else kind


@contextmanager
def bounded(what: str, *, cpu_seconds: float, memory_bytes: int) -> Iterator[None]:
    """Raise InputError if the work inside takes more CPU time, or more additional memory, than allowed.

    Native threads that abort on a failed allocation must not run inside.
    """
    with ExitStack() as stack:
        stack.enter_context(cpu_time(cpu_seconds, OutOfTime))
        stack.enter_context(memory(memory_bytes))
        try:
            yield
        except OutOfTime:
            raise InputError(
                f"{what}: needs more than {cpu_seconds:g} s of CPU time to read; is it the right file?"
            ) from None
        except MemoryError:
            raise InputError(
                f"{what}: needs more than {memory_bytes / 1e9:.1f} GB of memory to read; is it the right file?"
            ) from None


def memory_is_short() -> bool:
    """Return True if SHORT_BYTES more memory cannot be allocated. Takes 10 µs.

    Call it before a library that hides MemoryError, and before C++ code that aborts on a failed allocation.
    """
    try:
        if sys.platform == "win32":
            return not bytearray(SHORT_BYTES)
        mmap.mmap(-1, SHORT_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except (MemoryError, OSError):
        return True
    return False


@contextmanager
def memory(more_bytes: int) -> Iterator[None]:
    """Limit further allocations of this process to `more_bytes`: MemoryError inside instead of a swapping machine.

    Linux only (RLIMIT_DATA counts private writable memory since 4.7). Costs 0.1 ms: enter it once for many rows.
    """
    used = _data_bytes() if sys.platform == "linux" else 0
    if not used:
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = used + more_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if soft < 0 else min(wanted, soft), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def watched(work: Callable[[], T], *, seconds: float, memory_bytes: int) -> T:
    """Return what `work` returns. For native code that gives the interpreter free and that no signal interrupts.

    It runs in a thread of its own. Raises TimeoutError once it has taken more than `seconds`, both by the clock and in
    CPU time (a process that was stopped, or waits for a busy machine, is not blamed), and MemoryError once this process
    has grown by more than `memory_bytes` (Linux only): the thread is then left to itself, and the program should end.
    A panic of a Rust library is raised as RuntimeError. Takes 0.1 ms.
    """
    ended: list[tuple[T | None, BaseException | None]] = []

    def call() -> None:
        try:
            ended.append((work(), None))
        except BaseException as error:  # a panic is no Exception
            ended.append((None, error))

    clock, cpu, data = time.monotonic(), time.process_time(), _data_bytes()
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    while not ended:
        thread.join(WATCH_SECONDS)
        if ended:
            break
        if min(time.monotonic() - clock, time.process_time() - cpu) > seconds:
            raise TimeoutError(f"it does not end within {seconds:.0f} s")
        if _data_bytes() - data > memory_bytes:
            raise MemoryError(f"it takes more than {memory_bytes / 1e9:.1f} GB of memory")
    done, error = ended[0]
    if error is not None and not isinstance(error, Exception):
        raise RuntimeError(first_line(error)) from error
    if error is not None:
        raise error
    return done  # type: ignore[return-value]  # T may be Optional itself


def _data_bytes() -> int:
    """The private writable memory of this process; 0 if /proc does not report it."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5])
    except (OSError, ValueError, IndexError):
        return 0
    import resource

    return pages * resource.getpagesize()


@contextmanager
def cpu_time(cpu_seconds: float, error: type[BaseException]) -> Iterator[None]:
    """Raise `error` inside once this process has used so much CPU time.

    CPU time is counted, not wall time, so a busy machine changes nothing. No limit on Windows and outside the main
    thread.
    """
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise error

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, cpu_seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
