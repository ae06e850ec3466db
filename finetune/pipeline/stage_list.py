"""The stages in reading order, with what each needs and when its output changed its meaning."""

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

Spec = Any  # each stage's own model; the pipeline only hands it through


@dataclass(frozen=True)
class Stage:
    """One step. `spec` returns None when the recipe turns the stage off; whoever needs it then reads its first need."""

    name: str
    version: int  # raised when the meaning of its output changes
    needs: tuple[str, ...]
    spec: Callable[[Recipe], BaseModel | None]
    fingerprint: Callable[[Spec], Mapping[str, object]]
    run: Callable[[Spec, Mapping[str, Path], Path, Context], Metrics]
    collective: bool = False  # all ranks run it, and a build that died is gone on with, not begun again
    large: bool = False  # lies in scratch: many gigabytes that can be made again
    logs: tuple[str, ...] = ()  # files that tell of one run (times, speeds) and do not count as output
    working: str = ""  # a folder needed only while building (checkpoints): removed once the manifest is written


STAGES: tuple[Stage, ...] = (
    Stage("base", 2, (), base.spec, base.fingerprint, base.run),
    Stage("ingest", 1, (), ingest.spec, ingest.fingerprint, ingest.run),
    Stage("filter", 1, ("ingest", "base"), filter.spec, filter.fingerprint, filter.run),
    Stage("embed", 2, ("filter",), embed.spec, embed.fingerprint, embed.run),
    Stage("dedup", 2, ("filter", "embed"), dedup.spec, dedup.fingerprint, dedup.run),
    Stage("decontaminate", 3, ("dedup",), decontaminate.spec, decontaminate.fingerprint, decontaminate.run),
    Stage("sample", 2, ("decontaminate", "base", "embed"), sample.spec, sample.fingerprint, sample.run),
    Stage("split", 1, ("sample", "embed"), split.spec, split.fingerprint, split.run),
    Stage("render", 3, ("split", "base"), render.spec, render.fingerprint, render.run),
    Stage("pack", 2, ("render", "base"), pack.spec, pack.fingerprint, pack.run),
    Stage(
        "train", 1, ("pack", "render", "base"), train.spec, train.fingerprint, train.run,
        collective=True, logs=("metrics.jsonl",), working="checkpoints",
    ),
    Stage("evaluate", 3, ("train", "render", "base"), evaluate.spec, evaluate.fingerprint, evaluate.run),
    Stage("certify", 3, ("train", "render", "base"), certify.spec, certify.fingerprint, certify.run),
    Stage("merge", 2, ("certify", "train", "base"), merge.spec, merge.fingerprint, merge.run, large=True),
    Stage("export", 3, ("merge", "render"), export.spec, export.fingerprint, export.run, large=True),
)  # fmt: skip


STAGE_NAMES = tuple(stage.name for stage in STAGES)


def stage_folder(store: Store, name: str, record: Mapping[str, Any]) -> Path | None:
    """Where a recorded stage lies under these roots, wherever they lay when it was recorded (a Drive mounted anew)."""
    stage = next((s for s in STAGES if s.name == name), None)
    if stage is None or not record.get("key") or record.get("status") == "off":
        return None
    return store.folder(name, record["key"], large=stage.large)


def stage_named(name: str) -> Stage:
    """The stage of that name; InputError lists them."""
    for stage in STAGES:
        if stage.name == name:
            return stage
    raise InputError(f"no stage named {name!r}; there is {', '.join(STAGE_NAMES)}")
