"""The stages in order, with their inputs and versions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from finetune.context import Context, Metrics
from finetune.errors import InputError
from finetune.pipeline.store import Store
from finetune.recipe import Recipe
from finetune.stages import (
    base,
    certify,
    decontaminate,
    dedup,
    embed,
    evaluate,
    export,
    filter,
    ingest,
    merge,
    pack,
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
    run: Callable[[Spec, Mapping[str, Path], Path, Context], Metrics]
    collective: bool = False  # all ranks run it, and an interrupted build is resumed, not restarted
    large: bool = False  # is in scratch: many gigabytes that can be rebuilt
    logs: tuple[str, ...] = ()  # files about one run (times, speeds), not part of the output
    rows: bool = False  # needs rows: off in a recipe without data
    also: Callable[[Spec], tuple[str, ...]] = lambda spec: ()  # further needs of a stage with this spec
    working: str = ""  # a folder needed only while building (checkpoints): removed once the manifest is written


STAGES: tuple[Stage, ...] = (
    Stage("base", 2, (), base.spec, base.fingerprint, base.run),
    Stage("ingest", 2, (), ingest.spec, ingest.fingerprint, ingest.run, rows=True),
    Stage("filter", 2, ("ingest", "base"), filter.spec, filter.fingerprint, filter.run, rows=True),
    Stage("embed", 3, ("filter",), embed.spec, embed.fingerprint, embed.run, rows=True),
    Stage("dedup", 3, ("filter", "embed"), dedup.spec, dedup.fingerprint, dedup.run, rows=True),
    Stage("decontaminate", 3, ("dedup",), decontaminate.spec, decontaminate.fingerprint, decontaminate.run, rows=True),
    Stage("sample", 2, ("decontaminate", "base", "embed"), sample.spec, sample.fingerprint, sample.run, rows=True),
    Stage("split", 1, ("sample", "embed"), split.spec, split.fingerprint, split.run, rows=True, also=split.also),
    Stage("render", 4, ("split", "base"), render.spec, render.fingerprint, render.run, rows=True),
    Stage("pack", 2, ("render", "base"), pack.spec, pack.fingerprint, pack.run, rows=True),
    Stage(
        "train", 1, ("pack", "render", "base"), train.spec, train.fingerprint, train.run,
        collective=True, logs=("metrics.jsonl",), working="checkpoints",
    ),
    Stage("evaluate", 3, ("train", "render", "base"), evaluate.spec, evaluate.fingerprint, evaluate.run, rows=True),
    Stage("certify", 3, ("train", "render", "base"), certify.spec, certify.fingerprint, certify.run, rows=True),
    Stage("merge", 2, ("certify", "train", "base"), merge.spec, merge.fingerprint, merge.run, large=True),
    Stage("export", 3, ("merge", "render"), export.spec, export.fingerprint, export.run, large=True),
)  # fmt: skip


STAGE_NAMES = tuple(stage.name for stage in STAGES)


def spec_of(stage: Stage, recipe: Recipe) -> BaseModel | None:
    """Return the stage's part of the recipe; None if it is off."""
    return None if stage.rows and not recipe.data else stage.spec(recipe)


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
