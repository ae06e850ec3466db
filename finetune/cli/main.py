"""The command line: parse, call, print. No logic, and heavy imports only inside the handlers."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from finetune.cli.options import (
    ARTIFACTS,
    MIRROR,
    SCRATCH,
    Artifacts,
    AsJson,
    EngineName,
    MaxNewTokens,
    Mirror,
    RayAddress,
    RecipeName,
    RunName,
    Scratch,
    Seed,
    ServerUrl,
    Sets,
    Temperature,
    before_commands,
    note,
)  # fmt: skip
from finetune.cli.report import report, sweep
from finetune.cli.serve import serve
from finetune.errors import FinetuneError, of_the_machine
from finetune.utils.quiet import silence_libraries
from finetune.utils.resources import complete_recipe
from finetune.utils.streams import print_text, steady

app = typer.Typer(
    help="QLoRA fine-tuning from one recipe: curate, train, certify, merge, publish.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.callback()(before_commands)


@app.command()
def validate(
    recipes: Annotated[
        list[str], typer.Argument(metavar="RECIPE…", help="Paths or names.", autocompletion=complete_recipe)
    ],
    sets: Sets = None,
    artifacts: Artifacts = ARTIFACTS,
    scratch: Scratch = SCRATCH,
) -> None:
    """Check recipes: every error, with file, line and field."""
    from finetune.pipeline.recipe_names import check

    for line in check(recipes, sets or [], artifacts, scratch):
        print_text(line)


@app.command()
def plan(
    recipe: RecipeName,
    as_json: AsJson = False,
    device: Annotated[str | None, typer.Option(help="Plan for another GPU: t4, l4, a100-40, h100 …")] = None,
    sets: Sets = None,
    artifacts: Artifacts = ARTIFACTS,
    scratch: Scratch = SCRATCH,
) -> None:
    """Show what a run would do and need: stages, memory, disk, download, steps, time. Builds nothing."""
    from finetune.pipeline import plan as pipeline_plan
    from finetune.pipeline import preflight, run_view, runner
    from finetune.pipeline.recipe_names import load_recipe
    from finetune.pipeline.store import Store

    store = Store(artifacts, scratch)
    loaded = load_recipe(recipe, sets or [], artifacts)
    for line in loaded.notes:
        note(line)
    planned = run_view.with_start(loaded.recipe, store, note)
    steps = runner.plan(planned, store)
    result = pipeline_plan.predict(planned, steps, device, store.scratch)
    if hint := preflight.more_epochs(planned, steps, store):
        note(hint)
    print_text(json.dumps(result, indent=1, sort_keys=True) if as_json else pipeline_plan.describe(result))


@app.command()
def run(
    recipe: RecipeName,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this stage.")] = None,
    sets: Sets = None,
    artifacts: Artifacts = ARTIFACTS,
    scratch: Scratch = SCRATCH,
    fresh: Annotated[bool, typer.Option(help="Leave an unfinished training behind and start again.")] = False,
    processes: Annotated[int, typer.Option(min=1, max=128, help="Train in this many processes, one a GPU.")] = 1,
    force: Annotated[bool, typer.Option("--force", help="Go on although the GPU seems too small.")] = False,
    mirror: Mirror = MIRROR,
    engine: EngineName = "local",
    ray_address: RayAddress = None,
) -> None:
    """Run a recipe: every stage that is not there yet, or whose inputs changed.

    The report is in ARTIFACTS/runs/NAME, the adapter in ARTIFACTS/train, the merged model in SCRATCH/merge.
    """
    from finetune.cli.run import launch_recipe, run_recipe

    asked: dict[str, Any] = {"until": until, "sets": sets or [], "artifacts": artifacts, "scratch": scratch}
    asked |= {"fresh": fresh, "force": force, "mirror": mirror, "engine": engine, "ray_address": ray_address}
    if processes > 1:
        launch_recipe(recipe, processes, asked)
    else:
        run_recipe(recipe, **asked)


@app.command()
def show(
    run: RunName,
    other: Annotated[str | None, typer.Argument(metavar="OTHER", help="A second run to compare with.")] = None,
    as_json: AsJson = False,
    verify: Annotated[bool, typer.Option("--verify", help="Rehash every file.")] = False,
    artifacts: Artifacts = ARTIFACTS,
    scratch: Scratch = SCRATCH,
) -> None:
    """Show a run: statuses, metrics, folders."""
    from finetune.cli import show as cli_show
    from finetune.pipeline import run_view
    from finetune.pipeline.store import Store
    from finetune.utils.format import json_text

    store = Store(artifacts, scratch)
    asked = [run, other] if other else [run]
    values = [run_view.read(store, name) for name in asked]
    for line in filter(None, (run_view.newer_than_finished(store, v, n) for v, n in zip(values, asked, strict=True))):
        note(line)
    problems = [p for v in values for p in run_view.verify(store, v)] if verify else []
    if as_json:
        public = [run_view.public(v) for v in values]
        print_text(json_text(public[0] if len(public) == 1 else public))
    else:
        cli_show.print_runs(values)
    if problems:
        raise FinetuneError("\n".join(problems))
    if verify:
        typer.echo("every file is as it was committed", err=True)


@app.command()
def inspect(
    recipe: RecipeName,
    rows: Annotated[int | None, typer.Option(min=1, help="How many rows: 5, or 50 on a page.")] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page instead.")] = None,
    sets: Sets = None,
    artifacts: Artifacts = ARTIFACTS,
    scratch: Scratch = SCRATCH,
) -> None:
    """Show rendered rows as the model sees them, with the supervised text in colour."""
    from finetune.cli import show as cli_show
    from finetune.pipeline.recipe_names import load_recipe
    from finetune.pipeline.store import Store

    loaded, store = load_recipe(recipe, sets or [], artifacts), Store(artifacts, scratch)
    for line in loaded.notes:
        note(line)
    if html is None:
        cli_show.print_rows(loaded.recipe, store, rows or 5)
    else:
        cli_show.write_rows_page(loaded.recipe, store, rows or 50, html)
        print_text(html)


app.command()(report)
app.command()(sweep)


@app.command()
def publish(
    run: RunName,
    repo: Annotated[str | None, typer.Option(metavar="ID", help="Instead of the recipe's publish.repo.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List files and print the card; push nothing.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Push a model that is no better than its base, or memorised.")
    ] = False,
    sets: Sets = None,
    artifacts: Artifacts = ARTIFACTS,
    scratch: Scratch = SCRATCH,
) -> None:
    """Push the adapter or the merged model to the Hub, then verify what was pushed."""
    from finetune.cli.publish import publish_run

    publish_run(run, repo=repo, dry_run=dry_run, sets=sets or [], artifacts=artifacts, scratch=scratch, force=force)


@app.command()
def merge(
    adapter: Annotated[
        str,
        typer.Argument(metavar="ADAPTER", help="A folder that peft has saved, OWNER/NAME on the Hub, or RECIPE[@RUN]."),
    ],
    base: Annotated[str | None, typer.Option(metavar="ID", help="Its base; default: the one that it names.")] = None,
    data: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="Held-out rows for the certificate.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Put the merged model here as well.")] = None,
    gguf: Annotated[list[str] | None, typer.Option(metavar="KIND", help="Also as GGUF: q8_0, q4_k_m …")] = None,
    push: Annotated[str | None, typer.Option(metavar="REPO", help="Push it to OWNER/NAME on the Hub.")] = None,
    four_bit: Annotated[
        bool | None,
        typer.Option("--four-bit/--16-bit", help="What the base was stored in when the adapter was trained."),
    ] = None,
    sets: Sets = None,
    artifacts: Artifacts = ARTIFACTS,
    scratch: Scratch = SCRATCH,
) -> None:
    """Merge a peft adapter made by any tool, certify it on given rows, export and push it."""
    from finetune.cli import merge as cli_merge

    asked = cli_merge.Request(
        adapter, base, tuple(data or ()), out, cli_merge.formats(gguf), push, four_bit, tuple(sets or ())
    )
    cli_merge.merge_adapter(asked, artifacts, scratch)


@app.command()
def runs(
    recipe: Annotated[str | None, typer.Argument(help="Only this recipe's.", autocompletion=complete_recipe)] = None,
    as_json: AsJson = False,
    artifacts: Artifacts = ARTIFACTS,
    scratch: Scratch = SCRATCH,
) -> None:
    """List the recorded runs: recipe, time, status, perplexity, bytes."""
    from finetune.cli import runs as cli_runs
    from finetune.pipeline.store import Store

    lines = cli_runs.list_runs(Store(artifacts, scratch), recipe)
    if as_json:
        print_text(json.dumps(lines, indent=1))
    elif lines:
        cli_runs.print_list(lines)
    else:
        print_text(f"no run under {artifacts}")


@app.command()
def rm(
    names: Annotated[list[str], typer.Argument(metavar="RECIPE@RUN…", help="Runs, as `finetune runs` lists them.")],
    artifacts: Artifacts = ARTIFACTS,
    scratch: Scratch = SCRATCH,
) -> None:
    """Remove a run's record; its stages stay until `finetune clean` finds that no run uses them."""
    from finetune.cli.runs import remove_runs
    from finetune.pipeline.store import Store

    print_text("\n".join(remove_runs(names, Store(artifacts, scratch))))
    typer.echo("`finetune clean` removes the stages that no run uses", err=True)


