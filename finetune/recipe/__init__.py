"""The recipe: pydantic models, loading with line numbers, messages, JSON schema and reference."""

from finetune.recipe.data import (
    STATIC,
    Decontaminate,
    Dedup,
    HubSource,
    Ingest,
    Jaccard,
    LocalSource,
    PydocSource,
    Sample,
    Section,
    Source,
    Split,
    resolve_path,
)
from finetune.recipe.filters import Filter
from finetune.recipe.lora import Lora
from finetune.recipe.outlets import Export, Publish, Tracking
from finetune.recipe.preference import Preference
from finetune.recipe.schema import Recipe
from finetune.recipe.synthetic import Generate
from finetune.recipe.training import (
    BUILTIN_MODELS,
    Certify,
    Evaluate,
    Judge,
    LanguageModel,
    Merge,
    Model,
    Pack,
    Quantization,
    Render,
    Runtime,
    Tokens,
    Train,
)
