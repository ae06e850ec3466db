"""What a merge must give, written out once more in float64: nothing here is shared with what is tested."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from finetune.merge.blocks import merged_pieces
from finetune.merge.plan import plan_merge
from finetune.utils.safetensors_io import plan_shards, write_shards

State = dict[str, torch.Tensor]
Scale = Callable[[str, int], float]
PREFIX = "base_model.model."
TOKENS = [3, 70, 5]
LAST_PLACES = 4
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"layers.1.self_attn.q_proj": 8},
        "alpha_pattern": {r".*\.0\..*down_proj": 3, "down_proj": 5},
    },
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "bias_all": {"bias": "all"},
    "bias_lora_only": {"bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["norm", "lm_head"]},
    "saved_embedding": {"modules_to_save": ["embed_tokens"]},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "embedding_dora": {"target_modules": ["embed_tokens", "v_proj"], "use_dora": True},
    "tokens": {"trainable_token_indices": TOKENS},
    "all_linear": {"target_modules": "all-linear"},
    "fan_in_fan_out": {"fan_in_fan_out": True},  # peft takes it back for layers that are not stored transposed
}


def read(folder: Path) -> State:
    return load_file(folder / "model.safetensors")


def tensors_of(adapter: Path) -> State:
    return {k.removeprefix(PREFIX): v for k, v in load_file(adapter / "adapter_model.safetensors").items()}


def write(base: Path, adapter: Path, out: Path) -> Path:
    """Merge in fp32 into a folder that transformers can load."""
    plan = plan_merge(base, adapter, "float32")
    out.mkdir()
    shards = plan_shards(plan.shapes, 10**9)
    write_shards(out, shards, merged_pieces(plan, [t.name for t in shards.tensors]))
    config = json.loads((base / "config.json").read_text())
    if plan.untie:
        config["tie_word_embeddings"] = False
    (out / "config.json").write_text(json.dumps(config))
    return out


def scale_of(variant: dict[str, Any]) -> Scale:
    def scale(module: str, rank: int) -> float:
        if "alpha_pattern" in variant and module.endswith("down_proj"):
            return 3 / rank if ".0." in module else 5 / rank
        return 12 / (rank**0.5 if variant.get("use_rslora") else rank)

    return scale


def plain(base: State, adapter: State, scale: Scale, transposed: bool = False) -> State:
    """The merged state in float64. `transposed`: the adapted layers store (in, out)."""
    return plain_with_addends(base, adapter, scale, transposed)[0]


def plain_with_addends(base: State, adapter: State, scale: Scale, transposed: bool = False) -> tuple[State, State]:
    """The merged state in float64, and for each element the sum of the magnitudes it is added up from.

    float32 rounds each partial sum, so a result that is small beside its addends (cancellation) can be told no more
    exactly than to a last place of these.
    """
    out = {name: value.double() for name, value in base.items()}
    if "lm_head.weight" not in out:
        out["lm_head.weight"] = out["model.embed_tokens.weight"].clone()
    addends = {name: value.abs() for name, value in out.items()}
    for key, value in adapter.items():
        module, _, part = key.rpartition(".lora_")
        if part in ("A.weight", "embedding_A"):
            a, b = value.double(), adapter[key.replace("_A", "_B")].double()
            turn = transposed or part == "embedding_A"
            factor = scale(module, len(a))
            name = f"{module}.weight"
            delta, sizes = b @ a, b.abs() @ a.abs()
            out[name] = out[name] + factor * (delta.T if turn else delta)
            addends[name] = addends[name] + factor * (sizes.T if turn else sizes)
            if f"{module}.lora_magnitude_vector" in adapter:
                along = 0 if turn else 1
                lengths = adapter[f"{module}.lora_magnitude_vector"].double() / out[name].norm(dim=along)
                out[name], addends[name] = (
                    out[name] * lengths.unsqueeze(along),
                    addends[name] * lengths.abs().unsqueeze(along),
                )
        elif part == "B.bias":
            added = scale(module, len(adapter[f"{module}.lora_A.weight"])) * value.double()
            out[f"{module}.bias"] = out[f"{module}.bias"] + added
            addends[f"{module}.bias"] = addends[f"{module}.bias"] + added.abs()
        elif key.endswith(".token_adapter.trainable_tokens_delta"):
            name = key.removesuffix(".token_adapter.trainable_tokens_delta") + ".weight"
            out[name][TOKENS] = value.double()
        elif (name := key.replace(".base_layer", "")) in out:
            out[name] = value.double()
            addends[name] = value.double().abs()
    return out, addends


def last_places(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """How many representable values of their dtype lie between two tensors, element by element, int64."""
    integer, bits = (torch.int32, 31) if first.dtype == torch.float32 else (torch.int16, 15)

    def ordered(value: torch.Tensor) -> torch.Tensor:
        raw = value.contiguous().view(integer).long()
        return torch.where(raw < 0, -(raw & ((1 << bits) - 1)), raw)

    return (ordered(first) - ordered(second)).abs()


def assert_as_near(ours: State, theirs: State, exact: State, addends: State) -> None:
    """Each element is bitwise `theirs`, or the value next to it, save where float32 sums of another order must differ.

    Such sums differ by last places, in float32, of the magnitudes they are added up from, which are many of the
    result's own where that is small beside its addends (cancellation: under 1 in 1,000 elements once rounded to 16
    bits, up to a third in float32). There both are held against `exact` (float64): ours may be further from it by
    at most LAST_PLACES of the addends (3.1 found, on an Intel Xeon), and over a tensor is about as near on average.
    """
    for name, value in ours.items():
        other, narrow = theirs[name].to(value.dtype), value.dtype != torch.float32
        apart = last_places(value, other) > 1
        own, others = ((x.double() - exact[name]).abs() for x in (value, other))
        further = ((own - others) / torch.finfo(torch.float32).eps / addends[name].clamp(min=1e-30))[apart]
        assert not apart.any() or float(further.max()) <= LAST_PLACES, f"{name}: {float(further.max()):.3g}"
        if theirs is not exact:
            assert float(own.mean()) <= float(others.mean()) * 1.5 + 1e-12, f"{name}: {own.mean()}, {others.mean()}"
        assert int(apart.sum()) <= (1 + apart.numel() // 1000 if narrow else apart.numel() // 2), name