@app.command()
def clean(
    keep: Annotated[
        int, typer.Option(min=1, help="Newest runs and sweeps of each recipe that stay; so do runs that commands use.")
    ] = 1,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    artifacts: Artifacts = ARTIFACTS,
    scratch: Scratch = SCRATCH,
) -> None:
    """Drop what none of the newest runs of any recipe uses, after listing it."""
    from finetune.cli.runs import clean_store
    from finetune.pipeline.store import Store

    clean_store(Store(artifacts, scratch), keep, yes=yes)


@app.command()
def chat(
    name: Annotated[
        str,
        typer.Argument(metavar="RUN|FOLDER", help="An adapter or a merged model.", autocompletion=complete_recipe),
    ],
    prompt: Annotated[str | None, typer.Option(help="Answer this and leave.")] = None,
    compare: Annotated[str | None, typer.Option(metavar="base", help="Answer without the adapter, too.")] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.7,
    seed: Seed = 0,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message.")] = None,
    server: ServerUrl = None,
    artifacts: Artifacts = ARTIFACTS,
    scratch: Scratch = SCRATCH,
) -> None:
    """Chat with a trained model: the adapter of a run on its 4-bit base, or a merged model."""
    from finetune.cli import chat as chatting

    options = chatting.Options(max_new_tokens, temperature, seed, system, compare, server)
    chatting.chat(name, prompt, options, artifacts, scratch)


