"""artifacts/runs/RECIPE/UTC-hash8/: the folder a person looks into. The results lie in the store."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from finetune.errors import InputError
from finetune.store import Manifest


@dataclass(frozen=True)
class StageRecord:
    """One stage of one run. `status`: done, partial, missing, off, failed or refused."""

    name: str
    status: str
    folder: Path | None = None
    key: str = ""
    seconds: float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    message: str = ""

    @classmethod
    def of(cls, name: str, status: str, folder: Path | None, manifest: Manifest | None) -> Self:
        """The record of a stage that is finished or off."""
        if manifest is None:
            return cls(name, status, folder)
        return cls(name, status, folder, manifest.key, manifest.seconds, manifest.metrics)

    def as_json(self) -> dict[str, Any]:
        """The form that `show --json` prints."""
        value: dict[str, Any] = {
            "status": self.status,
            "path": str(self.folder) if self.folder and self.status != "off" else None,
            "key": self.key or None,
            "seconds": self.seconds,
            "metrics": self.metrics,
        }
        return value | ({"message": self.message} if self.message else {})


class Run:
    """One run being written. Its folder appears with the first stage that is not only looked up."""

    def __init__(
        self, artifacts: Path, recipe: str, text: str, sets: tuple[str, ...], digest: str, *, write: bool
    ) -> None:
        now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
        self.recipe, self.text, self.sets, self.write = recipe, text, sets, write
        self.parent = artifacts / "runs" / recipe
        self.name = f"{now}-{digest[:8]}"
        self.folder = self.parent / self.name
        self.stages: dict[str, StageRecord] = {}

    def note(self, record: StageRecord) -> None:
        """Remember a stage; `save` writes it down."""
        self.stages[record.name] = record

    def save(self) -> Path:
        """Write run.json, or, where the newest run holds exactly the same, leave that one as it is."""
        stages = {name: record.as_json() for name, record in self.stages.items()}
        value = {"recipe": self.recipe, "run": self.name, "sets": list(self.sets), "stages": stages}
        newest = latest_run(self.parent)
        if (
            newest is not None
            and newest.name != self.name
            and (newest / "recipe.yaml").is_file()
            and (newest / "run.json").is_file()
        ):
            before = json.loads((newest / "run.json").read_text(encoding="utf-8"))
            same_text = (newest / "recipe.yaml").read_text(encoding="utf-8") == self.text
            if same_text and before["sets"] == list(self.sets) and before["stages"] == stages:
                self.name, self.folder = newest.name, newest
                return newest
        if self.write:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "recipe.yaml").write_text(self.text, encoding="utf-8")
            text = json.dumps(value, indent=1, ensure_ascii=False)
            (self.folder / "run.json").write_text(text + "\n", encoding="utf-8")
            (self.parent / "latest").write_text(self.name + "\n", encoding="utf-8")
        return self.folder


def latest_run(parent: Path) -> Path | None:
    """The folder that `latest` names, or None."""
    try:
        name = (parent / "latest").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    folder = parent / name
    return folder if name and folder.is_dir() else None


def read_run(artifacts: Path, recipe: str, run: str | None) -> dict[str, Any]:
    """run.json of a run (the newest by default); InputError names what there is."""
    parent = artifacts / "runs" / recipe
    folder = latest_run(parent) if run is None else parent / run
    if folder is None or not (folder / "run.json").is_file():
        there = sorted(p.parent.name for p in parent.glob("*/run.json"))
        what = f"no run {run!r} of {recipe}" if run else f"{recipe} has not run yet"
        raise InputError(
            f"{what} under {artifacts} ({'there is ' + ', '.join(there[-5:]) if there else 'no run there'})"
        )
    value: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    value["folder"] = folder
    return value
