"""What the cards of a push are written from: the recipe, and what its run measured and left behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from finetune.eval.verdict import Verdict
from finetune.hub.client import Kind
from finetune.recipe import Recipe

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Facts:
    """One run, as a card tells of it. What was not measured or is not known is absent."""

    recipe: Recipe
    recipe_text: str  # as it was written
    metrics: Mapping[str, Json]  # stage → what it measured
    base: Json  # base.json: id, kind, revision, parameters
    certificate: Json | None = None
    template: Json | None = None  # template.json: name, sha256, terminators (token ids), pad_token
    seconds: Mapping[str, float] = field(default_factory=dict)  # stage → how long it took
    versions: Mapping[str, str] = field(default_factory=dict)  # library → version, while training
    sources: Sequence[
        Json
    ] = ()  # for each of recipe.data and eval_data what pinned it: commit, digest or version of Python
    licences: Mapping[str, str] = field(default_factory=dict)  # "model ID" or "dataset ID" → what the Hub says
    steps: Sequence[Json] = ()  # the lines of metrics.jsonl
    samples: Sequence[Json] = ()  # the lines of samples.jsonl that may be shown
    rows: Mapping[str, Json] = field(default_factory=dict)  # split → {"rows", "columns"} of the data set's repository
    siblings: Mapping[Kind, str] = field(default_factory=dict)  # kind → repository of the same act
    verdict: Verdict | None = None  # on the run as a whole


@dataclass(frozen=True)
class Card:
    """README.md, and the files that it shows."""

    text: str
    files: Mapping[str, bytes] = field(default_factory=dict)


class CardWriter(Protocol):
    """What writes a card: report.model_card.write_card, handed in because a stage does not import the report."""

    def __call__(self, kind: Kind, repo: str, facts: Facts) -> Card:
        """The card of one push."""
