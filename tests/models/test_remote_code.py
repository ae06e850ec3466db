"""A base whose class comes with its repository: pinned, looked at, trained over, merged and loaded with its code."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune.errors import InputError
from finetune.lora import config as lora_config
from finetune.models import loading
from finetune.models.layerwise import empty_model
from finetune.publish import verify
from finetune.recipe import Lora, Merge, Model
from finetune.stages import base, merge
from finetune.utils.files import read_json, write_json
from tests.helpers.tiny_models import save_adapter, save_tiny
from tests.helpers.tiny_tokenizers import build
from tests.stages.finished import context

CONFIGURATION = """
from transformers import MistralConfig
from .names import KIND

class OwnConfig(MistralConfig):
    model_type = KIND
"""
MODELING = """
from transformers import MistralForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(MistralForCausalLM):
    config_class = OwnConfig
"""
AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


def with_code(folder: Path, model_type: str) -> Path:
    """A base with code beside its weights; only it knows a `model_type` that transformers does not."""
    tokenizer = build("byte_level")
    save_tiny(folder, "mistral", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    config = {**read_json(folder / "config.json"), "model_type": model_type, "auto_map": AUTO_MAP}
    write_json(folder / "config.json", {**config, "architectures": ["OwnForCausalLM"]})
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODELING)
    (folder / "names.py").write_text(f"KIND = {model_type!r}\n")
    return folder


def finished(
    root: Path, model_type: str, trust: bool, given: Path | None = None
) -> tuple[dict[str, Path], Model, list[str]]:
    """The base stage's folder, an adapter on it, and the merged folder `out`."""
    folder = given or with_code(root / "given", model_type)
    model = Model.model_validate({"id": str(folder), "trust_remote_code": trust}, context={"folder": str(root)})
    said: list[str] = []
    for name in ("base", "out"):
        (root / name).mkdir()
    ctx = dataclasses.replace(context(root), say=said.append)
    base.run(base.Spec(model=model), {}, root / "base", ctx)
    plain = save_tiny(root / "plain", "mistral", vocab_size=read_json(folder / "config.json")["vocab_size"])
    save_adapter(plain, root / "train" / "adapter")
    inputs = {"base": root / "base", "train": root / "train", "certify": root / "none"}
    merge.run(merge.Spec(model=model, quantization=None, merge=Merge()), inputs, root / "out", ctx)
    return inputs, model, said


def test_with_trust_the_code_travels(tmp_path: Path) -> None:
    inputs, model, said = finished(tmp_path, "own_mistral", True)
    lora_config.check_targets(Lora(), inputs["base"], True)  # before any weight is read
    assert type(empty_model(inputs["base"], trust_remote_code=True)).__name__ == "OwnForCausalLM"
    loaded = loading.load_base(model, inputs["base"], context(tmp_path), None, "fp32", "cpu")
    assert type(loaded).__name__ == "OwnForCausalLM"
    out = tmp_path / "out"
    assert {p.name for p in out.glob("*.py")} == {"configuration_own.py", "modeling_own.py", "names.py"}
    assert json.loads((out / "config.json").read_text())["auto_map"] == AUTO_MAP
    merged: Any = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    assert type(merged).__name__ == "OwnForCausalLM"
    with torch.no_grad():
        expected = loading.attach_adapter(loaded, inputs["train"] / "adapter")(torch.arange(5, 30)[None]).logits
        torch.testing.assert_close(merged(torch.arange(5, 30)[None]).logits, expected, rtol=1e-4, atol=1e-4)
    assert not [line for line in said if "auto_map" in line]
    assert not list(verify._config(out, out, {}))  # read back after a push, without running any of that code
    write_json(inputs["base"] / "config.json", {**read_json(out / "config.json"), "hidden_size": 8})
    assert list(verify._config(inputs["base"], out, {})) == ["config.json is another"]


def armed(folder: Path, ran: Path) -> None:
    """Have every Python file beside the weights, the tokenizer's too, leave a mark when it is run."""
    (folder / "tokenization_own.py").write_text("from transformers import PreTrainedTokenizerFast as OwnTokenizer\n")
    settings = read_json(folder / "tokenizer_config.json")
    write_json(
        folder / "tokenizer_config.json",
        {**settings, "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}},
    )
    for code in folder.glob("*.py"):
        code.write_text(f"open({str(ran)!r}, 'a').write(__name__)\n{code.read_text()}")


@pytest.mark.parametrize("trust", [False, True])
def test_code_runs_where_the_recipe_says_so_and_nowhere_else(trust: bool, tmp_path: Path) -> None:
    """With trust, so that the mark is known to show a run; without, from the base to the merged model's loading."""
    ran = tmp_path / "ran"
    given = with_code(tmp_path / "given", "mistral")
    armed(given, ran)
    inputs, model, _ = finished(tmp_path, "mistral", trust, given)
    lora_config.check_targets(Lora(), inputs["base"], trust)
    loaded = loading.load_base(model, inputs["base"], context(tmp_path), None, "fp32", "cpu")
    loading.load_tokenizer(inputs["base"])
    assert type(loaded).__name__ == ("OwnForCausalLM" if trust else "MistralForCausalLM")
    assert ran.exists() is trust


def test_a_base_that_only_its_own_code_knows_is_refused_without_running_it(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    given = with_code(tmp_path / "given", "own_mistral")
    armed(given, ran)
    with pytest.raises(InputError, match="trust_remote_code"):
        finished(tmp_path, "own_mistral", False, given)
    assert not ran.exists()


def test_without_trust_nothing_names_code_that_is_not_there(tmp_path: Path) -> None:
    _, _, said = finished(tmp_path, "mistral", False)
    out = tmp_path / "out"
    assert not list(out.glob("*.py")) and "auto_map" not in json.loads((out / "config.json").read_text())
    assert [line for line in said if "auto_map" in line and "model.trust_remote_code" in line]
    merged = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert type(merged).__name__ == "MistralForCausalLM"
