"""A recorded run as commands and pages read it: stages, their folders now, problems."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.pipeline.runs import read_run
from finetune.pipeline.stage_list import STAGE_NAMES, stage_folder
from finetune.pipeline.store import Store
from finetune.recipe.load import load_recipe


def read(store: Store, name: str) -> dict[str, Any]:
    """run.json of `RECIPE[@RUN]`, every stage's status as it is on disk now."""
    recipe, _, run = name.partition("@")
    if recipe.endswith((".yaml", ".yml")):
        recipe = load_recipe(recipe).recipe.name
    value = read_run(store.artifacts, recipe, run or None)
    for stage in STAGE_NAMES:
        record = value["stages"].setdefault(stage, {"status": "missing", "path": None, "seconds": None, "metrics": {}})
        folder = stage_folder(store, stage, record)
        record["path"] = str(folder) if folder else None
        if record["status"] in ("done", "partial") and folder:
            if store.find(folder) is not None:
                record["status"] = "done"
            else:
                record["status"] = "partial" if folder.is_dir() else "missing"
    value["stages"] = {stage: value["stages"][stage] for stage in STAGE_NAMES}
    return value


def public(value: dict[str, Any]) -> dict[str, Any]:
    """What `--json` prints."""
    return {"recipe": value["recipe"], "run": value["run"], "stages": value["stages"]}


def verify(store: Store, value: dict[str, Any]) -> list[str]:
    """A sentence for every file of the run that is not what was committed."""
    problems = []
    for stage, record in value["stages"].items():
        if record["status"] == "off" or not record["path"]:
            continue
        folder = Path(record["path"])
        manifest = store.find(folder)
        if manifest is not None:
            problems += [f"{stage}: {p}" for p in store.verify(folder, manifest)]
        elif record["metrics"]:
            problems.append(f"{stage}: {folder} is gone or incomplete")
    return problems
