"""`finetune publish`: push what a finished run made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.cli.session import make_context, signals_handled
from finetune.errors import FinetuneError, InputError
from finetune.pipeline.runs import read_run
from finetune.pipeline.stage_list import stage_folder
from finetune.pipeline.store import Store
from finetune.recipe.load import load_recipe, parse_recipe
from finetune.utils.console import Screen


def publish_run(
    name: str,
    *,
    repo: str | None,
    dry_run: bool,
    sets: Sequence[str],
    artifacts: Path,
    scratch: Path,
    force: bool = False,
) -> None:
    """Push what a finished run made; prints where it went, or, dry, the files and the card."""
    from finetune.publish import publish
    from finetune.publish.card import write_card
    from finetune.publish.contents import stages_read

    recipe_name, _, run_name = name.partition("@")
    store = Store(artifacts, scratch)
    short = _recipe_name(recipe_name)
    value = read_run(store.artifacts, short, run_name or None)
    text = (value["folder"] / "recipe.yaml").read_text(encoding="utf-8")
    recipe = parse_recipe(text, value["folder"] / "recipe.yaml", [*value["sets"], *sets])
    found = {n: stage_folder(store, n, s) for n, s in value["stages"].items() if s["status"] == "done"}
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
    with signals_handled(screen) as stop:
        ctx = make_context(recipe, store, screen, stop, value["run"], 0, 1)
        receipt = publish.publish(recipe, run, folders, repo, dry_run, ctx, write_card, force=force)
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
