"""Which architectures are written as GGUF, how llama.cpp names their tensors, and unsupported features. No torch.

Permutations and offsets are those of llama.cpp's convert_hf_to_gguf.py
(https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from finetune.errors import InputError

if TYPE_CHECKING:
    from gguf import TensorNameMap

PERIODS = {"gemma2": 2, "gemma3": 6, "cohere2": 4, "smollm3": 4}  # every N-th layer differs from the others
PARTIAL = {"phi3": 1.0, "stablelm": 0.25, "glm4": 0.5}  # the share of a head that turns, where none is given
YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True}  # as llama.cpp computes it
GEMMA3_LOCAL_THETA = 10_000.0
LARGEST_GEMMA_LAYERS = (46, 62)  # of the 27B models, whose scores llama.cpp scales by hidden / heads


SCALED = ("default", "linear", "yarn")


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures, and what it takes for granted of a model.

    Attributes:
        name: llama.cpp's name.
        permuted: rows of q and k change places, since its rotary embedding turns neighbouring dimensions together and
            transformers' halves. cohere2 and glm4 turn neighbours together in both, so their rows stay.
        offset: added to every norm's weight.
        reloaded: whether transformers reads such a GGUF; the others are compared with llama.cpp's own logits
            (tests/gguf/test_llama_cpp.py).
        ropes: the kinds of rotary scaling that it computes as transformers does.
        activation: what config.json may call the activation; llama.cpp does not read it.
        fixed: values that fields of config.json must have, if they are present.
        square: the heads' widths must add up to `hidden_size`.
        window: whether its layers have sliding windows; elsewhere they attend to all tokens before them.
    """

    name: str
    permuted: bool = False
    offset: float = 0.0
    reloaded: bool = True
    ropes: tuple[str, ...] = SCALED
    activation: tuple[str, ...] = ("silu", "swish")
    fixed: Mapping[str, object] = field(default_factory=dict)
    square: bool = False
    window: bool = False


