"""Summarise what a recipe trains: the adapter, fully trained modules, frozen weights."""

from __future__ import annotations

from finetune.recipe import Recipe
from finetune.utils.format import number


def trained(recipe: Recipe) -> list[str]:
    """Return a line for each setting that decides which weights are trained and how; defaults are left out."""
    lora, train = recipe.lora, recipe.training
    if recipe.train is None and lora.start_from is not None:
        name = str(lora.start_from).rpartition("/")[2].removeprefix("folder:")
        return [f"Imported: the adapter {name}, trained elsewhere"]
    method = f"{'DoRA' if lora.dora else 'LoRA'}{' with the scale of rsLoRA' if lora.rslora else ''}"
    targets = lora.targets if isinstance(lora.targets, str) else ", ".join(lora.targets)
    layers = "" if lora.last_layers is None else f" of the last {lora.last_layers} decoder layers only"
    dropout = f", dropout {number(lora.dropout)}" if lora.dropout else ""
    lines = [f"Trained: {method} of rank {lora.r}, alpha {number(lora.alpha)}{dropout}, on {targets}{layers}"]
    for what, pattern in (("rank", lora.rank_pattern), ("alpha", lora.alpha_pattern)):
        if pattern:
            lines.append(f"Another {what}: {', '.join(f'{number(v)} on {k}' for k, v in sorted(pattern.items()))}")
    whole = sorted(lora.modules_to_save)
    if whole:
        lines.append(f"Trained whole, in 32 bits: {', '.join(whole)}")
    frozen = "" if any("embed" in name for name in whole) else ", the embeddings among them"
    stored = f", in {recipe.quantization.type} while training" if recipe.quantization else ""
    lines.append(f"Frozen: all other weights{frozen}; the base{stored}")
    if lora.start_from is not None:
        lines.append(f"Begun from an earlier adapter: {lora.start_from.removeprefix('folder:')}")
    if train.lora_plus_ratio is not None:
        lines.append(f"LoRA+: the B matrices learn at {number(train.lora_plus_ratio)} times the rate")
    if train.neftune_alpha is not None:
        lines.append(f"NEFTune: noise on the embeddings while training, alpha {number(train.neftune_alpha)}")
    return lines
