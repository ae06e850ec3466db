"""Dimensions of a base and the matrices that an adapter targets.

Mistral, Llama and Qwen2 are counted by a formula, without importing transformers; every other architecture by its
class on the meta device (models/inventory.py). A test compares the formula with the class.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune.estimate.activations import Decoder
from finetune.estimate.operators import Linear
from finetune.lora.config import is_saved, is_target, layer_of, rank_of
from finetune.models.architecture import Modules, known_modules, scaled
from finetune.models.inventory import Inventory, count, elements, read_inventory
from finetune.models.new_tokens import read_new_tokens
from finetune.recipe import Lora, Recipe
from finetune.tiny import model as tiny_model
from finetune.utils.resources import resource

BY_FORMULA = ("mistral", "llama", "qwen2")  # model types whose layers are q, k, v, o, gate, up, down and two norms


@dataclass(frozen=True)
class Shapes:
    """Dimensions of a base. Without an `inventory` its layers are Llama's and all counts follow from these."""

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
    window: int | None = None  # sliding window in tokens, None for full attention
    dtype: str = "bfloat16"  # dtype of the stored weights, if the configuration has it
    positions: int | None = None  # max_position_embeddings
    inventory: Inventory | None = None  # what the model's class counts; it goes before the formulas
    new_tokens: int = 0  # that the recipe adds; without spare rows the vocabulary grows by them in the base stage

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return module name → (in, out) of the matrices of one Llama layer of these widths.

        For another architecture, activations are predicted with this layer instead of its own.
        """
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
    def matrices(self) -> list[tuple[str, int, int]]:
        """Return (module, in, out) of every matrix stored in 4 bits."""
        if self.inventory is not None:
            return [(name, inner, outer) for name, (inner, outer) in self.inventory.quantized.items()]
        return [
            (_llama_path(layer, name), inner, outer)
            for layer in range(self.layers)
            for name, (inner, outer) in self.linears().items()
        ]

    @cached_property
    def adaptable(self) -> list[tuple[str, int, int]]:
        """Return (module, in, out) of every linear module that can be adapted."""
        if self.inventory is None:
            return self.matrices
        others = [(name, inner, outer) for name, (inner, outer) in self.inventory.other_linears.items()]
        frozen = set(self.inventory.not_adapted)
        return [matrix for matrix in self.matrices + others if matrix[0] not in frozen]

    @cached_property
    def quantized_parameters(self) -> int:
        """Return the elements of all matrices stored in 4 bits."""
        if self.inventory is not None:
            return elements(self.inventory.quantized)
        return self.layers * sum(i * o for i, o in self.linears().values())

    @property
    def other_parameters(self) -> int:
        """Return the elements of embeddings, lm_head, norms, biases and fused experts, which stay 16-bit."""
        if self.inventory is not None:
            return self.inventory.parameters - self.quantized_parameters
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + (2 * self.layers + 1) * self.hidden + self.biases

    @property
    def active_parameters(self) -> int:
        """Return the elements of the layers' matrices that one token is multiplied by."""
        return self.quantized_parameters + (self.inventory.active_experts if self.inventory else 0)

    @property
    def parameters(self) -> int:
        """Return all elements."""
        return self.quantized_parameters + self.other_parameters


def _llama_path(layer: int, name: str) -> str:
    block = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    return f"model.layers.{layer}.{block}.{name}"


def read_shapes(recipe: Recipe, base_folder: Path | None = None) -> Shapes | None:
    """Read from the finished base stage, the local folder or recipes/shapes; None if only the Hub has them."""
    config = read_config(recipe, base_folder)
    shapes = None if config is None else shapes_of(config, read_inventory(base_folder) if base_folder else None)
    return replace(shapes, new_tokens=len(recipe.tokens.add)) if shapes and recipe.tokens else shapes


def shapes_in(base: Path) -> Shapes | None:
    """The shapes of the base in the folder of a finished base stage; None if they are unknown."""
    shapes = shapes_of(json.loads((base / "config.json").read_text(encoding="utf-8")), read_inventory(base))
    tokens = read_new_tokens(base)
    return replace(shapes, new_tokens=len(tokens.ids)) if shapes and tokens else shapes


def read_config(recipe: Recipe, base_folder: Path | None = None) -> dict[str, Any] | None:
    """Return the base's config.json, or its excerpt in recipes/shapes, from the same places as `read_shapes`."""
    candidates = [base_folder / "config.json"] if base_folder else []
    if recipe.model.folder:
        candidates.append(recipe.model.folder / "config.json")
    shipped = resource("shapes", recipe.model.id.replace("/", "--") + ".json")
    for path in [*candidates, *([shipped] if shipped else [])]:
        if path.is_file():
            config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return scaled(config, recipe.model.rope_scaling) if recipe.model.rope_scaling else config
    return None


def read_known_modules(recipe: Recipe, base_folder: Path | None = None) -> Modules | None:
    """Return the base's modules, if they are known without transformers."""
    if base_folder is None and recipe.model.kind == "builtin":
        return known_modules(tiny_model.layout())
    config = read_config(recipe, base_folder)
    return None if config is None else known_modules(config)


