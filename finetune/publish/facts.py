"""Input of the cards of a push: the recipe, and the metrics and files of its run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.eval.verdict import Verdict
from finetune.hub.client import Kind
from finetune.recipe import Recipe

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Facts:
    """Facts about a run that the model card needs. Unknown values are absent."""

    recipe: Recipe
    recipe_text: str  # as it was written, with the `--set` options of the run
    metrics: Mapping[str, Json]  # stage → its metrics
    base: Json = field(default_factory=dict)  # base.json: id, kind, revision, parameters
    certificate: Json | None = None
    template: Json | None = None  # template.json: name, sha256, terminators (token ids), pad_token
    seconds: Mapping[str, float] = field(default_factory=dict)  # stage → how long it took
    versions: Mapping[str, str] = field(default_factory=dict)  # library → version, while training
    sources: Sequence[Json] = ()  # what pinned each of data and eval_data: commit, digest or version of Python
    licences: Mapping[str, str] = field(default_factory=dict)  # "model ID" or "dataset ID" → its licence on the Hub
    steps: Sequence[Json] = ()  # the lines of metrics.jsonl
    samples: Sequence[Json] = ()  # the lines of samples.jsonl that may be shown
    rows: Mapping[str, Json] = field(default_factory=dict)  # split → {"rows", "columns"} of the dataset repository
    siblings: Mapping[Kind, str] = field(default_factory=dict)  # kind → repository of the same publish command
    verdict: Verdict | None = None  # on the run as a whole


def with_sets(text: str, sets: Sequence[str]) -> str:
    """Return a recipe's text with the `--set` options of its run as comments."""
    return "\n".join([text.rstrip("\n"), *(f"# --set {s}" for s in sets)]) + "\n"


@dataclass(frozen=True)
class Card:
    """README.md and the files that it shows."""

    text: str
    files: Mapping[str, bytes] = field(default_factory=dict)
