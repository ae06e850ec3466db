"""`run --mirror`: the machine is gone, another goes on from what the Hub has; and a network that is not there."""

import shutil
import signal

import pytest

from tests.e2e import launches
from tests.e2e.conftest import Workspace
from tests.helpers import hub_server


@pytest.fixture
def hub(tmp_path):
    with hub_server.serve() as server:
        yield server, server.env(tmp_path / "home") | {"HF_HUB_OFFLINE": "0"}


def adapter(work):
    return launches.adapter(work).read_bytes()


@pytest.mark.slow
def test_a_machine_that_is_gone_is_gone_on_from_bitwise(pristine, finished, hub, tmp_path):
    server, env = hub
    work = Workspace(shutil.copytree(pristine.folder, tmp_path / "work"))
    asked = ("run", "small.yaml", "--mirror", "me/runs", *launches.TRAIN)
    first = work.start(*asked, **env)
    launches.wait_until(lambda: launches.complete(work), first)
    first.send_signal(signal.SIGTERM)
    said = first.communicate()[0]
    assert first.returncode == 143 and "train checkpoint-" in said
    shutil.rmtree(work.folder / "artifacts")
    shutil.rmtree(work.folder / "scratch")
    second = work.run(*asked, **env)
    assert "train checkpoint-" in second.stderr and "goes on from checkpoint-" in second.stderr
    assert "ingest …" not in second.stderr
    assert adapter(work) == adapter(finished)
    held = server.files("me/runs", "dataset")
    assert server.repos["dataset", "me/runs"].private and not [n for n in held if "/checkpoints/" in n]
    before = len(server.repos["dataset", "me/runs"].commits)
    work.run(*asked, **env)
    assert len(server.repos["dataset", "me/runs"].commits) == before  # nothing new, nothing sent
    assert env["HF_TOKEN"].encode() not in b"".join(held.values())


@pytest.mark.slow
def test_a_network_that_is_not_there_does_not_end_the_run(finished, tmp_path):
    work = Workspace(shutil.copytree(finished.folder, tmp_path / "work"))
    shutil.rmtree(next(work.folder.glob("artifacts/split/*")))
    nowhere = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": hub_server.TOKEN}
    done = work.run("run", "small.yaml", "--mirror", "me/runs", "--until", "split", **nowhere)
    lines = [line for line in done.stderr.splitlines() if "me/runs" in line]
    assert len(lines) == 2 and "no connection to the Hub" in lines[0] and "the same command sends it" in lines[1]
    assert "Retrying" not in done.stderr
