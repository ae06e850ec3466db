"""The merged model in other formats. Asked for by `export: {gguf: [...]}`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from finetune.context import Context, Metrics
from finetune.errors import InputError
from finetune.recipe import Export, Recipe


def spec(recipe: Recipe) -> Export | None:
    """The formats asked for; None when nothing is exported or merged."""
    return recipe.export if recipe.merge else None


def fingerprint(spec: Export) -> Mapping[str, object]:
    """Nothing outside the recipe decides the output."""
    return {}


def run(spec: Export, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Metrics:
    """Not there yet: refused in words before anything is written."""
    raise InputError("export.gguf is not supported yet: set export: null, and convert the merged folder with llama.cpp")
