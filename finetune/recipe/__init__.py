"""The recipe: pydantic models, loading with line numbers, messages, JSON schema and reference."""

from finetune.recipe.data import (
    STATIC,
    Decontaminate,
    Dedup,
    HubSource,
    Ingest,
    LocalSource,
    MinHash,
    PydocSource,
    Sample,
    Section,
    Source,
    Split,
    resolve_path,
)
from finetune.recipe.filters import Filter
from finetune.recipe.lora import Lora
from finetune.recipe.preference import Preference
from finetune.recipe.schema import Recipe
from finetune.recipe.training import (
    BUILTIN_MODELS,
    Certify,
    Evaluate,
    Export,
    Merge,
    Model,
    Pack,
    Publish,
    Quantization,
    Render,
    Runtime,
    Tracking,
    Train,
)

__all__ = [
    "BUILTIN_MODELS",
    "STATIC",
    "Certify",
    "Decontaminate",
    "Dedup",
    "Evaluate",
    "Export",
    "Filter",
    "HubSource",
    "Ingest",
    "LocalSource",
    "Lora",
    "Merge",
    "MinHash",
    "Model",
    "Pack",
    "Preference",
    "Publish",
    "PydocSource",
    "Quantization",
    "Recipe",
    "Render",
    "Runtime",
    "Sample",
    "Section",
    "Source",
    "Split",
    "Tracking",
    "Train",
    "resolve_path",
]
