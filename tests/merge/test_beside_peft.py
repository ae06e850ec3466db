"""Every variant of an adapter on every shape of base: our merge beside peft's, after rounding to each output dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.errors import InputError
from finetune.merge.plan import plan_merge
from tests.helpers.merge_reference import (
    VARIANTS,
    assert_as_near,
    plain_with_addends,
    read,
    scale_of,
    tensors_of,
    write,
)
from tests.helpers.merged import merged_tensors
from tests.helpers.tiny_models import VOCABULARY, adapted, load, save_tiny

TIED = {"tie_word_embeddings": True}
GEMMA2 = {"query_pre_attn_scalar": 16, "attention_bias": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # biases wherever the architecture can have them: Mistral cannot
    "mistral": ("mistral", {"tie_word_embeddings": False}),
    "mistral_tied": ("mistral", TIED),
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "llama_tied": ("llama", {"attention_bias": True, "mlp_bias": True, **TIED}),
    "qwen2": ("qwen2", {"tie_word_embeddings": False}),
    "qwen2_tied": ("qwen2", TIED),
    "gemma2": ("gemma2", {**GEMMA2, "tie_word_embeddings": False}),
    "gemma2_tied": ("gemma2", {**GEMMA2, **TIED}),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
IDS = torch.arange(40).reshape(2, 20) * 3 % VOCABULARY


def peft_is_right(model: str, variant: str) -> bool:
    """peft merges an adapted embedding into the tensor that a tied head shares, which it had not trained (0.21.2)."""
    return not (model.endswith("_tied") and variant.startswith("embedding"))


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """The folder of each base, and the model loaded from it, made once."""

    @cache
    def made(name: str) -> tuple[Path, Any]:
        kind, config = MODELS[name]
        folder = save_tiny(tmp_path_factory.mktemp(name), kind, **config)
        return folder, load(folder)

    return made


def cases() -> Iterator[Any]:
    """Every pair; what a tie cannot touch is slow on the tied bases, for the others have it already."""
    ends = {"modules_to_save", "saved_embedding", "embedding", "embedding_dora", "tokens"}
    for variant in VARIANTS:
        for name in MODELS:
            again = name.endswith("_tied") and variant not in ends
            yield pytest.param(name, variant, marks=pytest.mark.slow if again else ())


@pytest.mark.parametrize(("name", "variant"), cases())
def test_our_merge_is_pefts(tmp_path: Path, base_of: Any, name: str, variant: str) -> None:
    """bfloat16, float16 and float32. Where peft's own merge is wrong, float64 arithmetic takes its place."""
    base, loaded = base_of(name)
    adapter = tmp_path / "adapter"
    model = adapted(copy.deepcopy(loaded), adapter, **VARIANTS[variant])
    if name.startswith("mistral") and variant == "lora_bias":
        with pytest.raises(InputError, match=r"proj\.bias, which neither the base nor the merged model has"):
            plan_merge(base, adapter, "float32")
        with pytest.raises(RuntimeError, match="base layer has no bias"):
            model.merge_and_unload()
        return
    with torch.no_grad():
        trained = model(IDS).logits
    original, tensors = read(base), tensors_of(adapter)
    exact, addends = plain_with_addends(original, tensors, scale_of(VARIANTS[variant]))
    theirs = exact
    if peft_is_right(name, variant):
        theirs = model.merge_and_unload().state_dict()
    for dtype in DTYPES:
        ours = dict(merged_tensors(plan_merge(base, adapter, dtype)))
        assert set(original) <= set(ours) <= set(exact)
        assert all(value.dtype == DTYPES[dtype] for value in ours.values())
        assert_as_near(ours, theirs, exact, addends)
    assert any(not torch.equal(ours[n], value) for n, value in original.items())
    with torch.no_grad():
        torch.testing.assert_close(
            load(write(base, adapter, tmp_path / "merged"))(IDS).logits, trained, rtol=1e-4, atol=1e-4
        )


def test_where_peft_is_said_to_be_wrong_it_is(tmp_path: Path, base_of: Any) -> None:
    model = adapted(copy.deepcopy(base_of("qwen2_tied")[1]), tmp_path, **VARIANTS["embedding"])
    with torch.no_grad():
        trained = model(IDS).logits
        merged = model.merge_and_unload()(IDS).logits
    assert float((trained - merged).abs().max()) > 0.1


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_layers_that_are_stored_transposed(tmp_path: Path, variant: str) -> None:
    """fan_in_fan_out proper: of the architectures above none has such layers, GPT-2 has no others."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=1, eos_token_id=2)).save_pretrained(base)
    targets = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    model = adapted(load(base), adapter, **targets, **VARIANTS[variant])
    with torch.no_grad():
        trained = model(IDS).logits
    stored = {n.removeprefix("transformer."): t for n, t in tensors_of(adapter).items()}
    original = {n.removeprefix("transformer."): t for n, t in read(base).items()}
    original["model.embed_tokens.weight"] = original["wte.weight"]
    exact, addends = plain_with_addends(original, stored, scale_of({}), transposed=True)
    theirs = {n.removeprefix("transformer."): t for n, t in model.merge_and_unload().state_dict().items()}
    for dtype in DTYPES:
        ours = {n.removeprefix("transformer."): t for n, t in merged_tensors(plan_merge(base, adapter, dtype))}
        assert_as_near(ours, theirs, exact, addends)
    with torch.no_grad():
        torch.testing.assert_close(
            load(write(base, adapter, tmp_path / "merged"))(IDS).logits, trained, rtol=1e-4, atol=1e-4
        )
