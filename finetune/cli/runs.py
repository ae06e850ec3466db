"""`finetune runs`, `rm` and `clean`: list the recorded runs, remove some, drop what no kept run uses.

`clean` keeps what the newest runs and those that commands choose use, and what a living process builds.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import FinetuneError, InputError
from finetune.models import quantized_cache
from finetune.pipeline import run_view
from finetune.pipeline.leases import is_being_built, is_running
from finetune.pipeline.runs import begun_at, find_run, latest_run, read_record, remove_run, run_folders
from finetune.pipeline.stage_list import STAGES, stage_folder
from finetune.pipeline.store import Store
from finetune.publish.contents import NEEDED
from finetune.utils import links
from finetune.utils.console import print_error, print_table
from finetune.utils.files import tree_bytes
from finetune.utils.format import NONE, duration, number, size
from finetune.utils.streams import print_text

ASKED = frozenset({"base", "train", *(stage for stages in NEEDED.values() for stage in stages)})  # by some command

LEFT_BY = re.compile(r"(?:publish|publish-made|pushed|incoming)-(\d{1,9})-")  # process that made a folder of its own
MEASURED = re.compile(r"evaluate-(\w+)\.json")  # kept by stage evaluate of this key until its judge has answered


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
    name, moment = folder.parent.name, begun_at(folder.name)
    time = moment.strftime("%Y-%m-%dT%H:%M:%SZ") if moment else None
    line: dict[str, Any] = {"recipe": name, "run": folder.name, "time": time, "seconds": None}
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

    Raises InputError for a name that is not a run, a run that is in progress, or one behind a symbolic link.
    """
    folders = list(dict.fromkeys(find_run(store.artifacts, name) for name in names))
    for folder in folders:
        if is_being_built(folder):
            raise InputError(f"{folder.parent.name}@{folder.name} is running; stop it first")
    lines = []
    for folder in folders:
        recipe, count = folder.parent.name, tree_bytes(folder)
        remove_run(folder)
        newest = latest_run(folder.parent)
        left = f"the newest run left is {recipe}@{newest.name}" if newest else f"{recipe} has no run left"
        lines.append(f"removed {recipe}@{folder.name}, {count:,} bytes; {left}")
    return lines


@dataclass(frozen=True)
class Unused:
    """A stage folder, a run folder or a file of figures that can be removed."""

    folder: Path
    bytes: int


def clean_store(store: Store, keep: int, *, yes: bool) -> None:
    """List folders that can be deleted; delete them if `yes`, or if a person on a terminal agrees."""
    import typer

    unneeded = unused(store, keep)
    if not unneeded:
        print_text("nothing to clean")
        return
    for item in unneeded:
        link = " (a link; what it names stays)" if item.folder.is_symlink() else ""
        print_text(f"{item.bytes:>15,} bytes  {item.folder}{link}")
    if yes or (sys.stdin.isatty() and typer.confirm(f"Delete these {len(unneeded)} folders?")):
        still = {item.folder for item in unused(store, keep)}  # a run may have begun while the question stood
        print_text(f"{remove(store, [item for item in unneeded if item.folder in still]):,} bytes freed")
    else:
        print_text("nothing deleted; add --yes")


