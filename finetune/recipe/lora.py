"""What a recipe says of the adapter.

The sentence below a field is its documentation, as in recipe/data.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic.json_schema import SkipJsonSchema

from finetune.recipe.data import REPOSITORY, REVISION, Count, Pattern, Positive, Section, path_of, refuse

RUN_OF_RECIPE = r"\w[\w.-]*(@[\w-]+)?"


class Lora(Section):
    """The adapter (arXiv:2106.09685)."""

    r: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank: the adapter's size and what it can hold."""
    alpha: Positive = 32
    """The change is scaled by alpha / r (by alpha / √r with rslora)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs set to zero while training."""
    targets: Literal["all-linear"] | list[str] | Pattern = "all-linear"
    """Which linear modules: all-linear, a list of names, or one expression for the whole module name. Not lm_head."""
    rslora: bool = False
    """Scale by alpha / √r, so that large ranks learn too (arXiv:2312.03732)."""
    dora: bool = False
    """Learn magnitudes beside directions (arXiv:2402.09353); slower, and never fused. Goes with every other field."""
    rank_pattern: dict[str, Count] = {}
    """Another rank for modules whose name matches, as in {down_proj: 32}."""
    alpha_pattern: dict[str, Positive] = {}
    """Another alpha for modules whose name matches."""
    last_layers: Count | None = None
    """Adapt only the last so many decoder layers; null adapts all. Not with an expression as targets."""
    modules_to_save: list[Annotated[str, Field(pattern=r"^\w[\w.]*$", max_length=200)]] = []
    """Embeddings (embed_tokens), lm_head or norms to train whole, in 32 bits; what is not named stays frozen."""
    start_from: Annotated[str, Field(min_length=1, max_length=400)] | None = None
    """An adapter to go on from: RECIPE (its newest run), RECIPE@RUN, a folder (/… or ./…) or OWNER/NAME@REVISION."""
    start_base: Annotated[str, Field(min_length=1, max_length=400)] | None = None
    """The base's name in that adapter's own configuration, if it is another name of this recipe's model."""
    start_folder: SkipJsonSchema[Annotated[Path | None, Field(exclude=True)]] = None

    @model_validator(mode="before")
    @classmethod
    def _start(cls, value: Any, info: ValidationInfo) -> Any:  # noqa: ANN401 - raw YAML
        if isinstance(value, dict) and info.context and "start_folder" in value:
            refuse([(("start_folder",), "unknown field; write the folder as start_from: /path or ./path")])
        if not isinstance(value, dict) or not isinstance(value.get("start_from"), str) or "start_folder" in value:
            return value
        name = value["start_from"]
        if name.startswith(("/", "./", "~")):
            path = path_of("start_from", name, info)
            return {**value, "start_from": f"folder:{path.name}", "start_folder": path}
        if re.fullmatch(RUN_OF_RECIPE, name):
            return value  # found among the recorded runs by pipeline/run_view.py, which sets start_folder
        repository, _, revision = name.partition("@")
        if not re.fullmatch(REPOSITORY, repository) or not re.fullmatch(REVISION, revision or "main"):
            refuse(
                [
                    (
                        ("start_from",),
                        f"{name[:60]!r} is no recipe, RECIPE@RUN, folder (/… or ./…) or OWNER/NAME@REVISION",
                    )
                ]
            )
        return value

    @property
    def start_run(self) -> tuple[str, str | None] | None:
        """The recipe and the run (null: the newest finished one) that start_from names; None if it names no run."""
        if self.start_from is None or not re.fullmatch(RUN_OF_RECIPE, self.start_from):
            return None
        recipe, _, run = self.start_from.partition("@")
        return recipe, run or None

    @model_validator(mode="after")
    def _layers_of_names(self) -> Self:
        if self.last_layers is not None and isinstance(self.targets, str) and self.targets != "all-linear":
            why = "it goes with all-linear or a list of names; an expression can say itself which layers it means"
            refuse([(("last_layers",), why)])
        return self

    @model_validator(mode="after")
    def _base_of_a_start(self) -> Self:
        if self.start_base is not None and self.start_from is None:
            refuse([(("start_base",), "it describes the adapter of lora.start_from, and that is null; drop it")])
        return self

    @field_validator("modules_to_save")
    @classmethod
    def _each_once(cls, names: list[str]) -> list[str]:
        if twice := [n for i, n in enumerate(names) if n in names[:i]]:
            raise ValueError(f"{twice[0]} is there twice")
        return names

    @field_validator("targets")
    @classmethod
    def _trainable(cls, targets: str | list[str]) -> str | list[str]:
        names = targets if isinstance(targets, list) else [targets]
        if not names:
            raise ValueError("an empty list trains nothing")
        expression = targets if isinstance(targets, str) and targets != "all-linear" else None
        if expression and re.fullmatch(r"\w+", expression):
            raise ValueError(f"one name is written as a list: [{expression}]")
        for whole, short, why in (
            (
                "lm_head",
                "lm_head",
                "TRL cannot train LoRA on lm_head; to train it whole, name it in modules_to_save",
            ),
            (
                "model.embed_tokens",
                "embed_tokens",
                "LoRA on it is not supported; to train it whole, name it in modules_to_save",
            ),
        ):
            if any(short in n for n in names) or (expression and re.fullmatch(expression, whole)):
                raise ValueError(why)
        return targets
