"""One command's work around the pipeline: roots, signals, progress, the run's record, the closing table."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from finetune import pipeline
from finetune.context import Context, StopFlag
from finetune.environment import describe_environment
from finetune.errors import InputError
from finetune.recipe import Recipe
from finetune.recipe_file import LoadedRecipe, load_recipe, parse_recipe
from finetune.report.console import Screen, print_table, stage_figure, stage_rows
from finetune.runs import Run, read_run
from finetune.store import Store, make_key


def run_recipe(
    name: str, *, until: str | None, sets: Sequence[str], artifacts: Path, scratch: Path, fresh: bool
) -> None:
    """Load, check, build what is missing, and say where everything is. Errors pass through with their exit status."""
    if until is not None:
        pipeline.stage_named(until)
    # Threads that spin while they wait make a step many times slower when another process wants the same core; to spin
    # less costs nothing on a quiet machine (docs/lab-notes.md). libgomp reads this when torch is loaded, later on.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    loaded = load_recipe(name, sets)
    rank, world = _ranks()
    screen = Screen(silent=rank != 0)
    store = Store(artifacts, scratch)
    record = _record(loaded, store, write=rank == 0)
    start = time.monotonic()
    with _signals(screen) as stop:
        ctx = _context(loaded.recipe, store, screen, stop, record.name, rank, world)
        try:
            steps = pipeline.run(
                loaded.recipe,
                store,
                ctx,
                record,
                until=until,
                fresh=fresh,
                before_building=lambda steps: _preflight(loaded.recipe, steps, until, store, ctx),
            )
        finally:
            if record.stages:
                record.save()
    if rank == 0:
        _print_result(loaded, steps, record, time.monotonic() - start)


def publish_run(
    name: str, *, repo: str | None, dry_run: bool, sets: Sequence[str], artifacts: Path, scratch: Path
) -> None:
    """Push what a finished run made; prints where it went, or, dry, the files and the card."""
    from finetune.report.model_card import model_card
    from finetune.stages import publish

    recipe_name, _, run_name = name.partition("@")
    store = Store(artifacts, scratch)
    short = _recipe_name(recipe_name)
    value = read_run(store.artifacts, short, run_name or None)
    text = (value["folder"] / "recipe.yaml").read_text(encoding="utf-8")
    recipe = parse_recipe(text, value["folder"] / "recipe.yaml", [*value["sets"], *sets])
    found = {n: pipeline.stage_folder(store, n, s) for n, s in value["stages"].items() if s["status"] == "done"}
    folders = {n: f for n, f in found.items() if f is not None}
    needed = {"base", "render", "train", *(["merge"] if "merged" in recipe.publish.what else [])}
    unfinished = [n for n in folders if n in needed and store.find(folders[n]) is None]
    if unfinished:
        raise InputError(
            f"{', '.join(unfinished)} of {short} is gone or incomplete: run `finetune run {recipe_name}` first"
        )
    metrics = {n: s["metrics"] for n, s in value["stages"].items()}
    screen = Screen()
    with _signals(screen) as stop:
        ctx = _context(recipe, store, screen, stop, value["run"], 0, 1)
        receipt = publish.publish(
            recipe, value["folder"], folders, metrics, repo, dry_run, ctx, card=model_card, recipe_text=text
        )
    _print_receipt(receipt)


def _print_receipt(receipt: dict[str, Any]) -> None:
    for push in receipt["pushes"]:
        if receipt["dry_run"]:
            print(f"{push['kind']} → {push['repo']}: {len(push['files'])} files, {push['bytes']:,} bytes")  # noqa: T201
            for file in push["files"]:
                print(f"  {file['bytes']:>15,}  {file['path']}")  # noqa: T201
            print(f"\n{push['card']}")  # noqa: T201
        else:
            print(f"{push['repo']} at {push['commit']}: {len(push['files'])} files verified")  # noqa: T201


def _recipe_name(name: str) -> str:
    """Runs are filed under the recipe's `name:`; a path is read for it."""
    if name.endswith((".yaml", ".yml")):
        return load_recipe(name).recipe.name
    return name


def _ranks() -> tuple[int, int]:
    """The rank of this process and their number, as accelerate and torchrun hand them down."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _record(loaded: LoadedRecipe, store: Store, *, write: bool) -> Run:
    digest = make_key("recipe", 1, loaded.recipe.model_dump(mode="json"), {}, {})
    return Run(store.artifacts, loaded.recipe.name, loaded.text, loaded.sets, digest, write=write)


def _context(
    recipe: Recipe, store: Store, screen: Screen, stop: StopFlag, run_name: str, rank: int, world: int
) -> Context:
    recorded: dict[str, Any] = {"recipe": recipe.model_dump(mode="json"), **describe_environment()}
    return Context(
        scratch=store.scratch,
        runtime=recipe.runtime,
        tracking=recipe.tracking,
        run_name=f"{recipe.name}-{run_name}",
        say=screen.say,
        bar=screen.bar,
        stop=stop,
        device=recipe.runtime.device,
        rank=rank,
        world=world,
        environment=recorded,
    )


@contextmanager
def _signals(screen: Screen) -> Iterator[StopFlag]:
    """The first SIGINT or SIGTERM asks the work to save and stop; a second one leaves at once."""
    stop = StopFlag()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.signal_number:
            os._exit(128 + number)
        stop.signal_number = number
        screen.say(f"{signal.Signals(number).name}: saving and stopping (again to leave at once)")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _preflight(recipe: Recipe, steps: list[pipeline.Step], until: str | None, store: Store, ctx: Context) -> None:
    from finetune import preflight

    if ctx.rank == 0:
        last = pipeline.STAGE_NAMES.index(until) if until else len(steps)
        asked = steps[: last + 1]
        preflight.check_folders(recipe, asked, store)
        for note in preflight.check(recipe, asked, ctx.world):
            ctx.say(note)


def _print_result(loaded: LoadedRecipe, steps: list[pipeline.Step], record: Run, seconds: float) -> None:
    rows = []
    for step in steps:
        m = step.manifest
        if m is None:
            rows.append([step.stage.name, "", "", "off"])
            continue
        rows.append([m.stage, stage_rows(m.stage, m.metrics), f"{m.seconds:.1f}", stage_figure(m.stage, m.metrics)])
    print_table(f"{loaded.recipe.name}  {record.name}", ["stage", "rows", "seconds", "figure"], rows)
    folders = {s.stage.name: s.folder for s in steps if s.manifest}
    for label, stage, inside in (
        ("merged model", "merge", ""),
        ("adapter", "train", "adapter"),
        ("rows", "dedup", "rows.parquet"),
        ("why a row is absent", "filter", "rejects.parquet"),
        ("duplicates", "dedup", "pairs.parquet"),
        ("samples", "evaluate", "samples.jsonl"),
        ("certificate", "certify", "certificate.json"),
    ):
        if folder := folders.get(stage):
            print(f"{label:>20}  {folder / inside if inside else folder}")  # noqa: T201 - the command's result
    print(f"{'run':>20}  {record.folder}\n{seconds:.1f} s")  # noqa: T201
    if loaded.recipe.model.kind == "builtin":
        print("\nA real 7B, on a machine with a GPU:  make sft RECIPE=mistral-guanaco")  # noqa: T201
