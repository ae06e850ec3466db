"""The dimensions shipped for the bases our recipes name are those of the real models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.models.architecture import known_modules

SHAPES = Path(__file__).parents[2] / "recipes" / "shapes"
PUBLISHED = {  # parameter counts as the Hub shows them for each repository's safetensors
    "mistralai/Mistral-7B-Instruct-v0.2": 7_241_732_096,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
}


def read(name: str) -> dict[str, Any]:
    return json.loads((SHAPES / f"{name.replace('/', '--')}.json").read_text())


def test_every_shape_is_checked_here() -> None:
    assert {read(p.stem.replace("--", "/"))["id"] for p in SHAPES.glob("*.json")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_architecture_of_these_dimensions_has_the_published_parameters(name: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = read(name)
    assert known_modules(shape) is not None  # so that an adapter is checked before the base is there
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "tie_word_embeddings",
    )  # fmt: skip
    with torch.device("meta"):
        config = AutoConfig.for_model(shape["model_type"], **{n: shape[n] for n in names})
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == shape["parameters"] == PUBLISHED[name]
    attention = model.model.layers[0].self_attn
    assert attention.head_dim == shape["head_dim"]
    assert (attention.q_proj.bias is not None) == shape["attention_bias"]
    assert shape["weight_bytes"] == 2 * shape["parameters"]
