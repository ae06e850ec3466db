"""Whatever can be known before the first stage is built: access, write permission, disk, a GPU for a 7B."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from finetune import planner
from finetune.backends.sft import batch_shape
from finetune.errors import FinetuneError, GateRefused, InputError
from finetune.pipeline import Step
from finetune.recipe import HubSource, Recipe
from finetune.store import Store

NEEDS_WEIGHTS = ("train", "evaluate", "certify")
LARGEST_ON_CPU = 1_000_000_000  # parameters; above that one step takes minutes without a GPU
DURABLE_SLACK = 500_000_000  # bytes: rows, packed data, reports


def check(recipe: Recipe, steps: Sequence[Step], world: int = 1) -> list[str]:
    """Refuse what cannot end well; returns notes on what could not be checked.

    `steps` is the plan up to the stage asked for. Raises InputError (no access), GateRefused (no GPU for this size),
    FinetuneError (a folder that cannot be written, a disk that is too small).
    """
    to_build = {s.stage.name for s in steps if s.status not in ("off", "done")}
    notes = _check_access(recipe, to_build)
    base = next(s for s in steps if s.stage.name == "base")
    shapes = planner.read_shapes(recipe, base.folder if base.manifest else None)
    if shapes is not None and to_build & set(NEEDS_WEIGHTS):
        _check_device(recipe, shapes)
    if "train" in to_build:
        batch_shape(recipe.train.batch_rows, recipe.runtime.micro_batch_rows, world, recipe.pack is not None)
        if recipe.tracking.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise InputError("tracking.tensorboard: tensorboard is not installed (pip install tensorboard)")
    return notes


def check_folders(recipe: Recipe, steps: Sequence[Step], store: Store) -> None:
    """Both roots can be written and have room for what is still to be made."""
    base = next(s for s in steps if s.stage.name == "base")
    shapes = planner.read_shapes(recipe, base.folder if base.manifest else None)
    to_build = {s.stage.name for s in steps if s.status not in ("off", "done")}
    needed = planner.disk(shapes, recipe) if shapes else dict.fromkeys(("download", "merged", "adapter"), 0)
    durable = DURABLE_SLACK + (needed["adapter"] + needed.get("training_checkpoints", 0) if "train" in to_build else 0)
    local = (needed["merged"] if "merge" in to_build else 0) + (
        needed["download"] if to_build & set(NEEDS_WEIGHTS) else 0
    )
    for root, bytes_needed in ((store.artifacts, durable), (store.scratch, local)):
        _check_writable(root)
        free = shutil.disk_usage(root).free
        if free < bytes_needed:
            raise FinetuneError(
                f"{root}: {free / 1e9:.1f} GB free, about {bytes_needed / 1e9:.1f} GB needed; free some, or choose "
                "another folder with --artifacts or --scratch"
            )


def _check_writable(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise FinetuneError(f"{root}: cannot be written: {error.strerror}; choose another folder") from None


def _check_access(recipe: Recipe, to_build: set[str]) -> list[str]:
    from finetune.backends import hub

    notes = []
    if recipe.model.kind == "hub" and "base" in to_build:
        notes.append(hub.check_read(recipe.model.id, "model"))
    if "ingest" in to_build:
        names = [s.id for s in recipe.data if isinstance(s, HubSource)]
        notes += [hub.check_read(name, "dataset") for name in dict.fromkeys(names)]
    if recipe.publish.repo and "train" in to_build:
        notes.append(hub.check_write(recipe.publish.repo))
    return [n for n in notes if n]


def _check_device(recipe: Recipe, shapes: planner.Shapes) -> None:
    if shapes.parameters < LARGEST_ON_CPU:
        return
    from finetune.backends.models import pick_device

    if pick_device(recipe.runtime.device) == "cpu":
        raise GateRefused(
            f"{recipe.model.id} has {shapes.parameters / 1e9:.1f} billion parameters and this machine has no GPU: "
            "training would take weeks. Run the data stages here with --until pack, the whole on a GPU (Colab's free "
            "T4 fits a 7B), or the default recipe: make sft"
        )
