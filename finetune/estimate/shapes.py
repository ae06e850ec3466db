"""The dimensions of a Llama-like base, and which of its matrices an adapter goes to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune.estimate.activations import Decoder
from finetune.estimate.operators import Linear
from finetune.lora.config import is_saved, is_target, rank_of
from finetune.models.architecture import Modules, known_modules
from finetune.recipe import Lora, Recipe
from finetune.tiny import model as tiny_model
from finetune.utils.resources import resource


@dataclass(frozen=True)
class Shapes:
    """The dimensions of a Llama-like base."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    biases: int  # elements of attention biases, all layers
    gated: bool = False
    window: int | None = None  # tokens that a token attends to, where they are fewer than all before it
    dtype: str = "bfloat16"  # what its weights are stored in, where the configuration says it

    def linears(self) -> dict[str, tuple[int, int]]:
        """Module name → (in, out) of one decoder layer's matrices, which are what gets quantised."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, query),
            "k_proj": (self.hidden, key),
            "v_proj": (self.hidden, key),
            "o_proj": (query, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @cached_property
    def quantized_parameters(self) -> int:
        """Elements of all decoder matrices."""
        return self.layers * sum(i * o for i, o in self.linears().values())

    @property
    def other_parameters(self) -> int:
        """Embeddings, lm_head, norms and biases, which stay 16-bit."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + (2 * self.layers + 1) * self.hidden + self.biases

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.quantized_parameters + self.other_parameters


def read_shapes(recipe: Recipe, base_folder: Path | None = None) -> Shapes | None:
    """From the finished base stage, the local folder, or recipes/shapes; None when only the Hub knows."""
    config = read_config(recipe, base_folder)
    return None if config is None else shapes_of(config)


def read_config(recipe: Recipe, base_folder: Path | None = None) -> dict[str, Any] | None:
    """The config.json of the base, or what recipes/shapes keeps of it, from the same places."""
    candidates = [base_folder / "config.json"] if base_folder else []
    if recipe.model.folder:
        candidates.append(recipe.model.folder / "config.json")
    shipped = resource("shapes", recipe.model.id.replace("/", "--") + ".json")
    for path in [*candidates, *([shipped] if shipped else [])]:
        if path.is_file():
            config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return config
    return None


def read_known_modules(recipe: Recipe, base_folder: Path | None = None) -> Modules | None:
    """The base's modules, where they can be told now and without transformers."""
    if base_folder is None and recipe.model.kind == "builtin":
        return known_modules(tiny_model.layout())
    config = read_config(recipe, base_folder)
    return None if config is None else known_modules(config)


def shapes_of(config: Mapping[str, Any]) -> Shapes | None:
    """From the content of a config.json; None where it is no Llama-like configuration."""
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        kv = int(config.get("num_key_value_heads") or heads)
        head_dim = int(config.get("head_dim") or hidden // heads)
        bias = config.get("attention_bias", config.get("model_type") == "qwen2")
        layers = int(config["num_hidden_layers"])
        return Shapes(
            hidden=hidden,
            intermediate=int(config["intermediate_size"]),
            layers=layers,
            heads=heads,
            kv_heads=kv,
            head_dim=head_dim,
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
            biases=layers * (heads + 2 * kv) * head_dim if bias else 0,
            gated=bool(config.get("gated", False)),
            window=config.get("sliding_window") if config.get("use_sliding_window", True) else None,
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"),
        )
    except (KeyError, TypeError, ValueError):
        return None  # nothing is predicted rather than something wrong


def decoder(shapes: Shapes, lora: Lora, *, quantized: bool) -> Decoder:
    """Base and adapter as the activations see them. A vanilla adapter: what DoRA computes besides is not counted."""
    return Decoder(
        hidden=shapes.hidden,
        heads=shapes.heads,
        kv_heads=shapes.kv_heads,
        head_dim=shapes.head_dim,
        vocabulary=shapes.vocabulary,
        layers=tuple(_adapted(shapes, lora, layer) for layer in range(shapes.layers)),
        dropout=lora.dropout > 0,
        quantized=quantized,
    )


def _adapted(shapes: Shapes, lora: Lora, layer: int) -> dict[str, Linear]:
    """The matrices of one layer with the rank of the adapter that each gets."""
    found = {}
    for name, (inner, outer) in shapes.linears().items():
        block = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
        path = f"model.layers.{layer}.{block}.{name}"
        found[name] = Linear(inner, outer, rank_of(lora, path) if is_target(lora, path, shapes.layers) else 0)
    return found


def trained_tensors(shapes: Shapes, lora: Lora) -> list[int]:
    """Elements of each trained tensor: A and B of every adapted matrix, a magnitude a row for DoRA, what is trained
    whole.
    """
    found = saved_tensors(shapes, lora)
    for layer in range(shapes.layers):
        for linear in _adapted(shapes, lora, layer).values():
            if linear.rank:
                found += [linear.rank * linear.inner, linear.rank * linear.outer]
                found += [linear.outer] if lora.dora else []
    return found


def saved_tensors(shapes: Shapes, lora: Lora) -> list[int]:
    """Elements of each tensor of lora.modules_to_save, by the names they have in Llama-like bases."""
    sizes = {"model.embed_tokens": shapes.vocabulary * shapes.hidden, "lm_head": shapes.vocabulary * shapes.hidden}
    norms = [f"model.layers.{i}.{n}_layernorm" for i in range(shapes.layers) for n in ("input", "post_attention")]
    sizes |= dict.fromkeys(["model.norm", *norms], shapes.hidden)
    return [size for name, size in sizes.items() if is_saved(lora, name)]


def adapter_parameters(shapes: Shapes, recipe: Recipe) -> int:
    """Trainable elements, all told."""
    return sum(trained_tensors(shapes, recipe.lora))
