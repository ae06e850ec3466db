"""After a push: what the Hub serves is loaded by the real client and must be what was trained."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune.errors import GateRefused, InputError
from tests.helpers.base_templates import CHATML
from tests.helpers.hub_server import LoopbackHub
from tests.helpers.publishing import Act, recipe


def test_a_hub_that_serves_another_template_is_refused(hub: LoopbackHub, act: Act) -> None:
    hub.served["chat_template.jinja"] = CHATML.replace("<|im_start|>", "<|im_open|>").encode()
    with pytest.raises(GateRefused, match=r"me/tiny at [0-9a-f]{12} differs from the trained model: the chat template"):
        act(recipe(what=["merged"]))
    pushes = json.loads((act.run_folder / "publish.json").read_text())["pushes"]
    assert pushes[0]["commit"] == hub.repos["model", "me/tiny"].head and "loaded" not in pushes[0]
    hub.served.clear()
    assert act(recipe(what=["merged"]))["pushes"][0]["loaded"]  # the gate is silent


@pytest.mark.parametrize(
    ("kind", "path", "change", "words"),
    [
        ("merged", "generation_config.json", {"eos_token_id": 0}, r"answers end at tokens \[0\], trained to end at"),
        ("merged", "config.json", {"hidden_size": 128}, r"config\.json is another"),
        ("merged", "config.json", {"model_type": "nothing"}, "it does not load"),
        ("adapter", "tokenizer_config.json", {"pad_token": "<|im_end|>"}, r"the pad token is '<\|im_end\|>'"),
        ("adapter", "adapter_config.json", {"lora_alpha": 99}, r"adapter_config\.json is another"),
        ("adapter", "template/template.json", {"terminators": [1]}, r"answers end at tokens \[1\]"),
    ],
    ids=["terminators", "config", "unreadable", "pad", "adapter", "adapter terminators"],
)
def test_a_hub_that_serves_other_settings_is_refused(
    hub: LoopbackHub, act: Act, kind: str, path: str, change: dict[str, object], words: str
) -> None:
    folder = act.folders["merge"] if kind == "merged" else act.folders["train"] / "adapter"
    hub.served[path] = json.dumps({**json.loads((folder / path).read_text()), **change}).encode()
    with pytest.raises(GateRefused, match=words):
        act(recipe(what=[kind]))


def test_a_model_that_was_wrong_before_the_push_is_found_after_it(hub: LoopbackHub, act: Act) -> None:
    (act.folders["merge"] / "chat_template.jinja").write_text("{{ messages }}")  # every hash will be equal
    with pytest.raises(GateRefused, match="the chat template is another"):
        act(recipe(what=["merged"]))


def test_a_template_for_tools_beside_the_trained_one_is_no_difference(hub: LoopbackHub, act: Act) -> None:
    for folder in (act.folders["merge"], act.folders["train"] / "adapter"):
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    assert all(push["loaded"] for push in act(recipe(what=["adapter", "merged"]))["pushes"])
    assert "additional_chat_templates/tool_use.jinja" in hub.files("me/tiny")


def test_only_the_small_files_are_downloaded(hub: LoopbackHub, act: Act) -> None:
    pushes = act(recipe(what=["adapter", "merged"]))["pushes"]
    assert pushes[0]["loaded"] == ["tokenizer", "chat template", "config"]
    assert pushes[1]["loaded"] == ["tokenizer", "chat template", "config", "generation config"]
    assert hub.asked("GET", r"safetensors") == hub.asked("HEAD", r"safetensors") == 0


@pytest.mark.parametrize("answer", [{"status": 503}, {"status": 429}, {"drop": "before"}], ids=["503", "429", "drop"])
def test_reading_back_survives_a_passing_failure(hub: LoopbackHub, act: Act, answer: dict[str, Any]) -> None:
    hub.fail("GET", "/resolve/.*/config.json", **answer)
    assert act(recipe(what=["merged"]))["pushes"][0]["loaded"]


def test_reading_back_that_fails_for_good_leaves_the_receipt(hub: LoopbackHub, act: Act) -> None:
    hub.fail("HEAD", "/resolve/", times=1000, status=403)
    hub.fail("GET", "/resolve/", times=1000, status=403)
    with pytest.raises(InputError, match=r"cannot read back model me/tiny: the token lacks this permission \(403\)"):
        act(recipe(what=["merged"]))
    assert json.loads((act.run_folder / "publish.json").read_text())["pushes"][0]["repo"] == "me/tiny"
