"""One command's work around the pipeline: roots, signals, progress, the run's record, the closing table."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from finetune import launching, pipeline
from finetune.context import Context, StopFlag
from finetune.environment import describe_environment
from finetune.errors import FinetuneError, InputError, Stopped
from finetune.metrics.stop_rate import never_stops
from finetune.recipe import Recipe
from finetune.recipe_file import LoadedRecipe, load_recipe, parse_recipe
from finetune.report.console import Screen, print_error, print_table, stage_figure, stage_rows
from finetune.runs import Run, read_run
from finetune.store import Store, make_key

LEAVE_SECONDS = 20.0  # after a signal that found nothing to save


def run_recipe(
    name: str,
    *,
    until: str | None,
    sets: Sequence[str],
    artifacts: Path,
    scratch: Path,
    fresh: bool,
    force: bool = False,
    mirror: str | None = None,
) -> None:
    """Load, check, build what is missing, and say where everything is. Errors pass through with their exit status."""
    if until is not None:
        pipeline.stage_named(until)
    # Threads that spin while they wait make a step many times slower when another process wants the same core; to spin
    # less costs nothing on a quiet machine (docs/lab-notes.md). libgomp reads this when torch is loaded, later on.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    rank, world = launching.ranks(os.environ)
    loaded = load_recipe(name, sets)
    screen = Screen(silent=rank != 0)
    store = Store(artifacts, scratch)
    record = _record(loaded, store, write=rank == 0)
    start = time.monotonic()
    with _signals(screen, launched=world > 1) as stop, ExitStack() as owned:
        ctx = _context(loaded.recipe, store, screen, stop, record.name, rank, world)

        if mirror and rank == 0:
            from finetune.mirroring import mirrored

            owned.enter_context(mirrored(mirror, store, record, ctx, fresh=fresh))

        def before_building(steps: list[pipeline.Step]) -> None:
            _preflight(loaded.recipe, steps, until, store, ctx, force=force)
            if rank == 0:  # while the lease lives, `clean` leaves alone what this run has found or made
                record.begin()
                owned.enter_context(store.lease(record.folder, screen.say, stop.check))

        def after_building(step: pipeline.Step) -> None:
            if rank == 0:
                _check_on_base(loaded.recipe, step, until)

        try:
            steps = pipeline.run(
                loaded.recipe, store, ctx, record, until=until, fresh=fresh,
                before_building=before_building, after_building=after_building,
            )  # fmt: skip
        finally:
            _save_record(record, screen)
            if rank == 0 and not stop.signal_number and not record.refused:
                _write_report(store, record, screen)
    if rank == 0:
        _print_result(loaded, steps, record, time.monotonic() - start)


def _save_record(record: Run, screen: Screen) -> None:
    """A disk that is full or read-only must neither hide a sentence that matters more nor fail a run that is there."""
    try:
        if record.stages and not record.refused:  # the error that ends the run says so already
            record.save()
    except (OSError, FinetuneError) as error:
        screen.say(f"the run's record was not written: {error}")


def _write_report(store: Store, record: Run, screen: Screen) -> None:
    """The run's page, unless it is there: a run that found everything finished reads nothing again."""
    if not (record.folder / "run.json").is_file() or (record.folder / "report.html").exists():
        return
    try:
        from finetune.reporting import write_report

        write_report(store, f"{record.recipe}@{record.name}")
    except Exception as error:  # whatever it is, the run itself is none the worse for it
        screen.say(f"the report could not be written: {error} (`finetune report {record.recipe}` tries again)")


def launch_recipe(
    name: str,
    processes: int,
    *,
    until: str | None,
    sets: Sequence[str],
    artifacts: Path,
    scratch: Path,
    fresh: bool,
    force: bool = False,
    mirror: str | None = None,
) -> None:
    """The same in several processes of this machine: each trains its share of every batch, the first does the rest."""
    if launching.ranks(os.environ)[1] > 1:
        raise InputError("--processes starts processes of its own: leave it out under accelerate launch or torchrun")
    load_recipe(name, sets)  # a mistake in it is said once, and here
    arguments = ["run", name, "--artifacts", str(artifacts), "--scratch", str(scratch)]
    arguments += ["--until", until] if until else []
    arguments += ["--mirror", mirror] if mirror else []
    arguments += [name for name, asked in (("--fresh", fresh), ("--force", force)) if asked]
    launching.launch([*arguments, *(f"--set={s}" for s in sets)], processes)


