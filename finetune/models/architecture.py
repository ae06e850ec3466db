"""The modules of a base by name, as far as an adapter's settings are about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from finetune.utils.files import read_json

if TYPE_CHECKING:
    import torch

WITHOUT_WEIGHTS = ("mlp.act_fn",)  # modules of a layer that hold nothing, in every layout known here


@dataclass(frozen=True, slots=True)
class Modules:
    """`linear`: those with a matrix, the head left out; `own`: those with parameters of their own."""

    every: tuple[str, ...]
    linear: tuple[str, ...]
    own: tuple[str, ...]


def read_modules(base: Path, trust_remote_code: bool) -> Modules:
    """Of the base in a folder with config.json; transformers builds it, empty, where its layout is not known."""
    if (known := known_modules(read_json(base / "config.json"))) is not None:
        return known
    from finetune.models.layerwise import empty_model

    return modules_of(empty_model(base, trust_remote_code=trust_remote_code))


def known_modules(config: Mapping[str, Any]) -> Modules | None:
    """From the words of a config.json; None where transformers has to be asked, whose import takes seconds."""
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
    return Modules(tuple(n for n, _ in model.named_modules()), tuple(linear_names(model)), tuple(own))


def linear_names(model: torch.nn.Module) -> list[str]:
    """Names of the base's linear modules, its head left out; of a model that peft has not touched."""
    from torch import nn

    head = _head(model)
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]


def _head(model: torch.nn.Module) -> torch.nn.Module | None:
    from transformers import PreTrainedModel

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
    """Norms of a layer, and its linear modules with a bias: always, or where the configuration says so."""

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
    """The layout that a config.json describes; None where transformers has to be asked."""
    kind = config.get("model_type")
    causal = config.get("architectures") == [f"{str(kind).capitalize()}ForCausalLM"]
    said = isinstance(config.get("num_hidden_layers"), int) and isinstance(config.get("tie_word_embeddings"), bool)
    if kind not in KNOWN or not causal or not said or "auto_map" in config:
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
