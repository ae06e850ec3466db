"""`finetune report` and `finetune sweep`: the page of a run, and that of runs over a grid of settings."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from finetune.cli.options import (
    ARTIFACTS,
    SCRATCH,
    Artifacts,
    AsJson,
    RecipeName,
    RunName,
    Scratch,
    Sets,
    note,
    root_options,
)
from finetune.utils.streams import print_text


def report(
    run: RunName,
    in_browser: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
    artifacts: Artifacts = ARTIFACTS,
    scratch: Scratch = SCRATCH,
) -> None:
    """Write report.html into the folder of the newest finished run, or of the run named, and print its path.

    The page of a run in progress (RECIPE@RUN, or with --open the newest) is live: the run itself writes it.
    """
    from finetune.pipeline import run_view
    from finetune.pipeline.leases import is_being_built
    from finetune.pipeline.runs import named_run
    from finetune.pipeline.store import Store
    from finetune.report.page import REPORT, write_report

    recipe, name = run_view.split_name(run)
    page = named_run(artifacts, recipe, name) / REPORT
    if (in_browser or name) and page.exists() and is_being_built(page.parent):
        note(f"{recipe}@{page.parent.name} is running; its page is live")
    else:
        page = write_report(Store(artifacts, scratch), run, note)
    print_text(page)
    if in_browser and typer.launch(page.absolute().as_uri()):
        note("no browser could be started; copy the page to a machine that has one")


def sweep(
    recipe: RecipeName,
    grid: Annotated[list[str], typer.Option("--grid", metavar="A.B='[V, W]'", help="A field and its values.")],
    metric: Annotated[
        str, typer.Option(metavar="STAGE.NAME", help="The number to compare, as `finetune show` lists it.")
    ] = "evaluate.perplexity_adapter",
    highest: Annotated[bool, typer.Option("--highest", help="The highest value is the best, not the lowest.")] = False,
    sets: Sets = None,
    as_json: AsJson = False,
    processes: Annotated[int, typer.Option(min=1, max=128, help="Train in this many processes, one a GPU.")] = 1,
    artifacts: Artifacts = ARTIFACTS,
    scratch: Scratch = SCRATCH,
) -> None:
    """Run a recipe for every combination of --grid values, as far as the stage of --metric, and compare them.

    Stages that the grid does not change are built once. The same command continues after a stop. A table is printed;
    the page with the plot is in ARTIFACTS/sweeps.
    """
    from finetune.pipeline import launch
    from finetune.pipeline import sweep as sweeps
    from finetune.pipeline.store import Store
    from finetune.report import sweep_page
    from finetune.utils.console import print_table
    from finetune.utils.format import json_text

    planned = sweeps.plan_sweep(recipe, grid, metric, sets or [], artifacts, highest=highest)
    store = Store(artifacts, scratch)
    options = ["--processes", str(processes)] if processes > 1 else []
    results: list[sweeps.Result] = []
    best, page = "", None
    try:
        for results in sweeps.run_points(planned, store, note, launch.run_alone, options):
            if winner := planned.best(results):
                values = [f"--set={text}" for text in winner.point.sets]
                best = shlex.join(["finetune", "run", recipe, *values, *options, *root_options(store)])
            page = sweep_page.write_page(store, planned, results, best)
    finally:
        if results and as_json:
            print_text(json_text(sweeps.as_json(planned, results)))
        elif results:
            print_table(
                f"{planned.loaded.recipe.name}: {metric}",
                sweep_page.columns(planned),
                sweep_page.table(planned, results),
            )
            print_text(f"page  {page}")
            print_text(f"next  {best}" if best else "")
