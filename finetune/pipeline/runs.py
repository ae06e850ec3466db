"""Run records in artifacts/runs/RECIPE/UTC-hash8/. The results are in the store."""

from __future__ import annotations

import datetime
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, Field

from finetune.errors import MACHINE, FinetuneError, InputError, not_written
from finetune.pipeline.store import Manifest
from finetune.recipe import Recipe
from finetune.recipe.load import parse_recipe
from finetune.utils import links
from finetune.utils.files import replace_bytes
from finetune.utils.format import nearest
from finetune.utils.limits import reading
from finetune.utils.resources import known_recipes

PLAIN = re.compile(r"\w[\w.+-]*")  # name of a recipe's or a run's folder, below artifacts/runs


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
        """Return the record of a stage that is finished or off."""
        if manifest is None:
            return cls(name, status, folder)
        return cls(name, status, folder, manifest.key, manifest.seconds, manifest.metrics)

    def as_json(self) -> dict[str, Any]:
        """Return the record as printed by `show --json`."""
        value: dict[str, Any] = {
            "status": self.status,
            "path": str(self.folder) if self.folder and self.status != "off" else None,
            "key": self.key or None,
            "seconds": self.seconds,
            "metrics": self.metrics,
        }
        return value | ({"message": self.message} if self.message else {})


class _RecordedStage(BaseModel):
    """A stage of run.json; other fields are ignored."""

    status: str
    metrics: dict[str, Any]
    message: str = ""
    seconds: float | None = None
    path: str | None = None
    key: Annotated[str, Field(pattern=r"^\w+$")] | None = None


class _Recorded(BaseModel):
    """The parts of run.json that are read."""

    sets: list[str]
    stages: dict[str, _RecordedStage]


class Run:
    """Record of the current run. Its folder is created with the first stage that is built."""

    def __init__(
        self, artifacts: Path, recipe: str, text: str, sets: tuple[str, ...], digest: str, *, write: bool
    ) -> None:
        now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
        self.recipe, self.text, self.sets, self.write = recipe, text, sets, write
        self.parent = artifacts / "runs" / recipe
        self.name = f"{now}-{digest[:8]}"
        self.folder = self.parent / self.name
        self.begun = False  # whether the folder exists
        self.refused = False  # whether writing the record failed
        self.stages: dict[str, StageRecord] = {}
        self.on_change: Callable[[], None] = lambda: None  # called when a stage begins or ends

    def note(self, record: StageRecord) -> None:
        """Add a stage; `save` writes it."""
        self.stages[record.name] = record
        self.on_change()

    def save(self) -> Path:
        """Write run.json, unless the newest run has an equal record.

        Raises FinetuneError if writing fails; the previous record is then unchanged.
        """
        stages = {name: record.as_json() for name, record in self.stages.items()}
        value = {"recipe": self.recipe, "run": self.name, "sets": list(self.sets), "stages": stages}
        newest = latest_run(self.parent)
        if not self.begun and newest is not None and self._equals_record(newest, stages):
            self.name, self.folder = newest.name, newest
            return newest
        if self.write:
            self.begin()
            value["run"] = self.name
            text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
            with self._reporting_disk_errors():
                replace_bytes(self.folder / "recipe.yaml", self.text.encode())
                replace_bytes(self.folder / "run.json", text.encode())
                replace_bytes(self.parent / "latest", f"{self.name}\n".encode())
        return self.folder

    def begin(self) -> None:
        """Create the run's folder; it is unique even if another run of this recipe began in the same second."""
        if self.begun or not self.write:
            return
        name, count = self.name, 1
        links.require_inside(self.parent, self.parent.parent.parent)
        with self._reporting_disk_errors():
            while True:
                try:
                    (self.parent / name).mkdir(parents=True)
                    break
                except FileExistsError:
                    count += 1
                    name = f"{self.name}-{count}"
        self.name, self.folder, self.begun = name, self.parent / name, True

    @contextmanager
    def _reporting_disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.refused = True
            raise not_written(self.parent, error) from None

    def _equals_record(self, folder: Path, stages: dict[str, Any]) -> bool:
        """Return whether the record in `folder` equals this run's."""
        try:
            before = read_record(folder)
            text = (folder / "recipe.yaml").read_text(encoding="utf-8")
        except (InputError, OSError, ValueError):
            return False
        return text == self.text and before["sets"] == list(self.sets) and before["stages"] == stages


def latest_run(parent: Path) -> Path | None:
    """The folder that `latest` names, or None. Raises FinetuneError if the disk fails."""
    try:
        name = links.read_regular(parent / "latest").decode(errors="replace").strip()
    except OSError as error:
        if error.errno in MACHINE:
            raise FinetuneError(
                f"{parent / 'latest'}: cannot be read: {error.strerror}; see to it, and run again"
            ) from None
        return None
    folder = parent / name
    return folder if PLAIN.fullmatch(name) and folder.is_dir() else None


def run_folders(parent: Path) -> list[Path]:
    """Return the folders of a recipe's recorded runs: the one that `latest` names, then the others, newest first."""
    folders = sorted((p.parent for p in parent.glob("*/run.json")), reverse=True)
    newest = latest_run(parent)
    return [newest, *(f for f in folders if f != newest)] if newest in folders else folders


