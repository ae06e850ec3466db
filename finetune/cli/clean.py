"""`finetune clean`: remove stage folders that no recent run uses and no live process builds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from finetune.errors import FinetuneError
from finetune.models import quantized_cache
from finetune.pipeline.leases import is_being_built, is_running
from finetune.pipeline.runs import latest_run, read_record
from finetune.pipeline.stage_list import STAGES, stage_folder
from finetune.pipeline.store import Store
from finetune.utils import links


@dataclass(frozen=True)
class Unused:
    """A stage folder or a run folder that can be removed."""

    folder: Path
    bytes: int


def unused(store: Store, keep: int) -> list[Unused]:
    """Folders that none of the newest `keep` runs of any recipe names, oldest runs included; none of a live build.

    A link in the place of such a folder is listed as itself, never what it names. Raises InputError where runs/, a
    recipe's folder or a run is a link out of artifacts: it is not read, so what its stages are is not known.
    """
    used: set[Path] = set()
    old_runs: list[Path] = []
    for recipe in sorted(p for p in (store.artifacts / "runs").glob("*") if p.is_dir()):
        for run in (recipe, *recipe.iterdir()) if not recipe.is_symlink() else (recipe,):
            if run.is_dir():
                links.require_inside(run, store.artifacts)
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
        links.require_inside(root / stage.name, root)
        for folder in sorted(p for p in (root / stage.name).glob("*") if p.is_dir() or p.is_symlink()):
            if links.way_out(folder, root) or (folder not in used and not is_being_built(folder)):
                folders.append(folder)
    bases = sorted(f for f in used if f.parent.name == "base" and (f / "base.json").is_file())
    folders += quantized_cache.unneeded(store.scratch, bases)
    # What a push that was killed had staged (links to a whole model, which keep its bytes on the disk), or a mirror
    # had fetched.
    left = [*store.scratch.glob("publish-*"), *store.artifacts.glob("incoming-*")]
    staged = [p for p in sorted(left) if p.is_dir()]
    folders += [p for p in staged if (pid := p.name.split("-")[1]).isdigit() and not is_running(int(pid))]
    return [Unused(f, 0 if f.is_symlink() else links.size_of(f)) for f in [*folders, *old_runs]]


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
