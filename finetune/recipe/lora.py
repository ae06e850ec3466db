"""The recipe's lora section.

The string below a field is its documentation, as in recipe/data.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator
from pydantic.json_schema import SkipJsonSchema

from finetune.recipe.data import (
    REPOSITORY,
    REVISION,
    Contradiction,
    Count,
    Pattern,
    Positive,
    Section,
    each_once,
    with_path,
)

RUN_OF_RECIPE = r"\w[\w.-]*(@[\w-]+)?"
ModuleName = Annotated[str, Field(pattern=r"^\w[\w.]*$", max_length=200)]


class Lora(Section):
    """The adapter (arXiv:2106.09685)."""

    r: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank of the adapter's matrices."""
    alpha: Positive = 32
    """The update is scaled by alpha / r (by alpha / √r with rslora)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's inputs during training."""
    targets: Literal["all-linear"] | list[str] | Pattern = "all-linear"
    """Adapted linear modules: all-linear, a list of names, or a regular expression for the full name. Not lm_head."""
    rslora: bool = False
    """Scale by alpha / √r, for large ranks (rsLoRA, arXiv:2312.03732)."""
    dora: bool = False
    """Train magnitudes and directions (DoRA, arXiv:2402.09353); slower, never fused. Works with all other fields."""
    rank_pattern: dict[str, Count] = {}
    """Another rank for modules whose name matches, as in {down_proj: 32}."""
    alpha_pattern: dict[str, Positive] = {}
    """Another alpha for modules whose name matches."""
    last_layers: Count | None = None
    """Adapt only the last N decoder layers; null adapts all. Not with a regular expression as targets."""
    modules_to_save: Annotated[list[ModuleName], AfterValidator(each_once)] = []
    """Modules trained fully in fp32: embed_tokens, lm_head or norms; all others stay frozen."""
    start_from: Annotated[str, Field(min_length=1, max_length=400)] | None = None
    """Adapter to continue: RECIPE (its newest run), RECIPE@RUN, a folder (/… or ./…) or OWNER/NAME@REVISION."""
    start_base: Annotated[str, Field(min_length=1, max_length=400)] | None = None
    """The base's name in that adapter's configuration, if it differs from this recipe's model.id."""
    start_folder: SkipJsonSchema[Annotated[Path | None, Field(exclude=True)]] = None

    @model_validator(mode="before")
    @classmethod
    def _start(cls, value: object, info: ValidationInfo) -> object:
        return with_path(
            value, info, "start_from", "start_folder", how="the folder as start_from: /path or ./path",
            is_path=lambda name: name.startswith(("/", "./", "~")), kind="folder:",
        )  # fmt: skip

    @property
    def start_run(self) -> tuple[str, str | None] | None:
        """Return recipe and run (None: the newest finished one) of start_from; None if it does not name a run."""
        if self.start_from is None or not re.fullmatch(RUN_OF_RECIPE, self.start_from):
            return None
        recipe, _, run = self.start_from.partition("@")
        return recipe, run or None

    def _contradictions(self) -> Iterator[Contradiction]:
        if self.last_layers is not None and isinstance(self.targets, str) and self.targets != "all-linear":
            why = "allowed only with all-linear or a list of names; put the layers into the regular expression"
            yield ("last_layers",), why
        if self.start_base is not None and self.start_from is None:
            yield ("start_base",), "it describes the adapter of lora.start_from, which is null; remove it"
        # pipeline/run_view.py resolves the name of a run and sets start_folder
        if self.start_from is not None and self.start_folder is None and self.start_run is None:
            repository, _, revision = self.start_from.partition("@")
            if not re.fullmatch(REPOSITORY, repository) or not re.fullmatch(REVISION, revision or "main"):
                allowed = "allowed: RECIPE, RECIPE@RUN, folder (/… or ./…) or OWNER/NAME@REVISION"
                yield ("start_from",), f"found {self.start_from[:60]!r}; {allowed}"

    @field_validator("targets")
    @classmethod
    def _trainable(cls, targets: str | list[str]) -> str | list[str]:
        names = targets if isinstance(targets, list) else [targets]
        if not names:
            raise ValueError("an empty list trains nothing")
        expression = targets if isinstance(targets, str) and targets != "all-linear" else None
        if expression and re.fullmatch(r"\w+", expression):
            raise ValueError(f"a single name must be a list: [{expression}]")
        for module, why in (("lm_head", "TRL cannot train LoRA on lm_head"),
                            ("model.embed_tokens", "LoRA on it is not supported")):  # fmt: skip
            short = module.rpartition(".")[2]
            if any(short in n for n in names) or (expression and re.fullmatch(expression, module)):
                raise ValueError(f"{why}; to train it whole, name it in modules_to_save")
        return targets
