"""Parameters and matrices of a base, counted on its own class on the meta device: no weight is read or allocated."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import InputError
from finetune.models.architecture import POSITIONS, every_linear, linear_names
from finetune.utils.files import canonical_json, read_json
from finetune.utils.upstream import kept_in_fp32

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

FILE = "architecture.json"  # in the base stage's folder; beside the inventory it holds the facts of models/trial.py


@dataclass(frozen=True, slots=True)
class Inventory:
    """Sizes of one causal language model, in elements; tied tensors count once."""

    parameters: int
    quantized: Mapping[str, tuple[int, int]]  # modules that bitsandbytes stores in 4 bits: name → (in, out)
    experts: int  # elements of matrices that are no linear modules (3-D parameters of fused experts)
    other_linears: Mapping[str, tuple[int, int]]  # linear modules that stay in 16 bits, the head left out
    modules: Mapping[str, int]  # every other module with parameters of its own → their elements
    sizes: Mapping[str, int]  # of the language model, by the names in `SIZES`
    tied: bool
    not_adapted: tuple[str, ...] = ()  # linear modules that no adapter can go to
    other_parts: int = 0  # elements outside the language model and its head: a vision tower, say

    @property
    def active_experts(self) -> int:
        """Elements of experts that one token passes through."""
        experts = self.sizes["experts"]
        return self.experts * self.sizes["experts_per_token"] // experts if experts else self.experts

    @classmethod
    def of_json(cls, raw: Mapping[str, Any]) -> Inventory:
        """The inventory that `as_json` wrote."""
        pairs = {k: {n: (i, o) for n, (i, o) in raw[k].items()} for k in ("quantized", "other_linears")}
        return cls(**{**raw, **pairs, "not_adapted": tuple(raw["not_adapted"])})

    def as_json(self) -> dict[str, Any]:
        """A JSON object, the same for the same model."""
        pairs = {k: {n: list(v) for n, v in sorted(getattr(self, k).items())} for k in _PAIRS}
        return {**asdict(self), **pairs, "not_adapted": list(self.not_adapted)}


_PAIRS = ("quantized", "other_linears")
SIZES: Mapping[str, tuple[str, ...]] = {  # size → attributes of transformers' configuration, the first there is
    "hidden": ("hidden_size",),
    "layers": ("num_hidden_layers",),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads", "num_attention_heads"),
    "head_dim": ("head_dim", "v_head_dim"),
    "intermediate": ("intermediate_size", "ffn_dim", "n_inner"),
    "expert_intermediate": ("moe_intermediate_size", "intermediate_size"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "experts_per_token": ("num_experts_per_tok", "top_k", "moe_k"),
    "vocabulary": ("vocab_size",),
    "positions": POSITIONS,
    "window": ("sliding_window",),
}


def read_inventory(base: Path) -> Inventory | None:
    """Return the base stage's counts; None in a folder of an earlier version."""
    path = base / FILE
    return Inventory.of_json(read_json(path)["inventory"]) if path.is_file() else None


def why_not_packed(base: Path) -> str | None:
    """Why documents cannot be packed with the base that is pinned in the folder `base`; None if they can, or if an
    earlier version of the stage did not try.
    """
    path = base / FILE
    reason: str | None = read_json(path).get("packing") if path.is_file() else None
    return reason


def why_not_trained(base: Path, *, quantized: bool) -> str | None:
    """Why the base that is pinned in the folder `base` cannot be trained, in 4 bits if `quantized`; None if it can."""
    path = base / FILE
    facts = read_json(path) if path.is_file() else {}
    if facts.get("training"):
        return f"this architecture cannot be trained here: {facts['training']}"
    if quantized and facts.get("quantized"):
        return f"this architecture cannot be trained in 4 bits: {facts['quantized']}; set quantization: null"
    return None


def count(config: Mapping[str, Any]) -> Inventory | None:
    """The inventory of the model that a config.json describes; None if transformers has no such model.

    Cached by the content of `config`. Imports transformers.
    """
    return _count(canonical_json(config))


@functools.lru_cache(maxsize=16)
def _count(content: str) -> Inventory | None:
    import torch
    import transformers

    settings = {k: v for k, v in json.loads(content).items() if k not in ("auto_map", "quantization_config")}
    auto: Any = transformers.AutoModelForCausalLM
    try:
        config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
        with torch.device("meta"):
            model = auto.from_config(config)
    except (KeyError, ValueError, TypeError, ImportError, AttributeError, RuntimeError):
        return None
    return inventory(model)