@app.command()
def generate(
    name: Annotated[
        str,
        typer.Argument(
            metavar="RUN|FOLDER|BASE",
            help="RECIPE[@RUN], the folder of a model, or a base (OWNER/NAME).",
            autocompletion=complete_recipe,
        ),
    ],
    source: Annotated[
        Path, typer.Option("--input", metavar="FILE", help="Prompts: .txt, or rows as a recipe reads them.")
    ],
    target: Annotated[Path, typer.Option("--output", metavar="FILE", help="JSON lines; a stopped run goes on in it.")],
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0001, max=1, help="Share of the probability to sample from.")] = 1.0,
    seed: Seed = 0,
    n: Annotated[int, typer.Option("--n", min=1, max=1000, help="Answers for each prompt.")] = 1,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message for rows without one.")] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens at once; changes no answer.")] = 16384,
    server: ServerUrl = None,
    artifacts: Artifacts = ARTIFACTS,
    scratch: Scratch = SCRATCH,
) -> None:
    """Answer every row of a file; continues after a stop without losing or repeating a row."""
    from finetune.cli import generate as cli_generate

    options = cli_generate.Options(max_new_tokens, temperature, top_p, seed, n, system, batch_tokens, server)
    cli_generate.generate(name, source, target, options, artifacts, scratch)


