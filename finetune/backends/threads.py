"""How many threads torch's operations use on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from finetune.records import read_json

SMALL_PARAMETERS = 50_000_000


@contextmanager
def fitting(base: Path, device: str) -> Iterator[None]:
    """One thread for a small base on a CPU, torch's own choice for everything else.

    The operations of a tiny model are so short that its threads mostly wait for each other: on 2 quiet cores a second
    thread gains a third, and with another busy process a step takes up to 70 times as long (docs/lab-notes.md).
    """
    small = device == "cpu" and read_json(base / "base.json")["parameters"] < SMALL_PARAMETERS
    with single_thread() if small else nullcontext():
        yield


@contextmanager
def single_thread() -> Iterator[None]:
    """Let every torch operation run in the thread that calls it: whoever uses this has threads of its own."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
