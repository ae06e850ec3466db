"""Bytes, tokens, steps and seconds a recipe will need, from shapes alone: no weights, no network, no torch.

Rates are the datasheets' dense 16-bit figures; what is assumed of them is said beside each prediction.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.backends.embedding_time import describe as embedding_time_in_words
from finetune.backends.embedding_time import embedding_time
from finetune.backends.lora_settings import is_saved, is_target, rank_of
from finetune.backends.quantized_copy import wanted
from finetune.backends.sft import batch_shape, total_steps
from finetune.errors import InputError
from finetune.recipe import Lora, Recipe
from finetune.recipe_names import resource

if TYPE_CHECKING:
    from finetune.pipeline import Step

GIB = 1 << 30
BLOCK = 64  # bitsandbytes quantises 64 weights with one scale
NESTED_BLOCK = 256  # and, double, 256 scales with one of their own
ASSUMED_UTILISATION = 0.35


@dataclass(frozen=True)
class Device:
    """Usable memory in bytes, and dense 16-bit FLOP/s by the datasheet."""

    memory_bytes: int
    flops: float


DEVICES = {
    "t4": Device(int(14.7 * GIB), 65e12),
    "l4": Device(int(22.0 * GIB), 121e12),
    "a10g": Device(int(22.0 * GIB), 70e12),
    "rtx3090": Device(int(23.6 * GIB), 71e12),
    "rtx4090": Device(int(23.6 * GIB), 165e12),
    "a100-40": Device(int(39.4 * GIB), 312e12),
    "a100-80": Device(int(79.2 * GIB), 312e12),
    "h100": Device(int(79.2 * GIB), 989e12),
    "h200": Device(int(139.8 * GIB), 989e12),
}


@dataclass(frozen=True)
class Shapes:
    """The dimensions of a Llama-like base, and what its files weigh."""

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

    @property
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
    candidates = [base_folder / "config.json"] if base_folder else []
    if recipe.model.folder:
        candidates.append(recipe.model.folder / "config.json")
    shipped = resource("shapes", recipe.model.id.replace("/", "--") + ".json")
    for path in [*candidates, *([shipped] if shipped else [])]:
        if path.is_file():
            return _shapes(json.loads(path.read_text(encoding="utf-8")))
    return None


def _shapes(config: dict[str, Any]) -> Shapes | None:
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
        )
    except (KeyError, TypeError, ValueError):
        return None  # no Llama-like configuration: nothing is predicted rather than something wrong


def adapter_parameters(shapes: Shapes, recipe: Recipe) -> int:
    """Trainable elements: r·(in + out) for every adapted matrix, a magnitude a row for DoRA, what is trained whole."""
    lora, total = recipe.lora, saved_parameters(shapes, recipe.lora)
    for layer in range(shapes.layers):
        for name, (inner, outer) in shapes.linears().items():
            block = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            path = f"model.layers.{layer}.{block}.{name}"
            if is_target(lora, path, shapes.layers):
                total += rank_of(lora, path) * (inner + outer) + (outer if lora.dora else 0)
    return total


def saved_parameters(shapes: Shapes, lora: Lora) -> int:
    """Elements of lora.modules_to_save, by the names they have in Llama-like bases."""
    sizes = {"model.embed_tokens": shapes.vocabulary * shapes.hidden, "lm_head": shapes.vocabulary * shapes.hidden}
    norms = [f"model.layers.{i}.{n}_layernorm" for i in range(shapes.layers) for n in ("input", "post_attention")]
    sizes |= dict.fromkeys(["model.norm", *norms], shapes.hidden)
    return sum(size for name, size in sizes.items() if is_saved(lora, name))


def weight_bytes(shapes: Shapes, recipe: Recipe) -> int:
    """The base on the device: 4-bit codes with their scales as bitsandbytes stores them, the rest in 16 bits."""
    n = shapes.quantized_parameters
    if recipe.quantization is None:
        return 2 * shapes.parameters
    scales = n // BLOCK
    scale_bytes = scales + 4 * (scales // NESTED_BLOCK) if recipe.quantization.double else 4 * scales
    return n // 2 + scale_bytes + 2 * shapes.other_parameters


def memory(shapes: Shapes, recipe: Recipe, micro_rows: int) -> dict[str, int]:
    """Bytes on the device while training, by what holds them, with full activation checkpointing."""
    adapter = adapter_parameters(shapes, recipe)
    length = (
        recipe.pack.length_tokens or recipe.render.max_length_tokens if recipe.pack else recipe.render.max_length_tokens
    )
    tokens = micro_rows * length
    inner = sum(i for i, _ in shapes.linears().values())
    widths = 8 * shapes.hidden + 2 * (shapes.heads + 2 * shapes.kv_heads) * shapes.head_dim + 4 * shapes.intermediate
    return {
        "weights": weight_bytes(shapes, recipe),
        "adapter": 4 * adapter,
        "gradients": 4 * adapter,
        "optimizer": adapter * (2 if "8bit" in recipe.train.optimizer else 8),
        "checkpoints": 2 * shapes.layers * tokens * shapes.hidden,
        # one layer is recomputed at a time; peft keeps an fp32 copy of every adapted matrix's input
        "layer": tokens * (2 * widths + 4 * inner),
        "mask": tokens * tokens if recipe.pack else 0,
        "dequantized": 2 * 2 * max(i * o for i, o in shapes.linears().values()) if recipe.quantization else 0,
        "logits": 3 * 4 * min(tokens, 512) * shapes.vocabulary,
        "device": int(0.7 * GIB),
    }


def flops_per_token(shapes: Shapes, recipe: Recipe, length: int, *, checkpointing: bool) -> float:
    """Forward 2N, backward 2N (the base is frozen: no weight gradients), and another forward when checkpointing."""
    passes = 6 if checkpointing else 4
    attention = passes * shapes.layers * shapes.heads * shapes.head_dim * length  # causal: half of 2·2·T
    active = shapes.quantized_parameters + shapes.vocabulary * shapes.hidden
    return passes * active + (passes + 2) * adapter_parameters(shapes, recipe) + attention


def predict(recipe: Recipe, steps: Sequence[Step], device: str | None = None) -> dict[str, Any]:
    """The plan as JSON: stages, access, memory, disk, tokens, steps, time. None stands for what only the data can tell.

    Raises InputError for an unknown device name.
    """
    if device is not None and device.lower() not in DEVICES:
        raise InputError(f"--device {device}: allowed: {', '.join(DEVICES)}")
    by_name = {s.stage.name: s for s in steps}
    base = by_name["base"]
    shapes = read_shapes(recipe, base.folder if base.manifest else None)
    micro, _ = batch_shape(recipe.train.batch_rows, recipe.runtime.micro_batch_rows, 1, recipe.pack is not None)
    result: dict[str, Any] = {
        "recipe": recipe.name,
        "model": recipe.model.id,
        "stages": {s.stage.name: s.status for s in steps},
        "access": _access(recipe, shapes),
        "parameters": shapes.parameters if shapes else None,
        **_data_figures(recipe, by_name),
        "embedding": _embedding(by_name),
    }
    if shapes is None:
        return result | {"memory_bytes": None, "disk_bytes": None, "devices": None}
    parts = memory(shapes, recipe, micro)
    total = sum(parts.values())
    result["trainable_parameters"] = adapter_parameters(shapes, recipe)
    result["memory_bytes"] = {**parts, "total": total}
    result["disk_bytes"] = disk(shapes, recipe)
    chosen = [device.lower()] if device else list(DEVICES)
    result["devices"] = {name: _on_device(name, shapes, recipe, total, result["tokens"]) for name in chosen}
    return result


def disk(shapes: Shapes, recipe: Recipe) -> dict[str, int]:
    """Bytes by root: scratch holds the download and the merged model, artifacts the adapter and its checkpoints."""
    adapter = adapter_parameters(shapes, recipe)
    optimizer = adapter * (2 if "8bit" in recipe.train.optimizer else 8)
    best = 4 * adapter if recipe.train.keep_best else 0
    download = 2 * shapes.parameters if recipe.model.kind == "hub" else 0
    return {
        "download": download,
        "quantized_copy": weight_bytes(shapes, recipe) if _keeps_copy(shapes, recipe) else 0,
        "merged": 2 * shapes.parameters if recipe.merge else 0,
        "adapter": 4 * adapter,
        "training_checkpoints": (recipe.runtime.keep_checkpoints + 1) * (4 * adapter + optimizer + best),
    }


def _keeps_copy(shapes: Shapes, recipe: Recipe) -> bool:
    return recipe.quantization is not None and wanted(recipe.runtime.keep_quantized, shapes.parameters)


def _access(recipe: Recipe, shapes: Shapes | None) -> str:
    if recipe.model.kind != "hub":
        return "no download of a base"
    if shapes and shapes.gated:
        return f"gated: accept the terms at https://huggingface.co/{recipe.model.id} and log in (`hf auth login`)"
    return "open, as far as is known offline"


def _embedding(by_name: dict[str, Step]) -> dict[str, Any] | None:
    """What embedding will take, once filter has counted the rows; None where nothing is left to embed."""
    filtered, step = by_name["filter"].manifest, by_name["embed"]
    if filtered is None or step.folder is None or step.spec is None or step.manifest is not None:
        return None
    return embedding_time(step.spec.model_dump()["embedding"], int(filtered.metrics["rows_out"]), step.folder.parent)


def _data_figures(recipe: Recipe, by_name: dict[str, Step]) -> dict[str, Any]:
    """Rows, tokens and optimiser steps, once render and pack have counted them."""
    pack, render = by_name["pack"], by_name["render"]
    last = pack.manifest or (render.manifest if pack.status == "off" else None)
    if last is None:
        return {"rows": None, "tokens": None, "steps": None}
    rows = int(last.metrics.get("bins") or last.metrics.get("rows") or 0)
    return {"rows": rows, "tokens": int(last.metrics.get("tokens") or 0), "steps": total_steps(rows, recipe.train)}


def _on_device(name: str, shapes: Shapes, recipe: Recipe, total: int, tokens: int | None) -> dict[str, Any]:
    device = DEVICES[name]
    budget = device.memory_bytes
    if recipe.runtime.memory_budget_gb is not None:
        budget = min(budget, int(recipe.runtime.memory_budget_gb * 1e9))
    per_token = flops_per_token(shapes, recipe, recipe.render.max_length_tokens, checkpointing=True)
    rate = ASSUMED_UTILISATION * device.flops / per_token
    seconds = tokens * recipe.train.epochs / rate if tokens else None
    return {"fits": total <= budget, "memory_bytes": budget, "tokens_per_second": rate, "train_seconds": seconds}


def describe(result: dict[str, Any]) -> str:
    """The plan for a person."""
    lines = [f"{result['recipe']}  {result['model']}", ""]
    width = max(len(n) for n in result["stages"])
    lines += [f"  {name:<{width}}  {_status(status)}" for name, status in result["stages"].items()]
    lines += ["", f"  access      {result['access']}"]
    if result["parameters"] is None:
        lines.append("  memory      unknown until the base stage has read its config")
    else:
        parts = result["memory_bytes"]
        held = ", ".join(f"{k} {_gb(v)}" for k, v in parts.items() if k != "total" and v > 50e6)
        lines.append(f"  parameters  {result['parameters']:,} ({result['trainable_parameters']:,} trained)")
        lines.append(f"  GPU memory  {_gb(parts['total'])} predicted ({held})")
        space = ", ".join(f"{k.replace('_', ' ')} {_gb(v)}" for k, v in result["disk_bytes"].items() if v)
        lines.append(f"  disk        {space}")
    if result["tokens"] is None:
        lines.append("  tokens      unknown until ingest … pack have run; so are steps and time")
    else:
        lines.append(f"  tokens      {result['tokens']:,} in {result['rows']:,} rows; {result['steps']:,} steps")
    if result["embedding"]:
        lines.append(f"  embedding   {embedding_time_in_words(result['embedding'])}")
    for name, on in (result["devices"] or {}).items():
        hours = f", {on['train_seconds'] / 60:.0f} min training" if on["train_seconds"] else ""
        fit = "fits" if on["fits"] else "does not fit"
        lines.append(f"  {name:<10}  {fit} {_gb(on['memory_bytes'])}{hours}")
    if any(on["train_seconds"] for on in (result["devices"] or {}).values()):
        lines.append(f"  times assume {ASSUMED_UTILISATION:.0%} of the datasheet's 16-bit rate")
    return "\n".join(lines)


def _status(status: str) -> str:
    words = {"done": "there", "missing": "to run", "partial": "to go on with", "unknown": "to run", "off": "off"}
    return words[status]


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