def inventory(model: PreTrainedModel) -> Inventory:
    """Count `model`, built without weights; it is not changed but for its ties."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    model.tie_weights()
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    skipped = not_quantized(model)
    quantized: dict[str, tuple[int, int]] = {}
    others: dict[str, tuple[int, int]] = {}
    modules: dict[str, int] = {}
    counted: set[int] = set()
    experts = 0
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in counted]
        counted |= {id(p) for p in own}
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            outer, inner = module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
            place = quantized if _is_quantized(name, module, skipped) else others
            place[name] = (int(inner), int(outer))
        elif own or module is head:
            modules[name] = sum(p.numel() for p in module.parameters(recurse=False))
            if not isinstance(module, nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d):
                experts += sum(p.numel() for p in own if p.ndim >= 3)
    parameters = sum(p.numel() for p in model.parameters())
    sizes = _sizes(model)
    tied = head is not None and any(p is q for p in head.parameters() for q in embedding.parameters())
    return Inventory(
        parameters=parameters,
        quantized=quantized,
        experts=experts if sizes["experts"] else 0,
        other_linears=others,
        modules=modules,
        sizes=sizes,
        tied=tied,
        not_adapted=tuple(sorted(set(every_linear(model)) - set(linear_names(model)))),
        other_parts=parameters - _language_parameters(model),
    )


def _sizes(model: PreTrainedModel) -> dict[str, int]:
    """The sizes of the language model; 0 for one that the configuration does not have."""
    text = model.config.get_text_config(decoder=True)
    values = {name: [getattr(text, a, None) for a in attributes] for name, attributes in SIZES.items()}
    sizes = {name: next((v for v in given if isinstance(v, int)), 0) for name, given in values.items()}
    if getattr(text, "use_sliding_window", True) is False:
        sizes["window"] = 0
    if not sizes["head_dim"] and sizes["heads"]:
        sizes["head_dim"] = sizes["hidden"] // sizes["heads"]
    return sizes


def _language_parameters(model: PreTrainedModel) -> int:
    """Elements of the text decoder and the head; those of the whole model if it has no other part."""
    decoder: Any = model.get_decoder()
    if decoder is None or decoder is model:
        return sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings()
    inside = {id(p): p.numel() for m in (decoder, head, model.get_input_embeddings()) if m for p in m.parameters()}
    return sum(inside.values())


def not_quantized(model: PreTrainedModel) -> list[str]:
    """Patterns of module names that transformers keeps out of bitsandbytes: the head, tied and last modules."""
    from transformers.quantizers.base import get_keys_to_not_convert

    return [*get_keys_to_not_convert(model), *kept_in_fp32(model)]


def _is_quantized(name: str, module: nn.Module, skipped: list[str]) -> bool:
    """Return the choice of `replace_with_bnb_linear` without importing bitsandbytes: exact linear modules and
    Conv1D.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    return (isinstance(module, Conv1D) or type(module) is nn.Linear) and should_convert_module(name, skipped)


def elements(pairs: Mapping[str, tuple[int, int]]) -> int:
    """Elements of the matrices of `pairs`."""
    return sum(prod(pair) for pair in pairs.values())


def notes(counts: Inventory, config: Mapping[str, Any] | None = None) -> list[str]:
    """Return a sentence for each part of a base with this config.json that training leaves alone."""
    sentences: list[str] = []
    config = config or {}
    beside = [n.removesuffix("_config") for n, v in config.items() if n.endswith("_config") and isinstance(v, Mapping)]
    beside = [n for n in beside if n not in ("text", "quantization", "generation")] if "text_config" in config else []
    if beside and not counts.other_parts:
        sentences.append(
            f"the language model is trained; the other parts ({', '.join(beside)}) are not loaded, and carried through "
            "the merge as they are"
        )
    if counts.other_parts:
        sentences.append(
            f"the language model is trained; the other parts ({counts.other_parts / 1e6:,.0f} M parameters: a vision "
            "tower, say) are left alone and carried through the merge"
        )
    if counts.experts:
        sentences.append(
            f"its experts hold {counts.experts / 1e9:.3g} B of {counts.parameters / 1e9:.3g} B parameters in 16 bits: "
            "they are neither quantised nor trained"
        )
    if not counts.quantized:
        sentences.append("bitsandbytes stores none of its matrices in 4 bits: the whole base stays in 16 bits")
    return sentences


def require_inventory(model: PreTrainedModel, where: str) -> Inventory:
    """`inventory`, or InputError if the model has no linear module that an adapter could go to."""
    counts = inventory(model)
    if not counts.quantized and not counts.other_linears:
        raise InputError(f"{where}: the model has no linear module that an adapter could go to")
    return counts
