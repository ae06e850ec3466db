"""`finetune runs` and `finetune rm`: list the recorded runs, remove some."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.errors import InputError
from finetune.pipeline import run_view
from finetune.pipeline.leases import is_being_built
from finetune.pipeline.runs import find_run, latest_run, remove_run, run_folders
from finetune.pipeline.store import Store
from finetune.utils.console import print_error, print_table
from finetune.utils.files import tree_bytes
from finetune.utils.format import NONE, duration, number, size


def list_runs(store: Store, recipe: str | None = None) -> list[dict[str, Any]]:
    """Return a record for each run, of one recipe or of all, the newest of a recipe first.

    {"recipe", "run", "time" (ISO 8601, UTC), "seconds" (of all stages), "status", "perplexity_base",
    "perplexity_adapter", "perplexity_merged", "bytes" (of its stages' folders and its own, shared ones included)}.
    A record that cannot be read has the status `unreadable`. Raises InputError for a recipe without runs.
    """
    root = store.artifacts / "runs"
    names = [run_view.split_name(recipe)[0]] if recipe else sorted(p.name for p in root.glob("*") if p.is_dir())
    folders = [folder for name in names for folder in run_folders(root / name)]
    if recipe and not folders:
        raise InputError(f"{recipe} has not run yet under {store.artifacts}")
    return [_described(store, folder) for folder in folders]


def _described(store: Store, folder: Path) -> dict[str, Any]:
    name = folder.parent.name
    line: dict[str, Any] = {"recipe": name, "run": folder.name, "time": _time(folder.name), "seconds": None}
    figures = {f"perplexity_{kind}": None for kind in ("base", "adapter", "merged")}
    try:
        value = run_view.read(store, f"{name}@{folder.name}")
    except InputError as error:
        print_error(str(error))
        return {**line, "status": "unreadable", **figures, "bytes": tree_bytes(folder)}
    stages = value["stages"]
    for kind, stage in (("base", "evaluate"), ("adapter", "evaluate"), ("merged", "certify")):
        figures[f"perplexity_{kind}"] = stages[stage]["metrics"].get(f"perplexity_{kind}")
    paths = {Path(s["path"]) for s in stages.values() if s["path"]}
    return {
        **line,
        "seconds": round(sum(s["seconds"] or 0 for s in stages.values()), 3),
        "status": run_view.status_of(value),
        **figures,
        "bytes": sum(tree_bytes(p) for p in [folder, *paths]),
    }


def _time(run: str) -> str | None:
    """Return the time in a run's name, 20261130T114606Z-2a8ecdb6, as ISO 8601."""
    import datetime

    try:
        moment = datetime.datetime.strptime(run.split("-")[0], "%Y%m%dT%H%M%SZ")
    except ValueError:
        return None
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def print_list(lines: list[dict[str, Any]]) -> None:
    """Print the runs as a table."""
    rows = []
    for line in lines:
        perplexity = [number(line[f"perplexity_{k}"]) for k in ("base", "adapter") if line[f"perplexity_{k}"]]
        when = (line["time"] or NONE).replace("T", " ").removesuffix("Z")
        rows.append(
            [
                f"{line['recipe']}@{line['run']}",
                when,
                line["status"],
                " → ".join(perplexity)
                or (f"merged {number(line['perplexity_merged'])}" if line["perplexity_merged"] else ""),
                duration(line["seconds"]) if line["seconds"] else "",
                size(line["bytes"]),
            ]
        )
    print_table("runs", ["run", "UTC", "status", "perplexity", "time", "bytes"], rows)


def remove_runs(names: Sequence[str], store: Store) -> list[str]:
    """Remove the runs `names` (RECIPE@RUN, or RUN) and return a line for each; nothing is removed if one is refused.

    Raises InputError for a name that is no run, a run that is in progress, or one behind a symbolic link.
    """
    folders = list(dict.fromkeys(find_run(store.artifacts, name) for name in names))
    for folder in folders:
        if is_being_built(folder):
            raise InputError(f"{folder.parent.name}@{folder.name} is running; stop it first")
    return [_remove(folder) for folder in folders]


def _remove(folder: Path) -> str:
    parent, count = folder.parent, tree_bytes(folder)
    remove_run(folder)
    newest = latest_run(parent)
    left = f"; the newest run left is {parent.name}@{newest.name}" if newest else f"; {parent.name} has no run left"
    return f"removed {parent.name}@{folder.name}, {count:,} bytes{left}"
