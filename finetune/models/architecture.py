"""The modules of a base by name, as far as an adapter's settings are about them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from finetune.utils.files import read_json
from finetune.utils.upstream import check_lora_target

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

WITHOUT_WEIGHTS = ("mlp.act_fn",)  # modules of a layer that hold nothing, in every layout known here


@dataclass(frozen=True, slots=True)
class Modules:
    """`linear`: those that an adapter can go to; `own`: those with parameters of their own; `refused`: last word of a
    linear module's name → why no adapter can go to it.
    """

    every: tuple[str, ...]
    linear: tuple[str, ...]
    own: tuple[str, ...]
    refused: Mapping[str, str] = field(default_factory=dict)


def read_modules(base: Path, trust_remote_code: bool) -> Modules:
    """Of the base in a folder with config.json; transformers builds it, empty, if its layout is not known."""
    if (known := known_modules(read_json(base / "config.json"))) is not None:
        return known
    from finetune.models.layerwise import empty_model

    return modules_of(empty_model(base, trust_remote_code=trust_remote_code))


def scaled(config: Mapping[str, Any], rope_scaling: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with the rotary settings of a recipe (`model.rope_scaling`), in its own spelling: `rope_parameters`
    since transformers 5, `rope_scaling` beside `rope_theta` before. Also those of a text model inside.
    """
    if isinstance(inner := config.get("text_config"), Mapping):
        return {**config, "text_config": scaled(inner, rope_scaling)}
    new = config.get("rope_parameters")
    if not isinstance(new, Mapping):
        return {**config, "rope_scaling": dict(rope_scaling)}
    kept = {name: value for name, value in new.items() if name in ("rope_theta", "partial_rotary_factor")}
    return {**config, "rope_parameters": {**kept, **rope_scaling}}


def positions(config: Mapping[str, Any], rope_scaling: Mapping[str, Any] | None = None) -> int | None:
    """The longest sequence of a base with this config.json, in tokens; None if it names none.

    With the rotary settings of a recipe it is `factor` times what those or the base call the original length, as
    transformers reads them; None for settings without a factor.
    """
    text = config.get("text_config") or config
    known = next((text[n] for n in POSITIONS if isinstance(text.get(n), int)), None)
    if not rope_scaling or known is None:
        return known
    factor, original = rope_scaling.get("factor"), rope_scaling.get("original_max_position_embeddings")
    return None if factor is None else max(known, int(factor * (original or known)))


POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length")  # names of it in configurations


def known_modules(config: Mapping[str, Any]) -> Modules | None:
    """From the words of a config.json; None if transformers has to be asked, whose import takes seconds."""
    layout = known_layout(config)
    if layout is None:
        return None
    own = {name.rpartition(".")[0] for name in layout.parameters} | {"lm_head"}
    layers = (f"model.layers.{i}" for i in range(config["num_hidden_layers"]))
    inside = own | {f"{layer}.{name}" for layer in layers for name in WITHOUT_WEIGHTS} | {"model.rotary_emb"}
    holders = {name[:end] for name in inside for end, letter in enumerate(name) if letter == "."}
    return Modules(tuple(sorted({"", *inside, *holders})), tuple(sorted(layout.linears)), tuple(sorted(own)))


def modules_of(model: torch.nn.Module) -> Modules:
    """Of a model that peft has not touched."""
    own = (n for n, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None)
    refused = _refused_by_peft(model, every_linear(model))
    return Modules(tuple(n for n, _ in model.named_modules()), tuple(linear_names(model)), tuple(own), refused)


def every_linear(model: torch.nn.Module) -> list[str]:
    """Names of all linear modules and Conv1D (GPT-2's), the head left out."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = _head(model)
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]


def _is_plain(module: torch.nn.Module) -> bool:
    """Whether a linear module answers with one tensor: some routers are linear modules that return their choice too."""
    import torch
    from torch import nn

    own = type(module).forward
    if not isinstance(module, nn.Linear) or own is nn.Linear.forward or "transformers" not in type(module).__module__:
        return True  # bitsandbytes' among them
    given = torch.empty(1, module.in_features, dtype=module.weight.dtype, device="meta")
    weights = {n: t.to("meta") for n, t in module.state_dict().items()}
    with torch.no_grad():
        return isinstance(torch.func.functional_call(module, weights, (given,)), torch.Tensor)


def means_more(model: torch.nn.Module) -> bool:
    """Whether peft's "all-linear" would adapt more than `linear_names`: routers, fused experts, a vision tower."""
    from peft import LoraConfig

    config = LoraConfig(target_modules="all-linear")
    with suppress(ImportError):
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers as convert

        convert(config, model, None)
    return bool(config.target_parameters) or set(every_linear(model)) != set(linear_names(model))


