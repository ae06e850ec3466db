"""Access to a stage of a run for the report's sections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from finetune.pipeline.runs import StageRecord
from finetune.pipeline.store import Manifest


@dataclass(frozen=True)
class StageView(StageRecord):
    """One stage: `manifest` is None if its folder is incomplete or was removed."""

    manifest: Manifest | None = None

    def file(self, name: str) -> Path | None:
        """Return a file of the stage, if it exists."""
        path = self.folder / name if self.folder else None
        return path if path is not None and path.is_file() else None

    @property
    def absence(self) -> str:
        """Return one sentence on why there is nothing to show."""
        match self.status:
            case "off":
                return f"The recipe turns {self.name} off."
            case "refused" | "failed":
                what = "was refused" if self.status == "refused" else "failed"
                return f"{self.name} {what}: {self.message}"
            case "partial":
                return f"{self.name} was begun and is not finished."
            case "missing" if self.metrics:
                return f"The files of {self.name} are no longer there."
            case "missing":
                return f"{self.name} has not run."
            case _:
                return f"{self.name} left nothing to show here."


Stages = Mapping[str, StageView]


def rows_before(stages: Stages, name: str) -> Path | None:
    """Return the newest rows file of the stages before `name`, which that stage read."""
    order = ("ingest", "filter", "dedup", "decontaminate", "sample")
    before = order[: order.index(name)] if name in order else order
    for stage in reversed(before):
        if (path := stages[stage].file("rows.parquet")) and stages[stage].manifest is not None:
            return path
    return None
