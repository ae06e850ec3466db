"""`finetune clean`: what none of the newest runs uses, and no living process builds."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from finetune.models import quantized_cache
from finetune.pipeline.leases import is_being_built, is_running
from finetune.pipeline.runs import latest_run, read_record
from finetune.pipeline.stage_list import STAGES, stage_folder
from finetune.pipeline.store import Store
from finetune.utils.files import tree_bytes


@dataclass(frozen=True)
class Unused:
    """A stage folder or a run folder that may go."""

    folder: Path
    bytes: int


def unused(store: Store, keep: int) -> list[Unused]:
    """Folders that none of the newest `keep` runs of any recipe names, oldest runs included; none of a live build."""
    used: set[Path] = set()
    old_runs: list[Path] = []
    for recipe in sorted(p for p in (store.artifacts / "runs").glob("*") if p.is_dir()):
        runs = sorted(p for p in recipe.iterdir() if (p / "run.json").is_file())
        # `latest` and a run that goes on stay whatever their names say: a clock may have been set back.
        kept = {*runs[-keep:], latest_run(recipe), *(r for r in runs if is_being_built(r))}
        old_runs += [r for r in runs if r not in kept]
        for run in (r for r in runs if r in kept):
            stages = read_record(run)["stages"]
            used |= {f for n, s in stages.items() if (f := stage_folder(store, n, s)) is not None}
    folders = []
    for stage in STAGES:
        root = store.scratch if stage.large else store.artifacts
        for folder in sorted(p for p in (root / stage.name).glob("*") if p.is_dir()):
            if folder not in used and not is_being_built(folder):
                folders.append(folder)
    bases = sorted(f for f in used if f.parent.name == "base" and (f / "base.json").is_file())
    folders += quantized_cache.unneeded(store.scratch, bases)
    # What a push that was killed had staged (links to a whole model, which keep its bytes on the disk), or a mirror
    # had fetched.
    left = [*store.scratch.glob("publish-*"), *store.artifacts.glob("incoming-*")]
    staged = [p for p in sorted(left) if p.is_dir()]
    folders += [p for p in staged if (pid := p.name.split("-")[1]).isdigit() and not is_running(int(pid))]
    return [Unused(f, tree_bytes(f)) for f in [*folders, *old_runs] if not _leads_out(f, store)]


def remove(items: list[Unused]) -> int:
    """Delete the folders; returns the bytes freed."""
    freed = 0
    for item in items:
        if is_being_built(item.folder):
            continue
        # The manifest goes first: a folder half deleted by a kill must not look complete.
        (item.folder / "manifest.json").unlink(missing_ok=True)
        shutil.rmtree(item.folder)
        freed += item.bytes
    return freed


def _leads_out(folder: Path, store: Store) -> bool:
    """Whether `folder` is a symbolic link, or is reached through one that leads out of both roots."""
    roots = [store.artifacts.resolve(), store.scratch.resolve()]
    return folder.is_symlink() or not any(folder.resolve().is_relative_to(root) for root in roots)