NO_BIAS: Mapping[str, object] = {"attention_bias": False, "mlp_bias": False}
TIED: Mapping[str, object] = {"tie_word_embeddings": True}
UNTIED: Mapping[str, object] = {"tie_word_embeddings": False}
GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
LLAMA = Architecture("llama", permuted=True, ropes=(*SCALED, "llama3"))
ARCHITECTURES = {
    "MistralForCausalLM": LLAMA,
    "LlamaForCausalLM": LLAMA,
    "Qwen2ForCausalLM": Architecture("qwen2", square=True),
    "Qwen3ForCausalLM": Architecture("qwen3", fixed=NO_BIAS),
    "Gemma2ForCausalLM": Architecture(
        "gemma2", offset=1.0, activation=GELU, fixed={**NO_BIAS, **TIED}, window=True
    ),
    "Gemma3ForCausalLM": Architecture(
        "gemma3", offset=1.0, ropes=("default", "linear"), activation=GELU, fixed=NO_BIAS, window=True
    ),
    "Phi3ForCausalLM": Architecture("phi3", ropes=("default",), square=True),
    "StableLmForCausalLM": Architecture("stablelm", fixed={"qk_layernorm": False, **UNTIED}, square=True),
    "Starcoder2ForCausalLM": Architecture("starcoder2", activation=GELU, fixed={"use_bias": True}, square=True),
    "Olmo2ForCausalLM": Architecture("olmo2", reloaded=False, fixed={**NO_BIAS, **UNTIED}, square=True),
    "GraniteForCausalLM": Architecture("granite", permuted=True, reloaded=False, ropes=(*SCALED, "llama3")),
    "SmolLM3ForCausalLM": Architecture(
        "smollm3", permuted=True, reloaded=False, fixed={**NO_BIAS, "use_sliding_window": False}
    ),
    "Cohere2ForCausalLM": Architecture(
        "cohere2", reloaded=False, fixed={**NO_BIAS, **TIED}, square=True, window=True
    ),
    "Glm4ForCausalLM": Architecture("glm4", reloaded=False),
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
    arch = ARCHITECTURES[name]
    for key, value in arch.fixed.items():
        if config.get(key, value) != value:
            return f"llama.cpp has no {arch.name} with {key}: {json.dumps(config[key])}"
    act = config.get("hidden_activation") or config.get("hidden_act") or arch.activation[0]
    if act not in arch.activation:
        return f"llama.cpp computes {arch.activation[0]} in a {arch.name}, and this model has {act}"
    heads, width = config["num_attention_heads"], config.get("head_dim")
    if arch.square and width and width * heads != config["hidden_size"]:
        return f"llama.cpp expects heads of {config['hidden_size'] // heads} in a {arch.name}, and these have {width}"
    return _rope_problem(arch, config) or _pattern_problem(arch.name, config) or _gemma_problem(arch.name, config)


def untied_problem(config: Mapping[str, Any], saved: Sequence[str]) -> str | None:
    """Why no GGUF can be written once the modules `saved` are trained whole, of a model whose `problem` is None."""
    arch = ARCHITECTURES[_class_name(config)]
    names = [name for name in saved if name.rpartition(".")[2] in ("embed_tokens", "lm_head")]
    if not names or not arch.fixed.get("tie_word_embeddings"):
        return None
    return (
        f"llama.cpp takes the embedding of a {arch.name} for its head, and lora.modules_to_save trains {names[0]} apart"
    )


def window_note(config: Mapping[str, Any]) -> str:
    """Return a sentence on what llama.cpp computes differently in long texts; empty if nothing.

    It gives some architectures no sliding window: within the first window's tokens the model is the same.
    """
    arch, window = ARCHITECTURES.get(_class_name(config)), config.get("sliding_window")
    if arch is None or arch.window or not window or not config.get("use_sliding_window", True):
        return ""
    if window >= config.get("max_position_embeddings", window + 1):
        return ""
    return (
        f"llama.cpp gives a {arch.name} no sliding window: in texts of more than {window:,} tokens it attends to more "
        "than the model was trained with, and its answers may differ"
    )


def _class_name(config: Mapping[str, Any]) -> str:
    return str((config.get("architectures") or ["none named"])[0])


def _rope_problem(arch: Architecture, config: Mapping[str, Any]) -> str | None:
    """Return why the rotary embedding of this model has no GGUF metadata; None if it has."""
    settings, known = rope(config), arch.ropes
    if settings["rope_type"] not in known:
        return f"no GGUF is written of a {arch.name} with rope_type {settings['rope_type']}, only {', '.join(known)}"
    if settings.get("mrope_section"):
        return f"no GGUF is written of a {arch.name} with mrope_section"
    if arch.name not in PARTIAL and (share := settings["partial_rotary_factor"]) != 1:
        return f"llama.cpp turns whole heads of a {arch.name}, and partial_rotary_factor is {share}"
    if settings["rope_type"] == "yarn":
        usual = {**YARN, "attention_factor": 0.1 * math.log(max(settings["factor"], 1)) + 1}
        odd = [k for k, v in usual.items() if settings.get(k) not in (None, v)]
        odd += [k for k in ("mscale", "mscale_all_dim") if settings.get(k)]
        if odd:
            return f"no GGUF is written of yarn with {odd[0]}: {settings[odd[0]]}"
    return None


def _pattern_problem(arch: str, config: Mapping[str, Any]) -> str | None:
    """Which layers llama.cpp treats apart from the others, if this model's layers differ."""
    if (period := PERIODS.get(arch)) is None:
        return None
    ends = [(i + 1) % period == 0 for i in range(config["num_hidden_layers"])]
    if arch == "smollm3":
        every = config.get("no_rope_layer_interval") or period
        turned = config.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(len(ends))]
        if [not t for t in turned[: len(ends)]] != ends:
            return f"llama.cpp expects every {period}th layer of a {arch} to have no rotary embedding, and only those"
        return None
    every = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or period
    usual = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(len(ends))]
    if [kind == "full_attention" for kind in config.get("layer_types") or usual] != ends:
        return f"llama.cpp expects every {period}th layer of a {arch} to attend to all tokens, and this one differs"
    return None


def _gemma_problem(arch: str, config: Mapping[str, Any]) -> str | None:
    """Return a setting in which this Gemma differs from the one that llama.cpp assumes."""
    if not arch.startswith("gemma"):
        return None
    layers = config["num_hidden_layers"]
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
    """The GGUF name of a transformers tensor, by the table of package gguf. Raises InputError if there is none."""
    layer = re.search(r"(?<=\.layers\.)\d+", name)
    asked = name if layer is None else f"{name[: layer.start()]}0{name[layer.end() :]}"
    found = _names(architecture.name).get_name(asked, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise InputError(f"the tensor {name} has no place in a GGUF of this architecture; set export: null")
    return found if layer is None else found.replace("blk.0.", f"blk.{layer[0]}.")


@cache
def _names(architecture: str) -> TensorNameMap:
    import gguf

    return gguf.get_tensor_name_map(next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == architecture), 1)


def rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings of a config.json, new (`rope_parameters`) or old (`rope_theta`, `rope_scaling`).

    Gemma-3 has them by kind of layer: those of the layers that attend to all tokens.
    """
    settings = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    settings = dict(settings.get("full_attention") or settings)
    settings.setdefault("rope_theta", config.get("rope_theta", 10_000.0))
    settings.setdefault("rope_type", settings.get("type", "default"))
    share = settings.get("partial_rotary_factor") or config.get("partial_rotary_factor")
    settings["partial_rotary_factor"] = share or PARTIAL.get(str(config.get("model_type")), 1.0)
    return settings
