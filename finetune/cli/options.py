"""Arguments and options that several commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune import __version__
from finetune.utils.format import visible
from finetune.utils.resources import complete_recipe

if TYPE_CHECKING:
    from finetune.pipeline.store import Store

RecipeName = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="A path, or the name of a recipe.", autocompletion=complete_recipe),
]
RunName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE[@RUN]", help="A recipe's newest run, or the run named.", autocompletion=complete_recipe
    ),
]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Change a field of the recipe.")]
Artifacts = Annotated[Path, typer.Option(help="Durable and small: rows, adapter, checkpoints. May be a mounted Drive.")]
Scratch = Annotated[Path, typer.Option(help="Local and large: Hub cache, merged models. Can be made again.")]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
ServerUrl = Annotated[
    str | None,
    typer.Option("--server", metavar="URL", help="Ask an OpenAI-compatible server; the argument is its model's name."),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="The longest answer.")]
Temperature = Annotated[float, typer.Option(min=0, max=10, help="0 always takes the most likely token.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1)]
Mirror = Annotated[
    str | None,
    typer.Option(metavar="OWNER/NAME", help="Keep what is finished in this private Hub repository, and go on from it."),
]
EngineName = Annotated[
    str, typer.Option("--engine", metavar="local|ray", help="Run the data stages here, or on a Ray cluster.")
]
RayAddress = Annotated[
    str | None,
    typer.Option("--ray-address", metavar="HOST:PORT", help="A running cluster; else one is started here and stopped."),
]
ARTIFACTS = Path(os.environ.get("FINETUNE_ARTIFACTS", "artifacts"))
SCRATCH = Path(os.environ.get("FINETUNE_SCRATCH", "scratch"))

MIRROR = os.environ.get("FINETUNE_MIRROR") or None


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"finetune {__version__}")
        raise typer.Exit


def before_commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Take the options that come before a command."""


def root_options(store: Store) -> list[str]:
    """Return the options for a command on this store; none for roots that are the default ones."""
    named = (("--artifacts", store.artifacts, ARTIFACTS), ("--scratch", store.scratch, SCRATCH))
    return [word for option, root, default in named if root != default.absolute() for word in (option, str(root))]


def note(line: str) -> None:
    """Print a line on stderr, every control character visible."""
    typer.echo(visible(line), err=True)