def publish_run(
    name: str, *, repo: str | None, dry_run: bool, sets: Sequence[str], artifacts: Path, scratch: Path
) -> None:
    """Push what a finished run made; prints where it went, or, dry, the files and the card."""
    from finetune.backends.pushed import stages_read
    from finetune.report.model_card import write_card
    from finetune.stages import publish

    recipe_name, _, run_name = name.partition("@")
    store = Store(artifacts, scratch)
    short = _recipe_name(recipe_name)
    value = read_run(store.artifacts, short, run_name or None)
    text = (value["folder"] / "recipe.yaml").read_text(encoding="utf-8")
    recipe = parse_recipe(text, value["folder"] / "recipe.yaml", [*value["sets"], *sets])
    found = {n: pipeline.stage_folder(store, n, s) for n, s in value["stages"].items() if s["status"] == "done"}
    folders = {n: f for n, f in found.items() if f is not None}
    needed = stages_read(list(recipe.publish.what), folders)
    manifests = {n: store.find(folders[n]) for n in needed | ({"ingest"} & set(folders))}
    unfinished = [n for n in folders if n in needed and manifests[n] is None]
    if unfinished:
        raise InputError(
            f"{', '.join(unfinished)} of {short} is gone or incomplete: run `finetune run {recipe_name}` first"
        )
    for name in [] if dry_run else sorted(needed):  # a flipped bit would be pushed, and then found equal to itself
        manifest = manifests[name]
        if manifest and (wrong := store.verify(folders[name], manifest)):
            raise FinetuneError(
                f"cannot publish: {'; '.join(wrong[:3])}; remove {folders[name]} and run the recipe again"
            )
    trained, read = manifests.get("train"), manifests.get("ingest")
    run = publish.Run(
        folder=value["folder"],
        recipe_text=text,
        metrics={n: s["metrics"] for n, s in value["stages"].items()},
        sets=value["sets"],
        seconds={n: s["seconds"] for n, s in value["stages"].items() if s.get("seconds")},
        versions=trained.environment.get("versions", {}) if trained else {},
        sources=read.fingerprint.get("sources", []) if read else [],
    )
    screen = Screen()
    with _signals(screen) as stop:
        ctx = _context(recipe, store, screen, stop, value["run"], 0, 1)
        receipt = publish.publish(recipe, run, folders, repo, dry_run, ctx, write_card)
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
        launch=os.environ.get("MASTER_PORT", ""),
        environment=recorded,
    )


@contextmanager
def _signals(screen: Screen, *, launched: bool = False) -> Iterator[StopFlag]:
    """The first SIGINT or SIGTERM asks the work to save and stop; the same again leaves at once.

    One of several launched processes takes the same again for the first come twice (a cluster signals every process of
    a job, and the launcher hands its own on): to leave at once is the launcher's to say, by SIGKILL.
    """
    stop = StopFlag()
    again = "" if launched else " (again to leave at once)"
    if launched:
        launching.stop_with_launcher()

    def handle(number: int, frame: FrameType | None) -> None:
        # From now on the kernel's own default: no Python code, however long it computes, stands in the way of a second
        # Ctrl-C. The other signal changes nothing: a launcher sends SIGTERM after a terminal's Ctrl-C.
        signal.signal(number, signal.SIG_IGN if launched else signal.SIG_DFL)
        if stop.signal_number:
            return
        stop.signal_number = number
        with suppress(RuntimeError, OSError):  # stderr was being written to, or its terminal is gone
            screen.say(f"{signal.Signals(number).name}: saving and stopping{again}")
        if not stop.deferred:
            leave.args = (128 + number,)
            leave.start()
            raise KeyboardInterrupt

    # A library that waits for threads of its own (a download) does not hold up the end: there is nothing to save.
    leave = threading.Timer(LEAVE_SECONDS, os._exit)
    leave.daemon = True
    stop.hold = leave.cancel
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # a lost ssh session; under nohup it is ignored, and stays so
        numbers.append(signal.SIGHUP)
    # An interruption inside a weak reference's callback or a finaliser is dropped by Python, with a traceback that
    # tells nobody anything: the next check, or `leave`, ends the work.
    hook = sys.unraisablehook

    def unraisable(dropped: sys.UnraisableHookArgs) -> None:
        if not (stop.signal_number and dropped.exc_type is KeyboardInterrupt):
            hook(dropped)

    sys.unraisablehook = unraisable
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stop
    except KeyboardInterrupt:
        raise Stopped(stop.signal_number or signal.SIGINT) from None
    finally:
        leave.cancel()
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _preflight(
    recipe: Recipe, steps: list[pipeline.Step], until: str | None, store: Store, ctx: Context, *, force: bool
) -> None:
    from finetune import preflight

    if ctx.rank == 0:
        last = pipeline.STAGE_NAMES.index(until) if until else len(steps)
        asked = steps[: last + 1]
        preflight.check_folders(recipe, asked, store)
        for note in preflight.check(recipe, asked, ctx.world, force=force):
            ctx.say(note)


def _check_on_base(recipe: Recipe, step: pipeline.Step, until: str | None) -> None:
    """What the preflight could not know before there was a base, which the stages up to train take hours to find."""
    from finetune import preflight

    last = pipeline.STAGE_NAMES.index(until or pipeline.STAGE_NAMES[-1])
    if step.stage.name == "base" and last >= pipeline.STAGE_NAMES.index("train"):
        preflight.check_adapter(recipe, step.folder)


def _rejecting(steps: list[pipeline.Step]) -> list[str]:
    """The stages that left rows out, each of which its rejects.parquet names."""
    files = {s.stage.name: s.manifest.files.get("rejects.parquet") for s in steps if s.manifest}
    return [name for name, file in files.items() if file and file.rows]


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
        *(("why a row is absent", stage, "rejects.parquet") for stage in _rejecting(steps)),
        ("duplicates", "dedup", "pairs.parquet"),
        ("samples", "evaluate", "samples.jsonl"),
        ("certificate", "certify", "certificate.json"),
    ):
        if folder := folders.get(stage):
            print(f"{label:>20}  {folder / inside if inside else folder}")  # noqa: T201 - the command's result
    if (report := record.folder / "report.html").is_file():
        print(f"{'report':>20}  {report}")  # noqa: T201
    print(f"{'run':>20}  {record.folder}\n{seconds:.1f} s")  # noqa: T201
    for step in steps:
        if step.manifest and (words := never_stops(step.manifest.metrics)):
            print_error(words)  # again, where it is not scrolled away, and in every run that finds it
    if loaded.recipe.model.kind == "builtin":
        print("\nA real 7B, on a machine with a GPU:  make sft RECIPE=mistral-guanaco")  # noqa: T201
