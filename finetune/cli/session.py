"""Shared by long-running commands: the context of their stages, and signals."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from finetune.context import Context, StopFlag
from finetune.engine.local import Local
from finetune.errors import Stopped
from finetune.pipeline.store import Store
from finetune.recipe import Recipe
from finetune.utils.console import Screen
from finetune.utils.runtime import describe_environment, end_with_parent

LEAVE_SECONDS = 20.0  # after a signal when nothing has to be saved


def make_context(
    recipe: Recipe, store: Store, screen: Screen, stop: StopFlag, run_name: str, rank: int, world: int
) -> Context:
    """Return the context of a command's stages."""
    recorded: dict[str, Any] = {"recipe": recipe.model_dump(mode="json"), **describe_environment()}
    return Context(
        scratch=store.scratch,
        runtime=recipe.runtime,
        tracking=recipe.tracking,
        run_name=f"{recipe.name}-{run_name}",
        say=screen.say,
        bar=screen.bar,
        stop=stop,
        device=recipe.runtime.device,
        rank=rank,
        world=world,
        launch=os.environ.get("MASTER_PORT", ""),
        engine=Local(recipe.runtime.workers),
        environment=recorded,
        artifacts=store.artifacts,
    )


@contextmanager
def signals_handled(screen: Screen, *, launched: bool = False) -> Iterator[StopFlag]:
    """On the first SIGINT or SIGTERM save and stop; on a second one exit immediately.

    One of several launched processes takes the same again for the first come twice (a cluster signals every process of
    a job, and the launcher hands its own on): to leave at once is the launcher's to say, by SIGKILL.
    """
    stop = StopFlag()
    again = "" if launched else " (again to leave at once)"
    if launched:
        end_with_parent()

    def handle(number: int, frame: FrameType | None) -> None:
        # From now on the kernel's own default: no Python code, however long it computes, stands in the way of a second
        # Ctrl-C. The other signal changes nothing: a launcher sends SIGTERM after a terminal's Ctrl-C.
        signal.signal(number, signal.SIG_IGN if launched else signal.SIG_DFL)
        if stop.signal_number:
            return
        stop.signal_number = number
        with suppress(RuntimeError, OSError):  # stderr was being written to, or its terminal is gone
            screen.say(f"{signal.Signals(number).name}: saving and stopping{again}")
        if not stop.deferred:
            leave.args = (128 + number,)
            leave.start()
            raise KeyboardInterrupt

    # A library that waits for threads of its own (a download) does not hold up the end: there is nothing to save.
    leave = threading.Timer(LEAVE_SECONDS, os._exit)
    leave.daemon = True
    stop.hold = leave.cancel
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # a lost ssh session; nohup ignores it, which is kept
        numbers.append(signal.SIGHUP)
    # An interruption inside a weak reference's callback or a finaliser is dropped by Python, with a traceback that
    # needs no notification: the next check, or `leave`, ends the work.
    hook = sys.unraisablehook

    def unraisable(dropped: sys.UnraisableHookArgs) -> None:
        if not (stop.signal_number and dropped.exc_type is KeyboardInterrupt):
            hook(dropped)

    sys.unraisablehook = unraisable
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stop
    except KeyboardInterrupt:
        raise Stopped(stop.signal_number or signal.SIGINT) from None
    finally:
        leave.cancel()
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)
