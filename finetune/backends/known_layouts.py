"""The modules of the architectures most bases have, from config.json alone.

transformers takes the weights of these as they are named in the file. What is said here is what its own classes say
(a test builds them and compares); anything else, and any configuration that leaves open what a class would fill in, is
for transformers to answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