def named_run(artifacts: Path, recipe: str, run: str | None) -> Path:
    """Return the folder of a recorded run (the newest by default).

    Raises InputError with the names of the last runs if there is no such run, and for a link that leaves the root.
    """
    if odd := [name for name in (recipe, run or "latest") if not PLAIN.fullmatch(name)]:
        raise InputError(f"{odd[0]!r} is not the name of a recipe or of a run; `finetune runs` lists them")
    parent = artifacts / "runs" / recipe
    links.require_inside(parent, artifacts)
    folders = run_folders(parent)
    folder = next((f for f in folders if run is None or f.name == run), None)
    if folder is not None:
        links.require_plain(folder, artifacts)
    if folder is None:
        there = sorted(f.name for f in folders)
        if there:
            raise InputError(f"no run {run!r} of {recipe} under {artifacts} (there is {', '.join(there[-5:])})")
        ran = sorted(p.name for p in (artifacts / "runs").glob("*") if p.is_dir())
        known = known_recipes()
        near = None if recipe in known else nearest(recipe, [*ran, *known])
        fix = f"did you mean {near}?" if near else f"`finetune run {recipe}` runs it"
        raise InputError(f"{recipe} has not run yet under {artifacts}; {fix}")
    return folder


def find_run(artifacts: Path, name: str) -> Path:
    """Return the folder of the run `RECIPE@RUN`, or of `RUN` if a single recipe has a run of this name.

    Raises InputError for another name, and for a folder that is reached through a symbolic link out of `artifacts`.
    """
    recipe, _, run = name.rpartition("@")
    if recipe:
        folder = named_run(artifacts, recipe, run)
    else:
        folders = [p.parent for p in sorted((artifacts / "runs").glob("*/*/run.json")) if p.parent.name == name]
        if len(folders) != 1:
            parent = artifacts / "runs" / name
            there = [f.name for f in run_folders(parent)] if PLAIN.fullmatch(name) else []
            what = f"{name} is a recipe; name one of its runs" if there else f"no run {name!r} under {artifacts}"
            names = ", ".join(f"{name}@{r}" for r in there[:5])
            also = ", ".join(f"{f.parent.name}@{f.name}" for f in folders)
            raise InputError(f"{what} ({names or also or '`finetune runs` lists them'})")
        folder = folders[0]
    if folder.is_symlink() or not folder.resolve().is_relative_to((artifacts / "runs").resolve()):
        raise InputError(f"{folder} is reached through a symbolic link that leads elsewhere; remove it by hand")
    return folder


def remove_run(folder: Path) -> None:
    """Remove a run's folder; `latest` then names the newest run that is left. Symbolic links in it are not followed.

    Raises FinetuneError if the disk refuses.
    """
    parent = folder.parent
    left = [f for f in run_folders(parent) if f != folder]
    try:
        if latest_run(parent) == folder:
            if left:
                replace_bytes(parent / "latest", f"{left[0].name}\n".encode())
            else:
                (parent / "latest").unlink()
        (folder / "run.json").unlink()  # first: a partly removed folder must not look like a run
        shutil.rmtree(folder)
        if not left and not any(parent.iterdir()):
            parent.rmdir()
    except OSError as error:
        raise FinetuneError(f"{folder}: cannot be removed: {error.strerror or error}") from None


def read_run(artifacts: Path, recipe: str, run: str | None) -> dict[str, Any]:
    """Return run.json of a run (the newest by default). Raises InputError with the names of existing runs."""
    folder = named_run(artifacts, recipe, run)
    return read_record(folder) | {"folder": folder}


def read_record(folder: Path) -> dict[str, Any]:
    """Return run.json of a run's folder. Raises InputError if it is truncated, edited or of another form."""
    path = folder / "run.json"
    try:
        value = json.loads(links.read_regular(path))
        stages = value["stages"]
        _Recorded.model_validate({**value, "stages": stages}, strict=True)
        return {"recipe": str(value["recipe"]), "run": folder.name, "sets": list(value["sets"]), "stages": stages}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno in MACHINE:
            raise FinetuneError(f"{path}: cannot be read: {error.strerror}; see to it, and run again") from None
        raise InputError(
            f"{path}: not the record of a run (truncated or edited); remove {folder} and run the recipe again: "
            "finished stages are not rebuilt"
        ) from None


def begun_at(run: str) -> datetime.datetime | None:
    """Return the time in a run's name, 20261130T114606Z-2a8ecdb6; None for another name."""
    try:
        return datetime.datetime.strptime(run.split("-")[0], "%Y%m%dT%H%M%SZ").replace(tzinfo=datetime.UTC)
    except ValueError:
        return None


def recipe_text(folder: Path) -> str:
    """Return recipe.yaml of a run's folder. Raises InputError if it is missing or not text."""
    path = folder / "recipe.yaml"
    with reading(f"{path}: not the recipe of a run; run the recipe again"):
        return links.read_regular(path).decode()


def recorded_recipe(value: Mapping[str, Any], sets: Sequence[str] = ()) -> Recipe:
    """Return the recipe as the run `value` (run.json and its folder) read it, with `--set`, and further `sets`."""
    path = value["folder"] / "recipe.yaml"
    return parse_recipe(recipe_text(path.parent), path, [*value["sets"], *sets])


@contextmanager
def recorded(folder: Path) -> Iterator[None]:
    """Turn errors from unexpected values in run.json of `folder` into InputError."""
    with reading(f"{folder / 'run.json'}: a value in it, or in a file that it names, has an unexpected type"):
        yield
