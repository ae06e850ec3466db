"""The machine and the process: versions and git commit, random state, threads, heap trimming.

The result of describe_environment() is recorded in manifests and is never part of a key.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import random
import resource
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from finetune.utils.files import read_json

if TYPE_CHECKING:
    import torch

PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
CGROUP = Path("/sys/fs/cgroup")  # version 2, of the container
T = TypeVar("T")
R = TypeVar("R")

PACKAGES = (
    "torch", "transformers", "peft", "bitsandbytes", "trl", "datasets", "accelerate", "sentence-transformers",
    "faiss-cpu", "numpy", "scikit-learn", "pyarrow", "safetensors", "tokenizers",
)  # fmt: skip


@cache
def describe_environment() -> dict[str, object]:
    """Return versions, git commit, dirty flag and machine. No host name, user name, path or environment variable."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit, dirty = _git()
    return {
        "versions": versions,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu_count": os.cpu_count() or 1,
        "git_commit": commit,
        "git_dirty": dirty,
    }


def peak_memory_bytes() -> int:
    """Return the largest resident set size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux, bytes on macOS


def usable_cpus() -> int:
    """Return the number of processors that this process may use, at least 1: its affinity and the container's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no cgroup v2, or the word max
        quota, period = map(int, (CGROUP / "cpu.max").read_text(encoding="ascii").split())
        count = min(count, quota // period)
    return max(1, count)


def _git() -> tuple[str | None, bool | None]:
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    status = git("status", "--porcelain", "--untracked-files=no") if commit else None
    return commit, None if status is None else bool(status)


@dataclass(frozen=True)
class RandomState:
    """State of Python's, NumPy's and torch's random generators; reading it does not synchronise with the GPU."""

    python: Any
    numpy: Any
    cpu: torch.Tensor
    cuda: list[torch.Tensor]

    @classmethod
    def now(cls) -> RandomState:
        """Return the current state."""
        import numpy as np
        import torch

        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Set the generators to this state."""
        import numpy as np
        import torch

        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


SMALL_PARAMETERS = 50_000_000


@contextmanager
def fitting(base: Path, device: str) -> Iterator[None]:
    """Use one thread for a small base on a CPU, torch's default for everything else.

    The operations of a tiny model are so short that its threads mostly wait for each other: on 2 idle cores a second
    thread gains a third, but with another busy process a step takes up to 70 times as long (docs/lab-notes.md).
    """
    small = device == "cpu" and read_json(base / "base.json")["parameters"] < SMALL_PARAMETERS
    with single_thread() if small else nullcontext():
        yield


@contextmanager
def single_thread() -> Iterator[None]:
    """Run every torch operation in the calling thread; for callers that use several threads themselves."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def available_memory(processes: int = 1) -> int | None:
    """Return the bytes of RAM that new allocations can take, at most what the container has left (cgroup v2: limit,
    less what is in use except for files not used lately), divided by `processes` of this machine; None: unknown.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    with suppress(OSError, ValueError):  # no cgroup, or the word max
        limit = int((CGROUP / "memory.max").read_text(encoding="ascii"))
        used = int((CGROUP / "memory.current").read_text(encoding="ascii"))
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
        free = min(free, max(0, limit - used + int(stat.get("inactive_file", 0))))
    return free // processes


def give_back() -> None:
    """Make glibc return freed memory to the system (malloc_trim); no effect elsewhere.

    glibc keeps blocks under 32 MB in its heaps, in holes that do not fit the next layer's blocks: processing a 1.1B
    model layer by layer held 4 GB at the end, 0.6 GB with this (docs/lab-notes.md, 2026-11-28).
    """
    if sys.platform != "linux":
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:  # musl's allocator has neither this call nor such heaps
        return


def in_order(function: Callable[[T], R], items: Iterable[T], threads: int, ahead: int) -> Generator[R, None, None]:
    """Yield `function(item)` in the order of `items`, computed by `threads` threads.

    Item k is read and submitted only after the result of item k - `ahead` has been consumed and the next one requested:
    at most `ahead` items are held, including the one consumed last. An exception of `function` is raised here at its
    position; after that, or when the caller stops early, nothing more is submitted.
    """
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads, "ahead") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def end_with_parent() -> None:
    """Make Linux send this process SIGTERM when its parent dies, so that no orphan keeps a GPU."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
