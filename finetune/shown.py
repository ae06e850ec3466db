"""`finetune show` and `finetune inspect`: runs and rows for a person, and for programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune import pipeline
from finetune.errors import InputError
from finetune.recipe import Recipe
from finetune.recipe_file import load_recipe
from finetune.report.console import print_table, stage_figure, stage_rows
from finetune.runs import read_run
from finetune.store import Store


def read(store: Store, name: str) -> dict[str, Any]:
    """run.json of `RECIPE[@RUN]`, every stage's status as it is on disk now."""
    recipe, _, run = name.partition("@")
    if recipe.endswith((".yaml", ".yml")):
        recipe = load_recipe(recipe).recipe.name
    value = read_run(store.artifacts, recipe, run or None)
    for stage in pipeline.STAGE_NAMES:
        record = value["stages"].setdefault(stage, {"status": "missing", "path": None, "seconds": None, "metrics": {}})
        folder = pipeline.stage_folder(store, stage, record)
        record["path"] = str(folder) if folder else None
        if record["status"] in ("done", "partial") and folder:
            if store.find(folder) is not None:
                record["status"] = "done"
            else:
                record["status"] = "partial" if folder.is_dir() else "missing"
    value["stages"] = {stage: value["stages"][stage] for stage in pipeline.STAGE_NAMES}
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


def print_runs(values: list[dict[str, Any]]) -> None:
    """A table a run; for two, the figures that differ side by side."""
    for value in values:
        rows = []
        for stage, record in value["stages"].items():
            seconds = f"{record['seconds']:.1f}" if record["seconds"] is not None else ""
            figure = record.get("message") or stage_figure(stage, record["metrics"]) if record["metrics"] else ""
            rows.append(
                [
                    stage,
                    record["status"],
                    stage_rows(stage, record["metrics"]),
                    seconds,
                    figure or record.get("message", ""),
                ]
            )
        print_table(f"{value['recipe']}@{value['run']}", ["stage", "status", "rows", "seconds", "figure"], rows)
    if len(values) == 2:
        _print_comparison(*values)


def _print_comparison(first: dict[str, Any], second: dict[str, Any]) -> None:
    rows = []
    for stage in pipeline.STAGE_NAMES:
        a, b = first["stages"][stage]["metrics"], second["stages"][stage]["metrics"]
        for name in sorted({*a, *b}):
            if a.get(name) != b.get(name):
                rows.append([f"{stage}.{name}", str(a.get(name)), str(b.get(name))])
    print_table("differences", ["figure", first["run"], second["run"]], rows)


def print_rows(recipe: Recipe, store: Store, count: int) -> None:
    """The first rendered rows in the terminal: special tokens visible, supervised text coloured."""
    from rich.console import Console
    from rich.text import Text

    from finetune.backends.models import load_tokenizer
    from finetune.data.inspection import segments
    from finetune.data.training_rows import read_token_rows

    steps = {s.stage.name: s for s in pipeline.plan(recipe, store)}
    render, base = steps["render"], steps["base"]
    if render.manifest is None or render.folder is None or base.folder is None:
        raise InputError(f"nothing rendered yet: run `finetune run {recipe.name} --until render` first")
    tokenizer: Any = load_tokenizer(base.folder)
    console = Console()
    for row in read_token_rows(render.folder / "train.parquet", count, whole=False):
        console.print(
            f"[bold]{row.id}[/bold]  {len(row.ids)} tokens, {int(row.mask.sum())} supervised", highlight=False
        )
        text = Text()
        for segment in segments(tokenizer, row.ids.tolist(), row.mask.tolist()):
            style = ("green" if segment.supervised else "") + (" reverse" if segment.special else "")
            text.append(segment.text, style=style.strip())
        console.print(text, soft_wrap=True)
        console.print()
