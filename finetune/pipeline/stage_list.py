"""The stages in order, with their inputs and versions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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


STAGES: tuple[Stage, ...] = (
    Stage("base", 2, (), base.spec, base.fingerprint, base.run, base.headline),
    Stage("generate", 1, (), generate.spec, generate.fingerprint, generate.run, generate.headline, also=generate.also),
    Stage("ingest", 2, ("generate",), ingest.spec, ingest.fingerprint, ingest.run, ingest.headline, rows="any"),
    Stage(
        "filter", 2, ("ingest", "base"), filter.spec, filter.fingerprint, filter.run, filter.headline,
        rows="training", working="parts",
    ),
    Stage(
        "embed", 3, ("filter",), embed.spec, embed.fingerprint, embed.run, embed.headline,
        rows="training", working="parts",
    ),
    Stage("dedup", 3, ("filter", "embed"), dedup.spec, dedup.fingerprint, dedup.run, dedup.headline, rows="training"),
    Stage(
        "decontaminate", 3, ("dedup",), decontaminate.spec, decontaminate.fingerprint, decontaminate.run,
        decontaminate.headline, rows="training", also=decontaminate.also,
    ),
    Stage(
        "sample", 2, ("decontaminate", "base", "embed"), sample.spec, sample.fingerprint, sample.run, sample.headline,
        rows="training",
    ),
    Stage(
        "split", 1, ("sample", "embed"), split.spec, split.fingerprint, split.run, split.headline,
        rows="any", also=split.also,
    ),
    Stage(
        "render", 4, ("split", "base"), render.spec, render.fingerprint, render.run, render.headline,
        rows="any", working="parts",
    ),
    Stage(
        "pack", 2, ("render", "base"), pack.spec, pack.fingerprint, pack.run, pack.headline,
        rows="training", working="parts",
    ),
    # Before train, so that bad preference data are refused before hours of SFT.
    Stage("pairs", 2, ("base", "split"), pairs.spec, pairs.fingerprint, pairs.run, pairs.headline),
    Stage(
        "train", 1, ("pack", "render", "base"), train.spec, train.fingerprint, train.run, train.headline,
        collective=True, logs=("metrics.jsonl",), working="checkpoints",
    ),
    Stage(
        "align", 1, ("train", "pairs", "base", "render"), align.spec, align.fingerprint, align.run, align.headline,
        collective=True, logs=("metrics.jsonl",), working="checkpoints", replaces="train",
    ),
    Stage(
        "evaluate", 3, ("train", "render", "base"), evaluate.spec, evaluate.fingerprint, evaluate.run,
        evaluate.headline, rows="any",
    ),
    Stage(
        "certify", 3, ("train", "render", "base"), certify.spec, certify.fingerprint, certify.run, certify.headline,
        rows="any",
    ),
    Stage(
        "merge", 3, ("certify", "train", "base"), merge.spec, merge.fingerprint, merge.run, merge.headline, large=True
    ),
    Stage("export", 3, ("merge", "render"), export.spec, export.fingerprint, export.run, export.headline, large=True),
)  # fmt: skip


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
