"""Counts from a model's own class on the meta device: the published ones of real models, and the formula's."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.estimate.shapes import BY_FORMULA, Shapes, shapes_of, trained_tensors
from finetune.models import inventory
from finetune.models.inventory import Inventory
from finetune.recipe import Lora
from tests.helpers import families


def sizes(hidden: int, wide: int, layers: int, heads: int, groups: int, words: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": wide, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": groups, "vocab_size": words, "tie_word_embeddings": False, **more,
    }  # fmt: skip


TIED = {"tie_word_embeddings": True}
PUBLISHED: dict[str, tuple[str, float, dict[str, Any]]] = {  # billions of parameters, as the models' pages say
    "Llama-3.1-8B": ("llama", 8.03, sizes(4096, 14336, 32, 32, 8, 128256)),
    "Mistral-7B": ("mistral", 7.24, sizes(4096, 14336, 32, 32, 8, 32000)),
    "Qwen2.5-7B": ("qwen2", 7.62, sizes(3584, 18944, 28, 28, 4, 152064)),
    "Qwen3-8B": ("qwen3", 8.19, sizes(4096, 12288, 36, 32, 8, 151936, head_dim=128)),
    "Gemma-2-9B": ("gemma2", 9.24, sizes(3584, 14336, 42, 16, 8, 256000, head_dim=256, **TIED)),
    "Phi-2": ("phi", 2.78, sizes(2560, 10240, 32, 32, 32, 51200)),
    "Phi-4-mini": ("phi3", 3.84, sizes(3072, 8192, 32, 24, 8, 200064, **TIED)),
    "pythia-6.9B": ("gpt_neox", 6.86, sizes(4096, 16384, 32, 32, 32, 50432)),
    "StarCoder2-7B": ("starcoder2", 7.17, sizes(4608, 18432, 32, 36, 4, 49152, use_bias=True, **TIED)),
    "OLMo-2-7B": ("olmo2", 7.30, sizes(4096, 11008, 32, 32, 32, 100352)),
    "Command-R7B": ("cohere2", 8.03, sizes(4096, 14336, 32, 32, 8, 256000, **TIED)),
    "Mixtral-8x7B": ("mixtral", 46.7, sizes(4096, 14336, 32, 32, 8, 32000, num_local_experts=8)),
    "Qwen3-30B-A3B": (
        "qwen3_moe", 30.5,
        sizes(2048, 6144, 48, 32, 4, 151936, head_dim=128, moe_intermediate_size=768, num_experts=128),
    ),
    "OLMoE-7B": ("olmoe", 6.92, sizes(2048, 1024, 16, 16, 16, 50304, num_experts=64)),
    "gpt-oss-20b": ("gpt_oss", 20.9, sizes(2880, 2880, 24, 64, 8, 201088, head_dim=64, num_local_experts=32)),
}  # fmt: skip


def shapes(kind: str, settings: dict[str, Any]) -> Shapes:
    found = shapes_of({"model_type": kind, **settings})
    assert found is not None
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_plan_counts_what_the_model_page_says(name: str) -> None:
    kind, billions, settings = PUBLISHED[name]
    found = shapes(kind, settings)
    assert found.parameters / 1e9 == pytest.approx(billions, rel=0.01)
    assert found.parameters == found.quantized_parameters + found.other_parameters
    counted = inventory.count({"model_type": kind, **settings})
    assert counted is not None and counted.parameters == found.parameters


def test_experts_stay_in_16_bits_and_are_said_to() -> None:
    kind, _, settings = PUBLISHED["Mixtral-8x7B"]
    found = shapes(kind, settings)
    assert found.inventory is not None and found.inventory.experts == 45_097_156_608
    assert found.quantized_parameters < 1.4e9 < 45e9 < found.other_parameters
    assert found.active_parameters == found.quantized_parameters + 2 * found.inventory.experts // 8
    assert "45.1 B of 46.7 B parameters in 16 bits" in " ".join(inventory.notes(found.inventory))
    assert shapes("llama", PUBLISHED["Llama-3.1-8B"][2]).inventory is None  # by the formula: nothing to say


@pytest.mark.parametrize("kind", BY_FORMULA)
@pytest.mark.parametrize("tied", [False, True])
def test_the_formula_counts_what_the_class_has(kind: str, tied: bool) -> None:
    config = {"model_type": kind, **sizes(64, 96, 3, 4, 2, 128, head_dim=16), "tie_word_embeddings": tied}
    by_formula, counted = shapes_of(config), inventory.count(config)
    assert by_formula is not None and counted is not None
    by_class = shapes_of({**config, "mlp_bias": True}, counted)  # what the formula does not take
    assert by_class is not None and by_class.inventory is counted
    for name in ("parameters", "quantized_parameters", "other_parameters"):
        assert getattr(by_formula, name) == getattr(by_class, name), name
    assert sorted(by_formula.matrices) == sorted(by_class.matrices)
    for lora in (Lora(r=4), Lora(r=4, targets=["q_proj"], modules_to_save=["norm", "embed_tokens"], dora=True)):
        assert sorted(trained_tensors(by_formula, lora)) == sorted(trained_tensors(by_class, lora))


def test_what_is_written_is_read_back() -> None:
    found = inventory.inventory(families.build("gemma3"))
    assert Inventory.of_json(found.as_json()) == found
    assert found.other_parts > 0 and all("vision" in n or "projector" in n for n in found.not_adapted)
    assert "the language model is trained" in inventory.notes(found)[0]


def test_a_configuration_that_transformers_does_not_have_is_not_predicted() -> None:
    assert shapes_of({"model_type": "no-such-model", **sizes(64, 96, 2, 4, 2, 128)}) is None
    assert shapes_of({"hidden_size": 64}) is None
