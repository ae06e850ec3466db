"""Training checkpoints: write the COMPLETE marker, find the newest complete checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from finetune.utils import links

COMPLETE = "COMPLETE"


def last_checkpoint(folder: Path, *, remove_incomplete: bool) -> Path | None:
    """Return the newest checkpoint with the COMPLETE marker; one without it was interrupted while being written."""
    checkpoints: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*"):
        number = path.name.rpartition("-")[2]
        if number.isdigit() and (path / COMPLETE).exists():
            checkpoints[int(number)] = path
        elif remove_incomplete:
            with suppress(OSError):
                links.remove(path, folder)
    return checkpoints[max(checkpoints)] if checkpoints else None


def mark_complete(folder: Path, made_by: Mapping[str, object]) -> None:
    """Sync every file of a checkpoint, then write its marker, which records how the batch was split."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    with (folder / COMPLETE).open("w") as file:
        file.write(json.dumps(made_by, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