def shapes_of(config: Mapping[str, Any], inventory: Inventory | None = None) -> Shapes | None:
    """Build from a config.json and the base stage's counts; None if neither the formula nor transformers has the
    architecture: no prediction is better than a wrong one.
    """
    if not _by_formula(config):
        counted = inventory or count(config)
        return None if counted is None else _counted(config, counted)
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        kv = int(config.get("num_key_value_heads") or heads)
        head_dim = int(config.get("head_dim") or hidden // heads)
        bias = config.get("attention_bias", config["model_type"] == "qwen2")
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
            dtype=_dtype(config),
            positions=config.get("max_position_embeddings"),
        )
    except (KeyError, TypeError, ValueError):
        return None


def _by_formula(config: Mapping[str, Any]) -> bool:
    """Return whether the formula is exact for these layers."""
    biased = config.get("mlp_bias") or (config.get("model_type") == "llama" and config.get("attention_bias"))
    return config.get("model_type") in BY_FORMULA and not biased and "auto_map" not in config


def _dtype(config: Mapping[str, Any]) -> str:
    text = config.get("text_config") or {}
    return str(config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or "bfloat16")


def _counted(config: Mapping[str, Any], inventory: Inventory) -> Shapes:
    """Build from the counts of the model's class. A token passes through `experts_per_token` experts."""
    sizes = inventory.sizes
    wide = sizes["intermediate"] or 4 * sizes["hidden"]
    if inventory.experts:
        wide = max(1, sizes["experts_per_token"]) * (sizes["expert_intermediate"] or wide)
    return Shapes(
        hidden=sizes["hidden"],
        intermediate=wide,
        layers=sizes["layers"],
        heads=max(1, sizes["heads"]),
        kv_heads=max(1, sizes["kv_heads"]),
        head_dim=sizes["head_dim"] or sizes["hidden"],
        vocabulary=sizes["vocabulary"],
        tied=inventory.tied,
        biases=0,
        gated=bool(config.get("gated", False)),
        window=sizes["window"] or None,
        dtype=_dtype(config),
        positions=sizes["positions"] or None,
        inventory=inventory,
    )


def decoder(shapes: Shapes, lora: Lora, *, quantized: bool) -> Decoder:
    """Return base and adapter for the activation estimate. Plain LoRA: DoRA's extra computation is not counted."""
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
    """Return the matrices of one (equivalent) layer with the rank of each one's adapter."""
    if shapes.inventory is None:
        return {
            name: Linear(inner, outer, _rank(shapes, lora, _llama_path(layer, name)))
            for name, (inner, outer) in shapes.linears().items()
        }
    ranks = _ranks_of_layer(shapes, lora, layer)
    widest = max(ranks.values(), default=0)
    own = {name: rank for name, rank in ranks.items() if name in shapes.linears()}
    return {
        name: Linear(inner, outer, own.get(name, widest if len(own) < len(ranks) else 0))
        for name, (inner, outer) in shapes.linears().items()
    }


def _ranks_of_layer(shapes: Shapes, lora: Lora, layer: int) -> dict[str, int]:
    """Return last part of a module's name → its largest rank in decoder layer `layer`."""
    ranks: dict[str, int] = {}
    for path, _, _ in shapes.adaptable:
        if layer_of(path) == layer:
            word = path.rpartition(".")[2]
            ranks[word] = max(ranks.get(word, 0), _rank(shapes, lora, path))
    return ranks


def _rank(shapes: Shapes, lora: Lora, path: str) -> int:
    return rank_of(lora, path) if is_target(lora, path, shapes.layers) else 0


def trained_tensors(shapes: Shapes, lora: Lora) -> list[int]:
    """Elements of each trained tensor: A and B of every adapted matrix, a magnitude a row for DoRA, what is trained
    whole, the rows of new tokens.
    """
    sizes = saved_tensors(shapes, lora)
    sizes += [shapes.new_tokens * shapes.hidden] * len(token_tables(shapes, lora))
    for path, inner, outer in shapes.adaptable:
        if rank := _rank(shapes, lora, path):
            sizes += [rank * inner, rank * outer]
            sizes += [outer] if lora.dora else []
    return sizes


def saved_tensors(shapes: Shapes, lora: Lora) -> list[int]:
    """Return the elements of each tensor of lora.modules_to_save."""
    if shapes.inventory is not None:
        return [size for name, size in shapes.inventory.modules.items() if is_saved(lora, name)]
    sizes = {"model.embed_tokens": shapes.vocabulary * shapes.hidden, "lm_head": shapes.vocabulary * shapes.hidden}
    norms = [f"model.layers.{i}.{n}_layernorm" for i in range(shapes.layers) for n in ("input", "post_attention")]
    sizes |= dict.fromkeys(["model.norm", *norms], shapes.hidden)
    return [size for name, size in sizes.items() if is_saved(lora, name)]


def token_tables(shapes: Shapes, lora: Lora) -> list[str]:
    """Embedding and head, by name, as far as only the rows of new tokens are trained in them."""
    names = ["model.embed_tokens", *([] if shapes.tied else ["lm_head"])]
    if shapes.inventory is not None:
        table = shapes.vocabulary * shapes.hidden
        names = [n for n, size in shapes.inventory.modules.items() if size == table][: 1 if shapes.tied else 2]
    return [n for n in names if not is_saved(lora, n)] if shapes.new_tokens else []


def adapter_parameters(shapes: Shapes, recipe: Recipe) -> int:
    """Return the number of trainable elements."""
    return sum(trained_tensors(shapes, recipe.lora))
