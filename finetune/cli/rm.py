"""`finetune rm`: remove the record of a run; `finetune clean` removes the stages that no run uses any more."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from finetune.errors import InputError
from finetune.pipeline.leases import is_being_built
from finetune.pipeline.runs import find_run, latest_run, remove_run
from finetune.pipeline.store import Store
from finetune.utils.files import tree_bytes


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
