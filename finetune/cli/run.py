"""`finetune run`: roots, signals, progress, the run's record, the closing table."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.cli.options import root_options
from finetune.cli.session import make_context, signals_handled
from finetune.context import Context
from finetune.engine.interface import Engine
from finetune.errors import FinetuneError, InputError
from finetune.eval.metrics import never_stops
from finetune.eval.verdict import DEFINITIONS, Verdict, few_steps, verdict_of
from finetune.pipeline import launch, run_view, runner
from finetune.pipeline.recipe_names import load_recipe
from finetune.pipeline.runs import Run
from finetune.pipeline.stage_list import STAGE_NAMES, headline_of, stage_named
from finetune.pipeline.store import Store, make_key
from finetune.recipe import Recipe
from finetune.recipe.load import LoadedRecipe
from finetune.report.live import Live
from finetune.utils.console import Screen, print_error, print_table
from finetune.utils.streams import print_text

DEFAULT_MODEL = "mistralai/Mistral-7B-Instruct-v0.2"


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
    engine: str = "local",
    ray_address: str | None = None,
) -> Run:
    """Load, check, build the missing stages, and print all folders; return the run's record.

    Errors pass through with their exit status.
    """
    if until is not None:
        stage_named(until)
    _check_engine(engine, ray_address)
    # Threads that spin while they wait make a step many times slower when another process wants the same core; to spin
    # less costs nothing on a quiet machine (docs/lab-notes.md). libgomp reads this when torch is loaded, later on.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    rank, world = launch.ranks(os.environ)
    loaded = load_recipe(name, sets, artifacts)
    screen = Screen(silent=rank != 0)
    for line in loaded.notes:
        screen.say(line)
    store = Store(artifacts, scratch)
    digest = make_key("recipe", 1, loaded.recipe.model_dump(mode="json"), {}, {})
    record = Run(store.artifacts, loaded.recipe.name, loaded.text, loaded.sets, digest, write=rank == 0)
    start = time.monotonic()
    with signals_handled(screen, launched=world > 1) as stop, ExitStack() as owned:
        ctx = make_context(loaded.recipe, store, screen, stop, record.name, rank, world)
        live = Live(record, loaded.recipe, store, until)
        if rank == 0:
            record.on_change, ctx = live.write, ctx.heard_by(live.heard)
        ctx = replace(ctx, engine=owned.enter_context(_engine(engine, ray_address, ctx, store, loaded.recipe)))
        if mirror and rank == 0:
            from finetune.pipeline.mirror import mirrored

            owned.enter_context(mirrored(mirror, store, record, ctx, fresh=fresh))

        def before_building(steps: list[runner.Step]) -> None:
            _preflight(loaded.recipe, steps, until, store, ctx, force=force)
            if rank == 0:  # while the lease is held, `clean` keeps the stages of this run
                record.begin()
                owned.enter_context(store.lease(record.folder, screen.say, stop.check))

        def after_building(step: runner.Step) -> None:
            if rank == 0:
                _check_on_base(run_view.with_start(loaded.recipe, store), step, until)
                for line in warnings_before_training(loaded.recipe, step):
                    screen.say(line)

        try:
            steps = runner.run(
                loaded.recipe, store, ctx, record, until=until, fresh=fresh,
                before_building=before_building, after_building=after_building,
            )  # fmt: skip
        finally:
            _save_record(record, screen)
            _end_page(live, store, record, screen, report=rank == 0 and not stop.signal_number)
    if rank == 0:
        _print_result(loaded, steps, record, time.monotonic() - start, until, store)
    return record


def _check_engine(engine: str, ray_address: str | None) -> None:
    if engine not in ("local", "ray"):
        raise InputError(f"--engine: found {engine!r}; allowed: local, ray")
    if ray_address and engine != "ray":
        raise InputError("--ray-address names a Ray cluster: add --engine ray")


def _engine(
    name: str, address: str | None, ctx: Context, store: Store, recipe: Recipe
) -> AbstractContextManager[Engine]:
    """Return a context with the engine: this process's own, a local Ray cluster, or the one at `address`.

    Data stages run on rank 0, so the other ranks start none.
    """
    if name == "local" or ctx.rank:
        return nullcontext(ctx.engine)
    from finetune.engine import ray

    folders = [store.artifacts, store.scratch] if address else []
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    files = [recipe.render.template_file] if recipe.render.template_file else []
    return ray.started(address, folders, ctx.say, files, recipe.runtime.workers)


def _save_record(record: Run, screen: Screen) -> None:
    """Save the record; a full or read-only disk must neither hide an error nor fail a finished run."""
    try:
        if record.stages and not record.refused:  # the error that ends the run already reports it
            record.save()
    except (OSError, FinetuneError) as error:
        screen.say(f"the run's record was not written: {error}")


def _end_page(live: Live, store: Store, record: Run, screen: Screen, *, report: bool) -> None:
    """Replace the live page by the report, or else by a last live page: one that reloads looks like a run."""
    live.end()  # first: a line of the mirror's thread must not overwrite the report
    reported = False
    try:
        reported = report and not record.refused and _write_report(store, record, screen)
    finally:  # also after a signal while the report was written
        if not reported:
            live.write(reload=False)


def _write_report(store: Store, record: Run, screen: Screen) -> bool:
    """Write the run's report unless it exists: a run that builds nothing reads nothing again. Return whether it is
    there.
    """
    there = not record.begun and (record.folder / "report.html").exists()  # of the run whose record equals this one
    if there or not (record.folder / "run.json").is_file():
        return there
    try:
        from finetune.report.page import write_report

        write_report(store, f"{record.recipe}@{record.name}")
        return True
    except Exception as error:  # no failure here may affect the run
        screen.say(f"the report could not be written: {error} (`finetune report {record.recipe}` tries again)")
        return False


def launch_recipe(name: str, processes: int, asked: Mapping[str, Any]) -> None:
    """Run in several processes: each trains its share of every batch, the first runs the other stages.

    `asked` are the arguments of run_recipe in each of them.
    """
    if launch.ranks(os.environ)[1] > 1:
        raise InputError("--processes starts its own processes: remove it under accelerate launch or torchrun")
    _check_engine(asked["engine"], asked["ray_address"])
    if asked["engine"] != "local":
        raise InputError("--engine ray runs the data stages: run with --until pack first, then with --processes alone")
    load_recipe(name, asked["sets"], asked["artifacts"])  # its errors are printed once, here
    values = [w for n in ("artifacts", "scratch", "until", "mirror") if asked[n] for w in (f"--{n}", str(asked[n]))]
    flags = [f"--{n}" for n in ("fresh", "force") if asked[n]]
    launch.launch(["run", name, *values, *flags, *(f"--set={s}" for s in asked["sets"])], processes)


def _preflight(
    recipe: Recipe, steps: list[runner.Step], until: str | None, store: Store, ctx: Context, *, force: bool
) -> None:
    from finetune.pipeline import preflight

    if ctx.rank == 0:
        last = STAGE_NAMES.index(until) if until else len(steps)
        asked = steps[: last + 1]
        preflight.check_folders(recipe, asked, store)
        recipe = run_view.with_start(recipe, store)
        for note in preflight.check(recipe, asked, ctx.world, force=force, scratch=store.scratch):
            ctx.say(note)
        if last >= STAGE_NAMES.index("train") and (line := preflight.more_epochs(recipe, steps, store)):
            ctx.say(line)


def _check_on_base(recipe: Recipe, step: runner.Step, until: str | None) -> None:
    """Run checks that need the base, which the preflight lacked and the stages would report only after hours."""
    from finetune.pipeline import preflight

    last = STAGE_NAMES.index(until or STAGE_NAMES[-1])
    if step.stage.name == "base" and last >= STAGE_NAMES.index("train"):
        preflight.check_adapter(recipe, step.folder)


def warnings_before_training(recipe: Recipe, step: runner.Step) -> Iterator[str]:
    """Warn of private text once the rows are split, and of few optimiser steps once they are rendered or packed."""
    from finetune.publish.private_rows import private_text
    from finetune.train.batch import sizing_advice, total_steps

    name, manifest = step.stage.name, step.manifest
    if manifest is None or step.folder is None or (recipe.train is None and name != "pairs"):
        return
    if name in ("pairs", "split" if recipe.holds_out else "dedup") and (
        line := private_text(recipe, {name: step.folder}, "training")
    ):
        yield line
    if name != ("pack" if recipe.pack else "render"):
        return
    bins = int(manifest.metrics.get("bins") or manifest.metrics.get("rows") or 0)
    documents = int(manifest.metrics.get("documents") or bins)
    steps = total_steps(bins, recipe.training)
    if line := few_steps(steps, sizing_advice(documents, bins)):
        yield f"train: {line}"


def dropped_rows(steps: Sequence[runner.Step]) -> dict[str, int]:
    """Return the number of rows dropped by each stage, without stages that dropped none."""
    dropped = {}
    for step in steps:
        files = step.manifest.files if step.manifest else {}
        named = [files[n].rows or 0 for n in ("refused.parquet", "rejects.parquet", "pairs.parquet") if n in files]
        if total := sum(named):
            dropped[step.stage.name] = total
    return dropped


def _print_verdict(steps: Sequence[runner.Step], folder: Path) -> Verdict | None:
    """Return the verdict in five lines, as in the report. Results from reading rows are kept in the run's folder."""
    done = {s.stage.name: s for s in steps if s.manifest}
    metrics = {name: s.manifest.metrics for name, s in done.items() if s.manifest}
    judged = verdict_of(metrics, {name: s.folder for name, s in done.items()}, folder / "copies.json")
    if judged is not None:
        print_text("\nverdict")
        for line in judged.lines:
            print_text(f"  {line}")
        print_text(f"  ({DEFINITIONS})")
    return judged


