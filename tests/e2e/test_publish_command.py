"""`finetune publish` as a person types it, against a Hub on this machine that the real client talks to."""

import json

import pytest

from tests import hub_server

TOKEN = "hf_" + "NotARealToken" * 3


@pytest.fixture
def hub(tmp_path):
    with hub_server.serve() as server:
        yield server, server.env(tmp_path / "home") | {"HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}


def test_push_verify_push_again_and_pull(finished, hub, tmp_path):
    server, env = hub
    sets = ("--set", "publish.what=[merged]")
    dry = finished.run("publish", "small", "--repo", "me/small", "--dry-run", *sets, **env)
    assert "model.safetensors" in dry.stdout and "pipeline_tag: text-generation" in dry.stdout
    done = finished.run("publish", "small", "--repo", "me/small", *sets, **env)
    assert "files verified" in done.stdout
    names = set(server.files("me/small"))
    assert {"model.safetensors", "config.json", "chat_template.jinja", "certificate.json", "README.md"} <= names
    again = finished.run("publish", "small", "--repo", "me/small", *sets, **env)
    assert done.stdout.split(":")[0] == again.stdout.split(":")[0]  # the same commit: nothing was uploaded
    receipt = json.loads(next(finished.folder.glob("artifacts/runs/small/*/publish.json")).read_text())
    assert receipt["pushes"][0]["repo"] == "me/small"


def test_an_adapter_on_a_folder_is_refused_since_nobody_could_load_it(finished, hub):
    _, env = hub
    refused = finished.run("publish", "small", "--repo", "me/small", status=2, **env)
    assert "Traceback" not in refused.stderr


def test_a_token_is_in_no_file_and_no_output(finished, hub):
    _, env = hub
    done = finished.run("publish", "small", "--repo", "me/other", "--set", "publish.what=[merged]", **env)
    assert TOKEN not in done.stdout + done.stderr
    for path in finished.folder.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path
