"""Limits on a chat template, which is an untrusted program from a recipe or a base."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from finetune.errors import FinetuneError, InputError, from_outside, how_it_ended
from finetune.tokenization.chat import strip_markers
from finetune.utils.limits import cpu_time

MOST_CHARACTERS = 100_000  # the longest that any base has is about 30,000
PROBE = Path(__file__).with_name("template_sandbox_child.py")
CPU_SECONDS = 5  # for ten short conversations; a template as they are takes a thousandth of a second
CLOCK_SECONDS = 60  # where the system has no such limit, or the machine is busy
MEMORY_BYTES = 1 << 29
ROW_SECONDS, TURNS_PER_SECOND = 10, 1000  # of one conversation; a usual template writes 30,000 turns a second
TOO_MUCH = f"it does not end within {CPU_SECONDS} s of work and {MEMORY_BYTES >> 20} MB on conversations of four turns"


_armed = False  # whether a limit is on in this process: an inner one would only start the clock again


class RenderingTooLong(BaseException):
    """One conversation takes too long; no ordinary exception, so that no template machinery holds it up."""


def check_template(template: str, special: Mapping[str, str], name: str) -> None:
    """Try a template out in a process of its own before it is used here.

    Raises InputError if it does not end, outgrows the memory, loads other files, does not parse, or does what
    the sandbox forbids; FinetuneError if another process ended that one. `name` is in the message and states which
    template it is.
    """
    if len(template) > MOST_CHARACTERS:
        raise InputError(
            f"{name}: it holds {len(template):,} characters, allowed are {MOST_CHARACTERS:,}; is it a template?"
        )
    problem = problem_of(template, tuple(sorted((k, v) for k, v in special.items() if isinstance(v, str))))
    if problem is not None:
        raise InputError(f"{name}: {problem}; fix the template, or choose another by render.template")


@lru_cache(maxsize=64)
def problem_of(template: str, special: tuple[tuple[str, str], ...]) -> str | None:
    """Return why a template cannot be used, or None; `special` are (name, text) that it is given beside messages."""
    asked = {
        "template": strip_markers(template),  # what they mark counts as well without them
        "special": dict(special),
        "cpu_seconds": CPU_SECONDS,
        "memory_bytes": MEMORY_BYTES,
    }
    command = [sys.executable, "-P", str(PROBE)]  # -P: its own folder has modules named like the standard library's
    try:
        done = subprocess.run(
            command, input=json.dumps(asked), capture_output=True, text=True, check=False, timeout=CLOCK_SECONDS
        )
    except subprocess.TimeoutExpired:
        return TOO_MUCH
    if from_outside(done.returncode):  # not the fault of the template
        raise FinetuneError(f"the process that tries a chat template out {how_it_ended(done.returncode)}; run again")
    if done.returncode < 0:  # ended by the system: out of time, or of memory or stack in a library's depths
        return TOO_MUCH
    if done.returncode:
        last = next(iter(done.stderr.strip().splitlines()[-1:]), "no word")
        return "it outgrows the memory" if "MemoryError" in last else f"it could not be tried out ({last})"
    problem: str | None = json.loads(done.stdout)["problem"]
    return problem


@contextmanager
def limited(turns: int) -> Iterator[None]:
    """Raise RenderingTooLong inside once this process has worked too long on one conversation.

    It counts work, not the clock (utils/limits.py: cpu_time).
    """
    global _armed
    if _armed or threading.current_thread() is not threading.main_thread():
        yield
        return
    _armed = True
    try:
        with cpu_time(ROW_SECONDS + turns / TURNS_PER_SECOND, RenderingTooLong):
            yield
    finally:
        _armed = False


_Track = Callable[[list[str], list[tuple[int, int]]], AbstractContextManager[None]]


class MarkedEnvironment(Protocol):
    """A jinja environment with transformers' marker extension."""

    activate_tracker: _Track


def count_once(environment: MarkedEnvironment) -> None:
    """Let transformers' marker extension count each written character once.

    Its own `_generation_support` joins all that was written so far at every marked turn, to know how long it is: a
    conversation of 100,000 turns would copy its text 50,000 times. It is given no text here, and what was written
    before is added to the positions that it reports.
    """
    track = environment.activate_tracker
    if isinstance(track, _Tracker):
        return
    environment.activate_tracker = _Tracker(track)


class _Tracker:
    """`activate_tracker` of one environment, with a list of blocks that stays empty."""

    def __init__(self, track: _Track) -> None:
        self._track = track

    def __call__(self, blocks: list[str], spans: list[tuple[int, int]]) -> AbstractContextManager[None]:
        return self._track([], _Spans(blocks, spans))


class _Spans(list[tuple[int, int]]):
    """Takes ranges counted from the end of what was written, and gives `spans` their true positions."""

    def __init__(self, blocks: list[str], spans: list[tuple[int, int]]) -> None:
        super().__init__()
        self._blocks, self._spans, self._counted, self._length = blocks, spans, 0, 0

    def append(self, span: tuple[int, int]) -> None:
        """A range within the block that is being written now."""
        self._length += sum(map(len, self._blocks[self._counted :]))
        self._counted = len(self._blocks)
        self._spans.append((self._length + span[0], self._length + span[1]))