def next_step(loaded: LoadedRecipe, judged: Verdict | None, until: str | None, store: Store | None = None) -> str:
    """Return the command that mostly comes next for this recipe; it names roots that are not the default ones."""
    name, roots = loaded.recipe.name, "".join(f" {shlex.quote(w)}" for w in (root_options(store) if store else []))
    if judged is None:
        return f"next: finetune run {loaded.path}{roots}" if until else f"next: finetune show {name}{roots}"
    if judged.refusal:
        return f"next: finetune report {name}{roots}, then change train in {loaded.path} and run it again"
    return f"next: finetune chat {name}{roots}"


def _print_result(
    loaded: LoadedRecipe, steps: list[runner.Step], record: Run, seconds: float, until: str | None, store: Store
) -> None:
    rows = []
    for step in steps:
        m = step.manifest
        if m is None:
            rows.append([step.stage.name, "", "", "off"])
            continue
        headline = headline_of(m.stage, m.metrics)
        rows.append([m.stage, headline.rows, f"{m.seconds:.1f}", headline.figure])
    print_table(f"{loaded.recipe.name}  {record.name}", ["stage", "rows", "seconds", "figure"], rows)
    folders = {s.stage.name: s.folder for s in steps if s.manifest}
    rejects = {s.stage.name: s.manifest.files.get("rejects.parquet") for s in steps if s.manifest}
    for label, stage, inside in (
        ("merged model", "merge", ""),
        ("adapter", "align" if "align" in folders else "train", "adapter"),
        ("rows", "dedup", "rows.parquet"),
        *(("why a row is absent", stage, "rejects.parquet") for stage, file in rejects.items() if file and file.rows),
        ("duplicates", "dedup", "pairs.parquet"),
        ("samples", "evaluate", "samples.jsonl"),
        ("certificate", "certify", "certificate.json"),
    ):
        if folder := folders.get(stage):
            print_text(f"{label:>20}  {folder / inside if inside else folder}")
    if (report := record.folder / "report.html").is_file():
        print_text(f"{'report':>20}  {report}")
    print_text(f"{'run':>20}  {record.folder}\n{seconds:.1f} s")
    if dropped := dropped_rows(steps):
        words = ", ".join(f"{count:,} by {stage}" for stage, count in dropped.items())
        print_text(f"{'rows left out':>20}  {sum(dropped.values()):,}: {words}")
    judged = _print_verdict(steps, record.folder)
    for step in steps:
        if step.manifest and (words := never_stops(step.manifest.metrics)):
            print_error(words)  # again, where it is not scrolled away, and in every run that finds it
    print_text(f"\n{next_step(loaded, judged, until, store)}")
    if loaded.recipe.model.kind == "builtin":
        name = loaded.recipe.name
        larger = f"the same `finetune init` as for {name}, with --name {name}-7b --model {DEFAULT_MODEL} --device t4"
        if any(source.source == "pydoc" for source in loaded.recipe.data):
            larger = "make sft RECIPE=mistral-guanaco"
        print_text(f"A 7B, on a machine with a GPU: {larger}")