def linear_names(model: torch.nn.Module) -> list[str]:
    """Names of the linear modules that an adapter can go to, the head left out; of a model that peft has not touched.

    Not those of a vision tower, which text does not pass through, nor routers, nor those that peft refuses.
    """
    return adaptable(model, {name: model.get_submodule(name) for name in every_linear(model)})


def adaptable(model: torch.nn.Module, linear: Mapping[str, torch.nn.Module]) -> list[str]:
    """Those of the linear modules `linear` of `model`, by name, that an adapter can go to."""
    from finetune.models.layerwise import other_parts

    refused, beside = _refused_by_peft(model, linear), other_parts(cast("PreTrainedModel", model))
    able = (n for n, m in linear.items() if n.rpartition(".")[2] not in refused and _is_plain(m))
    return [n for n in able if not n.startswith(beside)]


def _refused_by_peft(model: torch.nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Last words of names that peft takes for something else than the linear module of that name, and why."""
    from peft import LoraConfig

    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers as convert
    except ImportError:  # an older peft has no such rules
        return {}
    refused = {}
    for word in sorted({name.rpartition(".")[2] for name in names}):
        config = LoraConfig(target_modules=[word])
        try:
            check_lora_target(config, model, word)
            convert(config, model, None)
        except ValueError as error:
            converted = "fused" in str(error)
            refused[word] = EXPERTS if converted else "its weight is read by a fused kernel that passes adapters over"
        if config.target_parameters:
            refused[word] = EXPERTS
    return refused


EXPERTS = "peft takes that name for the fused experts and their router, which stay frozen"


def _head(model: torch.nn.Module) -> torch.nn.Module | None:
    return cast("PreTrainedModel", model).get_output_embeddings()


ATTENTION = tuple(f"self_attn.{part}_proj" for part in "qkvo")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
AROUND_MLP = ("pre_feedforward_layernorm", "post_feedforward_layernorm")  # Gemma 2 has them besides
EMBEDDING = "model.embed_tokens"


@dataclass(frozen=True, slots=True)
class Layout:
    """`parameters` without a tied head's; `linears`: modules of the layers, all of which are quantised."""

    parameters: frozenset[str]
    linears: frozenset[str]
    embedding: str
    tied: bool


@dataclass(frozen=True, slots=True)
class _Architecture:
    """Norms of a layer, and its linear modules with a bias: always, or if the configuration sets one."""

    norms: tuple[str, ...] = NORMS
    biased: tuple[str, ...] = ()
    biased_if: Mapping[str, tuple[str, ...]] | None = None

    def biases(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """The linear modules of a layer that have a bias."""
        asked = (modules for field, modules in (self.biased_if or {}).items() if config.get(field))
        return (*self.biased, *(module for modules in asked for module in modules))


KNOWN = {  # by model_type; the class is named after it
    "mistral": _Architecture(),
    "llama": _Architecture(biased_if={"attention_bias": ATTENTION, "mlp_bias": MLP}),
    "qwen2": _Architecture(biased=ATTENTION[:3]),
    "gemma2": _Architecture(norms=(*NORMS, *AROUND_MLP), biased_if={"attention_bias": ATTENTION}),
}


def known_layout(config: Mapping[str, Any]) -> Layout | None:
    """The layout that a config.json describes; None if transformers has to be asked."""
    kind = config.get("model_type")
    causal = config.get("architectures") == [f"{str(kind).capitalize()}ForCausalLM"]
    complete = isinstance(config.get("num_hidden_layers"), int) and isinstance(config.get("tie_word_embeddings"), bool)
    if kind not in KNOWN or not causal or not complete or "auto_map" in config:
        return None
    made, layers, tied = KNOWN[kind], range(config["num_hidden_layers"]), config["tie_word_embeddings"]
    inside = [f"{module}.weight" for module in (*ATTENTION, *MLP, *made.norms)]
    inside += [f"{module}.bias" for module in made.biases(config)]
    outer = [f"{EMBEDDING}.weight", "model.norm.weight", *([] if tied else ["lm_head.weight"])]
    return Layout(
        parameters=frozenset([*outer, *(f"model.layers.{i}.{name}" for i in layers for name in inside)]),
        linears=frozenset(f"model.layers.{i}.{name}" for i in layers for name in (*ATTENTION, *MLP)),
        embedding=EMBEDDING,
        tied=tied,
    )
