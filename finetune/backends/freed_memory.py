"""Memory that was freed goes back to the system."""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Have glibc return what was freed; elsewhere nothing.

    It keeps blocks under 32 MB in its heaps, in holes that the next layer's blocks do not fit into: a 1.1B model that
    went through a layer at a time held 4 GB at the end, against 0.6 GB with this (docs/lab-notes.md, 2026-11-28).
    """
    if sys.platform != "linux":
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:  # musl's own allocator has no such call, and no such heaps
        return
