"""Publishing: what is staged, refused, pushed and written down."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.errors import FinetuneError, InputError
from finetune.publish.publish import repositories
from tests.helpers.hub_server import TOKEN, LoopbackHub
from tests.helpers.publishing import BASE, Act, recipe


def test_adapter_and_model_go_to_a_repository_each(hub: LoopbackHub, act: Act) -> None:
    receipt = act(recipe(what=["adapter", "merged"]))
    assert [(p["kind"], p["repo"]) for p in receipt["pushes"]] == [("adapter", "me/tiny"), ("merged", "me/tiny-merged")]
    adapter, merged = hub.files("me/tiny"), hub.files("me/tiny-merged")
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    always = {"README.md", ".gitattributes", "assets/training.svg", *tokenizer}
    weights = {"adapter_config.json", "adapter_model.safetensors", "template/template.json"}
    assert set(adapter) == weights | always
    assert set(merged) == {"config.json", "generation_config.json", "model.safetensors"} | always
    assert b"library_name: peft" in adapter["README.md"] and b"original 16-bit" in merged["README.md"]
    assert json.loads((act.run_folder / "publish.json").read_text()) == receipt
    assert receipt["pushes"][0]["commit"] == hub.repos["model", "me/tiny"].head
    assert list(act.scratch.iterdir()) == []
    assert (act.folders["merge"] / "README.md").read_text() == "an older card"


def test_the_card_shows_the_recipe_that_ran(hub: LoopbackHub, act: Act) -> None:
    act.sets.append("train.epochs=2")
    act(recipe())
    assert b"name: tiny\n# --set train.epochs=2\n" in hub.files("me/tiny")["README.md"]


def test_a_second_push_changes_nothing(hub: LoopbackHub, act: Act) -> None:
    first = act(recipe())
    assert not act(recipe())["pushes"][0]["new_commit"]
    assert len(hub.repos["model", "me/tiny"].commits) == 2
    assert any("already there" in line for line in act.said)
    assert (
        json.loads((act.run_folder / "publish.json").read_text())["pushes"][0]["commit"] == first["pushes"][0]["commit"]
    )


def test_a_dry_run_shows_everything_and_touches_no_network(hub: LoopbackHub, act: Act) -> None:
    shown = act(recipe(what=["merged", "adapter"]), dry_run=True)
    assert [p["repo"] for p in shown["pushes"]] == ["me/tiny", "me/tiny-adapter"]
    assert {"path": "model.safetensors", "bytes": 14} in shown["pushes"][0]["files"]
    assert shown["pushes"][0]["card"].startswith("---\n")
    assert f"base_model: {BASE}" in shown["pushes"][1]["card"]
    assert hub.requests == [] and not (act.run_folder / "publish.json").exists()


def test_the_first_push_is_on_record_when_the_second_fails(hub: LoopbackHub, act: Act) -> None:
    hub.fail("POST", "tiny-merged/commit", status=403)
    with pytest.raises(InputError):
        act(recipe(what=["adapter", "merged"]))
    assert [p["repo"] for p in json.loads((act.run_folder / "publish.json").read_text())["pushes"]] == ["me/tiny"]
    assert list(act.scratch.iterdir()) == []


def test_the_token_is_in_no_file_and_no_line(hub: LoopbackHub, act: Act, tmp_path: Path, capfd: Any) -> None:
    act(recipe(what=["adapter", "merged"]))
    files = [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()]
    pushed = [c for repo in hub.repos.values() for c in repo.commits[repo.head].values()]
    assert TOKEN.encode() not in b"".join(files + pushed)
    assert TOKEN not in "".join(act.said) + "".join(capfd.readouterr())


def test_a_file_system_without_links_gets_copies(hub: LoopbackHub, act: Act, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    act(recipe())
    assert hub.files("me/tiny")["adapter_model.safetensors"] == b"adapter weights"


def test_a_copy_that_does_not_fit_is_refused(hub: LoopbackHub, act: Act, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=3))
    with pytest.raises(FinetuneError, match="--scratch"):
        act(recipe())
    assert hub.asked("POST", "") == 0


# --- refusals: nothing has been sent when they fire


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base_model_name_or_path": "/root/.cache/hub/models--x"}, "a path of this machine"),
        ({"layers": ["C:\\models\\x"]}, "a path of this machine"),
        ({"base_model_name_or_path": "other/base"}, "trained on"),
        ({"revision": None}, "trained on"),
    ],
)
def test_an_adapter_that_names_another_base_is_refused(
    hub: LoopbackHub, act: Act, changes: dict[str, object], words: str
) -> None:
    rewrite(act.folders["train"] / "adapter" / "adapter_config.json", **changes)
    with pytest.raises(InputError, match=words):
        act(recipe())
    assert hub.requests == []


def test_local_paths_in_a_merged_model_are_refused(hub: LoopbackHub, act: Act) -> None:
    rewrite(act.folders["merge"] / "config.json", _name_or_path="/tmp/scratch/base")
    with pytest.raises(InputError, match="_name_or_path"):
        act(recipe(what=["merged"]))
    assert hub.requests == []


def test_the_second_kind_is_looked_at_before_the_first_is_pushed(hub: LoopbackHub, act: Act) -> None:
    rewrite(act.folders["merge"] / "config.json", _name_or_path="/tmp/scratch/base")
    with pytest.raises(InputError):
        act(recipe(what=["adapter", "merged"]))
    assert hub.requests == []


def test_an_adapter_over_a_local_folder_is_refused_and_the_model_is_not(hub: LoopbackHub, act: Act) -> None:
    (act.folders["base"] / "base.json").write_text(
        json.dumps({"id": "folder:mine", "kind": "folder", "revision": None})
    )
    with pytest.raises(InputError, match=r"what: \[merged\]"):
        act(recipe())
    assert act(recipe(what=["merged"]))["pushes"][0]["new_commit"]


def test_a_builtin_base_can_be_published(hub: LoopbackHub, act: Act) -> None:
    base = {"id": "builtin:tiny-mistral", "kind": "builtin", "revision": None}
    (act.folders["base"] / "base.json").write_text(json.dumps(base))
    rewrite(act.folders["train"] / "adapter" / "adapter_config.json", base_model_name_or_path=base["id"], revision=None)
    assert act(recipe())["pushes"][0]["new_commit"]


def test_a_credential_in_a_file_is_refused(hub: LoopbackHub, act: Act) -> None:
    rewrite(act.folders["merge"] / "config.json", note=TOKEN)
    with pytest.raises(InputError, match="Hugging Face token") as error:
        act(recipe(what=["merged"]))
    assert TOKEN not in str(error.value) and hub.requests == []


def test_a_link_out_of_the_folder_is_refused(hub: LoopbackHub, act: Act, tmp_path: Path) -> None:
    (tmp_path / "private.txt").write_text("private")
    (act.folders["merge"] / "notes.txt").symlink_to(tmp_path / "private.txt")
    with pytest.raises(InputError, match="outside its folder"):
        act(recipe(what=["merged"]))
    assert hub.requests == []


@pytest.mark.parametrize("missing", ["train", "base"])
def test_a_stage_that_is_not_finished_is_named(act: Act, missing: str) -> None:
    del act.folders[missing]
    with pytest.raises(InputError, match=missing):
        act(recipe(), dry_run=True)


def test_weights_that_are_gone_are_named(act: Act) -> None:
    (act.folders["merge"] / "model.safetensors").unlink()
    with pytest.raises(InputError, match="safetensors"):
        act(recipe(what=["merged"]), dry_run=True)


def test_repositories_are_named_after_the_first() -> None:
    assert repositories(recipe(what=["merged"]), None) == {"merged": "me/tiny"}
    assert repositories(recipe(what=["merged", "adapter"]), "lab/y") == {"merged": "lab/y", "adapter": "lab/y-adapter"}
    with pytest.raises(InputError, match=r"publish\.repo"):
        repositories(recipe(repo=None), None)
    with pytest.raises(InputError, match="OWNER/NAME"):
        repositories(recipe(), "no-owner")
