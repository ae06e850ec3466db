"""`finetune publish` as a person types it, against a Hub on this machine that the real client talks to."""

import json
import shutil

import pytest

from tests.e2e.conftest import Workspace
from tests.helpers import hub_server

TOKEN = "hf_" + "NotARealToken" * 3


@pytest.fixture
def hub(tmp_path):
    with hub_server.serve() as server:
        yield server, server.env(tmp_path / "home") | {"HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}


def test_push_verify_push_again_and_write_the_token_nowhere(finished, hub, tmp_path):
    server, env = hub
    sets = ("--set", "publish.what=[merged]")
    dry = finished.run("publish", "small", "--repo", "me/small", "--dry-run", *sets, **env)
    assert "model.safetensors" in dry.stdout and "pipeline_tag: text-generation" in dry.stdout
    done = finished.run("publish", "small", "--repo", "me/small", *sets, **env)
    assert "files verified" in done.stdout
    assert (
        "loaded from there and equal to the trained: tokenizer, chat template, config, generation config" in done.stderr
    )
    names = set(server.files("me/small"))
    assert {"model.safetensors", "config.json", "chat_template.jinja", "certificate.json", "README.md"} <= names
    again = finished.run("publish", "small", "--repo", "me/small", *sets, **env)
    assert done.stdout.split(":")[0] == again.stdout.split(":")[0]  # the same commit: nothing was uploaded
    receipt = json.loads(next(finished.folder.glob("artifacts/runs/small/*/publish.json")).read_text())
    assert receipt["pushes"][0]["repo"] == "me/small"
    assert TOKEN not in "".join(text for shown in (dry, done, again) for text in (shown.stdout, shown.stderr))
    for path in finished.folder.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path


def test_an_adapter_on_a_folder_is_refused_since_nobody_could_load_it(finished, hub):
    _, env = hub
    refused = finished.run("publish", "small", "--repo", "me/small", status=2, **env)
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_gguf_and_rows_of_a_run(finished, hub, tmp_path):
    server, env = hub
    here = Workspace(shutil.copytree(finished.folder, tmp_path / "work"))
    refused = here.run("publish", "small", "--repo", "me/y", "--set", "publish.what=[gguf]", status=2, **env)
    assert "publish.what: found gguf, but export is null" in refused.stderr
    asked = ("--set", "export.gguf=[q8_0, f16]")
    here.run("run", "small.yaml", *asked)
    perplexity = here.show()["stages"]["export"]["metrics"]["perplexity"]
    assert set(perplexity) == {"merged", "q8_0", "f16"}
    assert perplexity["f16"] == pytest.approx(perplexity["merged"], rel=1e-3)
    done = here.run("publish", "small", "--repo", "me/y", "--set", "publish.what=[gguf, dataset, merged]",
                    "--set", "publish.samples=2", **env)  # fmt: skip
    assert done.stdout.count("files verified") == 3
    card = server.files("me/y")["README.md"].decode()
    assert "base_model: me/y-merged" in card and "| `perplexity_gguf_f16` |" in card and "xxh3" in card
    assert str(tmp_path) not in card and "## Sample answers" in card
    rows = server.files("me/y-dataset", "dataset")
    assert {"data/train.parquet", "data/eval.parquet"} <= set(rows)
    assert str(tmp_path).encode() not in b"".join(rows.values())


def test_a_flipped_byte_is_not_pushed(finished, hub, tmp_path):
    server, env = hub
    shutil.copytree(finished.folder, tmp_path / "work")
    work = type(finished)(tmp_path / "work")
    path = next(work.folder.glob("scratch/merge/*/model.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    refused = work.run("publish", "small", "--repo", "me/flipped", "--set", "publish.what=[merged]", status=1, **env)
    assert f"cannot publish: {path}" in refused.stderr and "Traceback" not in refused.stderr
    assert not any("me/flipped" in key for key in server.repos)
