"""The quantised formats of a Hugging Face folder: names, sizes, settings, and which models have one. No torch.

fp8 and w4a16 are those of compressed-tensors (https://github.com/vllm-project/compressed-tensors), nf4 is that of
bitsandbytes (https://huggingface.co/docs/transformers/quantization/bitsandbytes).
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from finetune.recipe.outlets import HfKind

GROUP, BLOCK = 128, 64  # weights per scale: w4a16, nf4
MULTIPLE: Mapping[HfKind, int] = {"fp8": 16, "w4a16": GROUP, "nf4": BLOCK}  # of every input width
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
FP8_WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
FP8_INPUTS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
INT4_WEIGHTS = {
    "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP, "dynamic": False,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor that replaces a weight: what is appended to the weight's name, safetensors code, shape."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]


def missing(kinds: Iterable[HfKind]) -> str | None:
    """Return the package that a format needs and that is not installed, with its fix; None if nothing is missing."""
    if not {"fp8", "w4a16"} & set(kinds) or importlib.util.find_spec("compressed_tensors"):
        return None
    return "fp8 and w4a16 need compressed-tensors: pip install 'finetune-recipes[compressed-tensors]'"


def problem(config: Mapping[str, Any], kinds: Sequence[HfKind]) -> str | None:
    """Return why the model with this config.json has no such format; None if it has."""
    if config.get("text_config"):
        return f"{config.get('model_type')} is a wrapper around a text model; only text models are written"
    if config.get("auto_map"):
        return "the base brings its own code; only architectures of transformers are written"
    if experts := [n for n in EXPERTS if (config.get(n) or 0) > 1]:
        return f"a mixture of experts ({experts[0]}: {config[experts[0]]}) is not written; ask for none of them"
    if "hidden_size" not in config or "num_attention_heads" not in config:
        return f"{config.get('model_type')} has no hidden_size in its config.json; its layers are not known here"
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    widths = {"hidden_size": hidden, "heads together": heads * (config.get("head_dim") or hidden // heads)}
    widths |= {"intermediate_size": config["intermediate_size"]} if config.get("intermediate_size") else {}
    return next(width_problems(widths, kinds), None)


def width_problems(widths: Mapping[str, int], kinds: Iterable[HfKind]) -> Iterator[str]:
    """Yield a sentence for each format with an input width, by name, that its groups do not divide."""
    for kind in kinds:
        for name, width in widths.items():
            if width % MULTIPLE[kind]:
                fits = [k for k, n in MULTIPLE.items() if width % n == 0]
                instead = f"take {' or '.join(fits)}" if fits else "remove it"
                yield f"{kind} needs widths divisible by {MULTIPLE[kind]}, found {name} {width}; {instead}"


def stored(kind: HfKind, shape: tuple[int, int], dtype: str) -> list[Stored]:
    """Return the tensors that replace a weight (out, in) of the safetensors code `dtype`."""
    rows, width = shape
    if kind == "fp8":
        return [Stored("", "F8_E4M3", shape), Stored("_scale", dtype, (rows, 1))]
    if kind == "w4a16":
        return [
            Stored("_packed", "I32", (rows, width // 8)),
            Stored("_scale", dtype, (rows, width // GROUP)),
            Stored("_shape", "I64", (2,)),
        ]
    return [
        Stored("", "U8", (rows * width // 2, 1)),
        Stored(".absmax", "F32", (rows * width // BLOCK,)),
        Stored(".quant_map", "F32", (16,)),
        Stored(".quant_state.bitsandbytes__nf4", "U8", (len(nf4_state(shape, dtype)),)),
    ]


def nf4_state(shape: tuple[int, int], dtype: str) -> bytes:
    """Return the JSON of bitsandbytes' QuantState, in the form of its `as_dict(packed=True)`."""
    name = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[dtype]
    return json.dumps({"quant_type": "nf4", "blocksize": BLOCK, "dtype": name, "shape": list(shape)}).encode()


def settings(kind: HfKind, kept: Sequence[str], dtype: str) -> dict[str, Any]:
    """Return config.json's `quantization_config`; `kept`: the linear modules that are not quantised."""
    if kind == "nf4":
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": list(kept),
        }
    weights, inputs = (FP8_WEIGHTS, FP8_INPUTS) if kind == "fp8" else (INT4_WEIGHTS, None)
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if kind == "fp8" else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
        "ignore": list(kept),
    }


def bytes_of(kind: HfKind, matrices: Iterable[tuple[int, int]], others: int, element: int) -> int:
    """Return the bytes of a folder's weights, at most: `matrices` are (in, out), `others` elements of `element` bytes
    that stay as they are.
    """
    size = {"I32": 4, "I64": 8, "F32": 4, "U8": 1, "F8_E4M3": 1}
    parts = (s for inner, outer in matrices for s in stored(kind, (outer, inner), "F32"))
    return others * element + sum(prod(s.shape) * size[s.dtype] for s in parts)