def unused(store: Store, keep: int) -> list[Unused]:
    """Folders that none of the newest `keep` runs of any recipe names, oldest runs included; none of a live build.

    The runs that commands choose stay too: a finished one is not dropped for a later one that failed. The points of a
    sweep, which are recipes, stay or go together: those of the newest `keep` sweeps of a recipe stay.
    A symbolic link in place of such a folder is listed itself, never its target. Raises InputError if runs/, a
    recipe's folder or a run is a link out of artifacts: it is not read, so its stages are unknown.
    """
    used: set[Path] = set()
    old_runs: list[Path] = []
    old_points = _points_of_older_sweeps(store, keep)
    for recipe in (store.artifacts / "runs" / name for name in links.names_in(store.artifacts / "runs")):
        inside = [recipe / name for name in links.names_in(recipe)] if not recipe.is_symlink() else []
        for run in (recipe, *inside):
            if run.is_dir():
                links.require_inside(run, store.artifacts)
        runs = [p for p in inside if "run.json" in links.names_in(p)]
        # `latest` and a run that goes on stay whatever their names say: a clock may have been set back.
        kept = {r for r in runs if is_being_built(r)}
        if recipe.name not in old_points:
            kept |= {*runs[-keep:], *filter(None, [latest_run(recipe)])}
            kept |= run_view.chosen_by_commands(store, run_folders(recipe), ASKED)
        old_runs += [r for r in runs if r not in kept]
        for run in (r for r in runs if r in kept):
            stages = read_record(run)["stages"]
            used |= {f for n, s in stages.items() if (f := stage_folder(store, n, s)) is not None}
    folders = []
    for stage in STAGES:
        root = store.scratch if stage.large else store.artifacts
        links.require_inside(root / stage.name, root)
        places = (root / stage.name / name for name in links.names_in(root / stage.name))
        for folder in (p for p in places if p.is_dir() or p.is_symlink()):
            if links.way_out(folder, root) or (folder not in used and not is_being_built(folder)):
                folders.append(folder)
    bases = sorted(f for f in used if f.parent.name == "base" and (f / "base.json").is_file())
    folders += quantized_cache.unneeded(store.scratch, bases)
    # What a push that was killed had staged (links to a whole model, which keep its bytes on the disk), or a mirror
    # had fetched.
    left = [root / name for root in {store.scratch, store.artifacts} for name in links.names_in(root)]
    staged = [p for p in sorted(left) if p.is_dir()]
    folders += [p for p in staged if (pid := LEFT_BY.match(p.name)) and not is_running(int(pid[1]))]
    for path in sorted(left):
        of = (m := MEASURED.fullmatch(path.name)) and store.folder("evaluate", m[1], large=False)
        if of and of not in used and not is_being_built(of):
            folders.append(path)
    return [Unused(f, _bytes_of(f)) for f in [*folders, *old_runs]]


def _bytes_of(path: Path) -> int:
    if path.is_symlink():
        return 0
    return tree_bytes(path)


def _points_of_older_sweeps(store: Store, keep: int) -> set[str]:
    """Return the recipes that belong to a sweep, but not to the newest `keep` sweeps of the swept recipe.

    The files in artifacts/sweeps name them; if one cannot be read, no sweep counts as older.
    """
    root = store.artifacts / "sweeps"
    points: dict[str, list[set[str]]] = {}
    try:
        files = [root / name for name in links.names_in(root) if name.endswith(".json")]
        for path in sorted(files, key=lambda p: p.lstat().st_mtime_ns, reverse=True):
            value = json.loads(links.read_regular(path))
            pattern = re.compile(re.escape(value["recipe"][:60]) + r"-sweep-[0-9a-f]{8}")
            named = {str(run["name"]) for run in value["runs"]}
            points.setdefault(value["recipe"], []).append({name for name in named if pattern.fullmatch(name)})
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()
    newest = {name for sweeps in points.values() for sweep in sweeps[:keep] for name in sweep}
    return {name for sweeps in points.values() for sweep in sweeps for name in sweep} - newest


def remove(store: Store, items: list[Unused]) -> int:
    """Delete the folders; return the bytes freed. Raises FinetuneError if the disk refuses."""
    freed = 0
    for item in items:
        if not item.folder.is_symlink() and is_being_built(item.folder):
            continue
        try:
            store.remove(item.folder)
        except OSError as error:
            raise FinetuneError(
                f"{error.filename or item.folder}: cannot be deleted: {error.strerror or error}; {freed:,} bytes were "
                "freed before it"
            ) from None
        freed += item.bytes
    return freed
