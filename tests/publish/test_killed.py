"""kill -9 at any moment of a push: the same command then ends with what an undisturbed push ends with."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from finetune.cli.runs import unused
from finetune.pipeline.store import Store
from tests.helpers.hub_server import LoopbackHub
from tests.helpers.publishing import Act, recipe


class Deadly(list[tuple[str, str, bool]]):
    """The requests that a Hub was sent; the process that sends number `last` is killed when that one arrives."""

    pid, last = 0, 0

    def append(self, request: tuple[str, str, bool]) -> None:
        """One more request."""
        super().append(request)
        if len(self) == self.last:
            os.kill(self.pid, signal.SIGKILL)


def push_killed(act: Act, hub: LoopbackHub, last: int) -> int:
    """How a push in a process of its own ended that is killed as its request number `last` arrives at the Hub here."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            from huggingface_hub.utils import close_session

            os.read(read, 1)  # until the parent knows whom to kill
            close_session()  # its connections are the parent's
            act(recipe(what=["adapter", "merged"]))
        finally:
            os._exit(0)
    hub.requests = deadly = Deadly()
    deadly.pid, deadly.last = child, last
    os.write(write, b"x")
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(read)
    os.close(write)
    hub.requests = []
    return status


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_a_kill_at_any_request_of_a_push_loses_nothing(hub: LoopbackHub, act: Act, tmp_path: Path) -> None:
    kinds = recipe(what=["adapter", "merged"])
    act(kinds)  # also imports what every child needs
    count = len(hub.requests)
    assert count > 10
    whole = {name: hub.files(name) for name in ("me/tiny", "me/tiny-merged")}
    for last in (1, *range(2, count * 4 // 5, max(1, count // 6))):  # what is cached on this side is not asked again
        hub.repos.clear()
        hub.lfs.clear()
        (act.run_folder / "publish.json").unlink(missing_ok=True)
        assert push_killed(act, hub, last) == -signal.SIGKILL, last
        act(kinds)
        assert {name: hub.files(name) for name in whole} == whole, last
        receipt = json.loads((act.run_folder / "publish.json").read_text())
        assert [p["commit"] for p in receipt["pushes"]] == [hub.repos["model", name].head for name in whole], last
    left = sorted(act.scratch.iterdir())
    assert left and {item.folder for item in unused(Store(tmp_path / "none", act.scratch), 1)} == set(left)
