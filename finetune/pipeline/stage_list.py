"""The stages in order, with their inputs and versions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel

from finetune.context import Context
from finetune.errors import InputError
from finetune.metrics import Headline
from finetune.pipeline.store import Store
from finetune.recipe import Recipe
from finetune.stages import (
    align,
    base,
    certify,
    decontaminate,
    dedup,
    embed,
    evaluate,
    export,
    filter,
    generate,
    ingest,
    merge,
    pack,
    pairs,
    render,
    sample,
    split,
    train,
)

Spec = Any  # each stage's own model; the pipeline only passes it on
TRAINING: dict[str, Any] = {"collective": True, "logs": ("metrics.jsonl",), "working": "checkpoints"}


@dataclass(frozen=True)
class Stage:
    """One stage. If `spec` returns None, the stage is off, and stages that need it read its first need instead."""

    name: str
    version: int  # raised when the meaning of its output changes
    needs: tuple[str, ...]
    spec: Callable[[Recipe], BaseModel | None]
    fingerprint: Callable[[Spec], Mapping[str, object]]
    run: Callable[[Spec, Mapping[str, Path], Path, Context], Mapping[str, Any]]
    headline: Callable[[Any], Headline]  # of the metrics that `run` returned
    collective: bool = False  # all ranks run it, and a build that died is continued, not begun again
    large: bool = False  # is in scratch: many gigabytes that can be made again
    logs: tuple[str, ...] = ()  # files about one run (times, speeds) that do not count as output
    rows: Literal["", "training", "any"] = ""  # the rows without which it is off; any: held-out ones are enough
    also: Callable[[Spec], tuple[str, ...]] = lambda spec: ()  # further needs of a stage with this spec
    working: str = ""  # a folder needed only while building (checkpoints, partitions): removed after the manifest
    replaces: str = ""  # a stage before it: what needs that later is given this one's output, unless this one is off


class _Module(Protocol):
    """A module of finetune/stages, named after its stage."""

    def spec(self, recipe: Recipe, /) -> BaseModel | None:
        """Return the only part of the recipe that the stage sees; None turns the stage off."""

    def fingerprint(self, spec: Spec, /) -> Mapping[str, object]:
        """Return what the spec names outside itself."""

    def run(self, spec: Spec, inputs: Mapping[str, Path], out: Path, ctx: Context, /) -> Mapping[str, Any]:
        """Write the output and return the metrics."""

    def headline(self, metrics: Any, /) -> Headline:  # noqa: ANN401 - each stage's own TypedDict
        """Return the stage's row in a table of stages."""


def _stage(name: str, module: _Module, version: int, needs: tuple[str, ...] = (), **more: Any) -> Stage:  # noqa: ANN401
    return Stage(name, version, needs, module.spec, module.fingerprint, module.run, module.headline, **more)


STAGES: tuple[Stage, ...] = (
    _stage("base", base, 2),
    _stage("generate", generate, 1, also=generate.also),
    _stage("ingest", ingest, 2, ("generate",), rows="any"),
    _stage("filter", filter, 2, ("ingest", "base"), rows="training", working="parts"),
    _stage("embed", embed, 3, ("filter",), rows="training", working="parts"),
    _stage("dedup", dedup, 3, ("filter", "embed"), rows="training"),
    _stage("decontaminate", decontaminate, 3, ("dedup",), rows="training", also=decontaminate.also),
    _stage("sample", sample, 2, ("decontaminate", "base", "embed"), rows="training"),
    _stage("split", split, 1, ("sample", "embed"), rows="any", also=split.also),
    _stage("render", render, 4, ("split", "base"), rows="any", working="parts"),
    _stage("pack", pack, 2, ("render", "base"), rows="training", working="parts"),
    # Before train, so that bad preference data are refused before hours of SFT.
    _stage("pairs", pairs, 2, ("base", "split")),
    _stage("train", train, 1, ("pack", "render", "base"), **TRAINING),
    _stage("align", align, 1, ("train", "pairs", "base", "render"), **TRAINING, replaces="train"),
    _stage("evaluate", evaluate, 3, ("train", "render", "base"), rows="any"),
    _stage("certify", certify, 3, ("train", "render", "base"), rows="any"),
    _stage("merge", merge, 3, ("certify", "train", "base"), large=True),
    _stage("export", export, 3, ("merge", "render"), large=True),
)


STAGE_NAMES = tuple(stage.name for stage in STAGES)


def spec_of(stage: Stage, recipe: Recipe) -> BaseModel | None:
    """Return the part of the recipe that the stage sees; None if the stage is off."""
    there = {"": True, "training": recipe.has_rows, "any": bool(recipe.has_rows or recipe.eval_data)}
    return stage.spec(recipe) if there[stage.rows] else None


def headline_of(name: str, metrics: Mapping[str, Any]) -> Headline:
    """Return the row of a stage in a table of stages; an empty one for metrics of a version that lacks a figure."""
    try:
        return stage_named(name).headline(metrics)
    except (InputError, KeyError, TypeError, ValueError, AttributeError):
        return Headline("", metrics.get("rows_in"), metrics.get("rows_out", metrics.get("rows")))


def needs_of(stage: Stage, recipe: Recipe) -> tuple[str, ...]:
    """Return the stages whose outputs this one reads: its needs, without those that are off and pass nothing on."""
    return tuple(need for need in stage.needs if _gives(stage_named(need), recipe))


def _gives(stage: Stage, recipe: Recipe) -> bool:
    if spec_of(stage, recipe) is not None:
        return True
    return bool(stage.needs) and _gives(stage_named(stage.needs[0]), recipe)


def stage_folder(store: Store, name: str, record: Mapping[str, Any]) -> Path | None:
    """Return the folder of a recorded stage under the current roots, which may have moved (a remounted Drive)."""
    stage = next((s for s in STAGES if s.name == name), None)
    if stage is None or not record.get("key") or record.get("status") == "off":
        return None
    key = record["key"]
    if not isinstance(key, str) or not key.isalnum():  # in an edited record: `../..` is not a stage
        return None
    return store.folder(name, key, large=stage.large)


def stage_named(name: str) -> Stage:
    """Return the stage of that name. Raises InputError with the list of stages."""
    for stage in STAGES:
        if stage.name == name:
            return stage
    raise InputError(f"no stage named {name!r}; there is {', '.join(STAGE_NAMES)}")
