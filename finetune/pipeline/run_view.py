"""Read a recorded run: stages, their current folders, problems."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.errors import InputError
from finetune.pipeline.runs import named_run, read_record, read_run, run_folders
from finetune.pipeline.stage_list import STAGE_NAMES, stage_folder
from finetune.pipeline.store import Store
from finetune.recipe import Recipe
from finetune.recipe.load import load_recipe


def read(store: Store, name: str) -> dict[str, Any]:
    """Return run.json of `RECIPE[@RUN]`, the newest by default, with every stage's current status on disk."""
    recipe, run = split_name(name)
    return _as_now(store, read_run(store.artifacts, recipe, run))


def split_name(name: str) -> tuple[str, str | None]:
    """Split `RECIPE[@RUN]`; a path to a recipe is read for its `name:`, under which its runs are filed."""
    recipe, _, run = name.partition("@")
    if recipe.endswith((".yaml", ".yml")):
        recipe = load_recipe(recipe).recipe.name
    return recipe, run or None


def finished(
    store: Store,
    name: str,
    needs: Callable[[dict[str, Any]], Collection[str]] = lambda value: (),
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Read the record of the run `name`: `RECIPE@RUN`, or `RECIPE` for a run that is chosen as follows.

    The first that exists: the newest finished run in which the stages that `needs` returns are done; the newest run in
    which they are done; the newest run. A run is finished if no stage in its record failed, was refused or is
    incomplete. `say` gets one line if a newer run is skipped.

    Raises InputError if there is no run, or if no record can be read.
    """
    recipe, run = split_name(name)
    if run is not None:
        return read(store, name)
    folders = run_folders(store.artifacts / "runs" / named_run(store.artifacts, recipe, None).parent.name)
    usable: list[dict[str, Any]] = []
    for folder in folders:
        try:
            value = _as_now(store, read_run(store.artifacts, recipe, folder.name))
            satisfied = all(value["stages"][stage]["status"] == "done" for stage in needs(value))
        except InputError as error:
            if len(folders) == 1:
                raise
            say(str(error))
            continue
        if satisfied and unfinished_stage(value) is None:
            break
        usable += [value] if satisfied else []
    else:
        value = usable[0] if usable else read(store, name)
    if value["folder"] != folders[0]:
        try:
            why = f"is {status_of(read(store, f'{recipe}@{folders[0].name}'))}"
        except InputError:
            why = "cannot be read"
        say(f"{recipe}: the newest run {folders[0].name} {why}; using {recipe}@{value['run']}")
    return value


def adapter_stage(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the stage of a run's record that holds the adapter: align, if it is on and was reached; else train.

    It may have failed: check its status.
    """
    record = stages.get("align")
    reached = record is not None and record["status"] != "off" and bool(record.get("key") or record.get("path"))
    return "align" if reached else "train"


def adapter_needs(value: dict[str, Any]) -> Collection[str]:
    """For `finished`: the base and the stage with the adapter."""
    return ("base", adapter_stage(value["stages"]))


def done_folders(value: dict[str, Any], stages: Collection[str], name: str) -> list[Path]:
    """Return the folders of these stages of the run `name`. Raises InputError for the first that is not finished."""
    for stage in stages:
        if (status := value["stages"][stage]["status"]) != "done":
            command = f"finetune run {name.partition('@')[0]}"
            raise InputError(f"{stage} of {value['recipe']}@{value['run']} is {status}: run `{command}` first")
    return [Path(value["stages"][stage]["path"]) for stage in stages]


def chosen_by_commands(store: Store, folders: Sequence[Path], stages: Collection[str]) -> set[Path]:
    """Return those of a recipe's runs, newest first, that `finished` chooses for some needs out of `stages`.

    A run is never chosen if one before it (finished ones come first) has at least the same of these stages done.
    """
    read: list[tuple[bool, frozenset[str], Path]] = []
    for folder in folders:
        try:
            value = _as_now(store, read_record(folder))
        except InputError:
            continue
        done = frozenset(stage for stage in stages if value["stages"][stage]["status"] == "done")
        read.append((unfinished_stage(value) is not None, done, folder))
    chosen: list[tuple[frozenset[str], Path]] = []
    for _, done, folder in sorted(read, key=lambda entry: entry[0]):
        if not any(done <= before for before, _ in chosen):
            chosen.append((done, folder))
    return {folder for _, folder in chosen}


def with_start(recipe: Recipe, store: Store, say: Callable[[str], None] = lambda line: None) -> Recipe:
    """Return the recipe with the folder of the adapter if lora.start_from names a run; any other recipe as it is.

    Raises InputError if there is no such run, or none whose training is finished.
    """
    if recipe.lora.start_run is None or recipe.lora.start_folder is not None:
        return recipe
    name = str(recipe.lora.start_from)
    try:
        value = finished(store, name, adapter_needs, say)
    except InputError as error:
        raise InputError(f"lora.start_from: {error}; a folder is written /… or ./…, a Hub id OWNER/NAME") from None
    stage = adapter_stage(value["stages"])
    train = value["stages"][stage]
    if train["status"] != "done":
        raise InputError(
            f"lora.start_from: {stage} of {value['recipe']}@{value['run']} is {train['status']}; name a run whose "
            "training is finished (`finetune runs` lists them)"
        )
    say(f"lora.start_from: the adapter of {value['recipe']}@{value['run']}")
    lora = recipe.lora.model_copy(update={"start_folder": Path(train["path"]) / "adapter"})
    return recipe.model_copy(update={"lora": lora})


def unfinished_stage(value: dict[str, Any]) -> str | None:
    """Return the stage in which a run ended early (failed, refused, or half built); None if it finished."""
    for name, record in value["stages"].items():
        cleaned_away = record["status"] == "missing" and record.get("key") and not record["metrics"]
        if cleaned_away or record["status"] in ("failed", "refused", "partial"):
            return name
    return None


def status_of(value: dict[str, Any]) -> str:
    """Return how a run ended, for a table: done, `until STAGE`, or `failed in STAGE` (refused, partial, gone)."""
    stage = unfinished_stage(value)
    if stage is not None:
        status = value["stages"][stage]["status"]
        return f"{'partial' if status == 'missing' else status} in {stage}"
    recorded = [n for n, s in value["stages"].items() if s["status"] != "missing" or s.get("key")]
    if gone := [n for n in recorded if value["stages"][n]["status"] == "missing"]:
        return f"done, files of {gone[0]} gone"
    return "done" if recorded[-1:] == [STAGE_NAMES[-1]] else f"until {recorded[-1]}" if recorded else "empty"


def newer_than_finished(store: Store, value: dict[str, Any], name: str) -> str:
    """Return a line that names the newest finished run if `name` asked for none and `value` is a newer attempt."""
    if "@" in name or unfinished_stage(value) is None:
        return ""
    done = finished(store, value["recipe"])
    if done["run"] == value["run"]:
        return ""
    other = f"{value['recipe']}@{value['run']} is {status_of(value)}"
    return f"{other}; the newest finished run is {value['recipe']}@{done['run']}"


def _as_now(store: Store, value: dict[str, Any]) -> dict[str, Any]:
    reached = max((STAGE_NAMES.index(n) for n in value["stages"] if n in STAGE_NAMES), default=-1)
    for number, stage in enumerate(STAGE_NAMES):
        status = "off" if number < reached else "missing"  # a stage that the version of this record did not have
        record = value["stages"].setdefault(stage, {"status": status, "path": None, "seconds": None, "metrics": {}})
        folder = stage_folder(store, stage, record)
        record["path"] = str(folder) if folder else None
        if record["status"] in ("done", "partial"):  # an edited record may name no folder
            if folder and store.find(folder) is not None:
                record["status"] = "done"
            else:
                record["status"] = "partial" if folder and folder.is_dir() else "missing"
    value["stages"] = {stage: value["stages"][stage] for stage in STAGE_NAMES}
    return value


def public(value: dict[str, Any]) -> dict[str, Any]:
    """Return the value that `--json` prints."""
    return {"recipe": value["recipe"], "run": value["run"], "stages": value["stages"]}


def verify(store: Store, value: dict[str, Any]) -> list[str]:
    """Return a message for every file of the run that differs from its manifest."""
    problems = []
    for stage, record in value["stages"].items():
        if record["status"] == "off" or not record["path"]:
            continue
        folder = Path(record["path"])
        manifest = store.find(folder)
        if manifest is not None:
            problems += [f"{stage}: {p}" for p in store.verify(folder, manifest)]
        elif record["metrics"]:
            problems.append(f"{stage}: {folder} is gone or incomplete")
    return problems