@app.command()
def init(
    name: Annotated[str | None, typer.Option(help="The recipe's name.")] = None,
    model: Annotated[str | None, typer.Option(help="OWNER/NAME on the Hub, a folder, or builtin:tiny-mistral.")] = None,
    data: Annotated[
        str | None, typer.Option(metavar="FILE|ID", help="A file, a folder, a pattern, or OWNER/NAME on the Hub.")
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option(metavar="FILE|ID", help="Held-out rows of your own, named like --data.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="The GPU to fit: t4, l4, a100-40, h100 …; or cpu")] = None,
    out: Annotated[Path | None, typer.Option(metavar="PATH", help="Default: recipes/NAME.yaml.")] = None,
    question: Annotated[str | None, typer.Option(metavar="COLUMN", help="The file's column with the question.")] = None,
    answer: Annotated[str | None, typer.Option(metavar="COLUMN", help="The file's column with the answer.")] = None,
    system: Annotated[str | None, typer.Option(metavar="COLUMN", help="A column with a system text.")] = None,
    keep: Annotated[list[str] | None, typer.Option(metavar="'COLUMN>=N'", help="Keep only such rows.")] = None,
    ignore: Annotated[list[str] | None, typer.Option(metavar="COLUMN", help="A column not to read.")] = None,
    max_length_tokens: Annotated[int | None, typer.Option(help="The longest row; default: by the rows.")] = None,
    from_: Annotated[
        Path | None, typer.Option("--from", metavar="AXOLOTL.yaml", help="Translate an axolotl configuration.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a recipe that is there.")] = False,
) -> None:
    """Write a recipe for your data, sized to its rows; asks on a terminal for what is not given."""
    from finetune.cli.init import ask_terminal, from_axolotl, write_recipe
    from finetune.init.columns import Chosen
    from finetune.pipeline.store import Store

    ask = ask_terminal if sys.stdin.isatty() else None
    more: dict[str, Any] = {"eval_data": eval_data, "force": force, "ask": ask, "store": Store(ARTIFACTS, SCRATCH)}
    more["chosen"] = Chosen(question, answer, system, tuple(keep or ()), tuple(ignore or ()))
    more["length"] = max_length_tokens
    axolotl = from_ and from_axolotl(from_, name, out, force=force)
    print_text(axolotl or write_recipe(name, model, data, device, out, **more))


app.command()(serve)


@app.command()
def doctor(artifacts: Artifacts = ARTIFACTS, scratch: Scratch = SCRATCH) -> None:
    """Check this machine for missing requirements, and show how to fix them."""
    from finetune.cli.doctor import examine

    examine(artifacts, scratch)


def main() -> None:
    """Run the command line; print errors as sentences, with an exit status for each kind."""
    os.environ["PYTHONSAFEPATH"] = "1"  # for child processes: the working folder is data, not code
    os.environ["RUST_BACKTRACE"] = "0"  # written where no memory is left, one waits for itself for ever
    steady()
    silence_libraries()
    try:
        app()
    except (FinetuneError, OSError, MemoryError) as error:
        reported = error if isinstance(error, FinetuneError) else of_the_machine(error, "finetune")
        if reported is None:
            raise
        from finetune.pipeline.launch import message
        from finetune.utils.console import print_error

        if text := message(reported, os.environ):
            print_error(text)
        sys.exit(reported.exit_status)
