"""What a manifest records of the machine and the code. Recorded, never part of a key."""

from __future__ import annotations

import importlib.metadata
import platform
import resource
import subprocess
import sys
from functools import cache
from pathlib import Path

PACKAGES = (
    "torch", "transformers", "peft", "bitsandbytes", "trl", "datasets", "accelerate", "sentence-transformers",
    "faiss-cpu", "numpy", "scikit-learn", "pyarrow", "safetensors", "tokenizers",
)  # fmt: skip


@cache
def describe_environment() -> dict[str, object]:
    """Versions, git commit and dirty flag, machine. No host name, user name, path or environment variable."""
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
        "cpu_count": _cpu_count(),
        "git_commit": commit,
        "git_dirty": dirty,
    }


def peak_memory_bytes() -> int:
    """The largest resident set this process has had so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux, bytes on macOS


def _cpu_count() -> int:
    import os

    return os.cpu_count() or 1


def _git() -> tuple[str | None, bool | None]:
    root = Path(__file__).parent.parent

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
