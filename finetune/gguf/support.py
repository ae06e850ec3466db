"""Which architectures are written as GGUF, how llama.cpp names their tensors, and unsupported features. No torch.

Names, permutations and offsets are those of llama.cpp's convert_hf_to_gguf.py
(https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune.errors import InputError

ATTENTION = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}  # fmt: skip
MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
GEMMA_NORMS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
GEMMA3_PATTERN, GEMMA2_PATTERN = 6, 2  # every so many layers one attends to all before it
GEMMA3_LOCAL_THETA = 10_000.0
LARGEST_GEMMA_LAYERS = (46, 62)  # of the 27B models, whose scores llama.cpp scales by hidden / heads


@dataclass(frozen=True)
class Architecture:
    """`name` and `parts` (module of a layer → tensor) are llama.cpp's words; `offset` is added to every norm's weight.

    `permuted`: rows of q and k change places, as its rotary embedding turns neighbouring dimensions together.
    """

    name: str
    parts: Mapping[str, str] = field(default_factory=lambda: {**NORMS, **ATTENTION, **MLP})
    permuted: bool = False
    offset: float = 0.0


ARCHITECTURES = {
    "MistralForCausalLM": Architecture("llama", permuted=True),
    "LlamaForCausalLM": Architecture("llama", permuted=True),
    "Qwen2ForCausalLM": Architecture("qwen2"),
    "Qwen3ForCausalLM": Architecture("qwen3", {**NORMS, **ATTENTION, **MLP, **QK_NORMS}),
    "Gemma2ForCausalLM": Architecture("gemma2", {**GEMMA_NORMS, **ATTENTION, **MLP}, offset=1.0),
    "Gemma3ForCausalLM": Architecture("gemma3", {**GEMMA_NORMS, **ATTENTION, **MLP, **QK_NORMS}, offset=1.0),
    "Phi3ForCausalLM": Architecture(
        "phi3",
        {
            **NORMS, "self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output",
            "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        },
    ),
    "StableLmForCausalLM": Architecture("stablelm"),
    "Starcoder2ForCausalLM": Architecture(
        "starcoder2", {**NORMS, **ATTENTION, "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    ),
}  # fmt: skip


def of_config(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a config.json. Raises InputError for one that is not written as GGUF here."""
    if why := problem(config):
        raise InputError(f"{why}; set export: null")
    return ARCHITECTURES[_class_name(config)]


def problem(config: Mapping[str, Any]) -> str | None:
    """Why no GGUF can be written of the model with this config.json; None if one can, its tokenizer apart."""
    name = _class_name(config)
    if name not in ARCHITECTURES:
        return f"no GGUF of {name} is written here, only of {', '.join(ARCHITECTURES)}"
    kind = rope(config)["rope_type"]
    if kind not in ROPE_TYPES:
        return f"no GGUF is written of rope_type {kind}, only of {', '.join(ROPE_TYPES)}"
    arch = ARCHITECTURES[name].name
    if arch == "stablelm" and config.get("qk_layernorm"):
        return "no GGUF is written of a StableLM with qk_layernorm"
    return _gemma_problem(arch, config) if arch.startswith("gemma") else None


def _class_name(config: Mapping[str, Any]) -> str:
    return str((config.get("architectures") or ["none named"])[0])


def _gemma_problem(arch: str, config: Mapping[str, Any]) -> str | None:
    """Return a Gemma setting that llama.cpp assumes and this model has differently, or None."""
    layers, period = config["num_hidden_layers"], GEMMA2_PATTERN if arch == "gemma2" else GEMMA3_PATTERN
    usual = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)]
    if list(config.get("layer_types") or usual) != usual:
        return f"llama.cpp expects every {period}th layer of a {arch} to attend to all tokens, and this one differs"
    scalar = config.get("query_pre_attn_scalar") or config["head_dim"]
    large = layers in LARGEST_GEMMA_LAYERS
    expected = config["hidden_size"] // config["num_attention_heads"] if large else config["head_dim"]
    if scalar != expected:
        return f"llama.cpp scales the scores of a {arch} by {expected}, and query_pre_attn_scalar is {scalar}"
    local = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    theta = local.get("rope_theta") or config.get("rope_local_base_freq") or GEMMA3_LOCAL_THETA
    if arch == "gemma3" and theta != GEMMA3_LOCAL_THETA:
        return (
            f"llama.cpp expects a rotary base of {GEMMA3_LOCAL_THETA:g} in a gemma3's sliding layers, this is {theta:g}"
        )
    return None


def tensor_name(name: str, architecture: Architecture) -> str:
    """The GGUF name of a transformers tensor. Raises InputError where there is none."""
    module, _, leaf = name.rpartition(".")
    if module in OUTER:
        return f"{OUTER[module]}.{leaf}"
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    if match is None or match[2] not in architecture.parts or leaf not in ("weight", "bias"):
        raise InputError(f"the tensor {name} has no place in a GGUF of this architecture; set export: null")
    return f"blk.{match[1]}.{architecture.parts[match[2]]}.{leaf}"


def rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings of a config.json, new (`rope_parameters`) or old (`rope_theta`, `rope_scaling`).

    Gemma-3 has them by kind of layer: those of the layers that attend to all tokens.
    """
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found = dict(found.get("full_attention") or found)
    found.setdefault("rope_theta", config.get("rope_theta", 10_000.0))
    found.setdefault("rope_type", found.get("type", "default"))
    return found
