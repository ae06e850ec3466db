"""`finetune publish`: push the results of a finished run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.cli.session import make_context, signals_handled
from finetune.errors import FinetuneError, InputError
from finetune.pipeline import run_view
from finetune.pipeline.runs import recipe_text, recorded_recipe
from finetune.pipeline.store import Store
from finetune.publish.contents import NEEDED
from finetune.utils.console import Screen
from finetune.utils.streams import print_text


def publish_run(
    name: str,
    *,
    repo: str | None,
    dry_run: bool,
    sets: Sequence[str],
    artifacts: Path,
    scratch: Path,
    force: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Push the results of a finished run; print the URLs, or in a dry run files and card. Return the receipt."""
    from finetune.publish import publish
    from finetune.publish.contents import stages_read
    from finetune.publish.facts import Facts, with_sets

    recipe_name = name.partition("@")[0]
    store, screen = Store(artifacts, scratch), Screen(silent=quiet)

    def needs(value: dict[str, Any]) -> set[str]:
        wanted = {stage for kind in recorded_recipe(value, sets).publish.what for stage in NEEDED[kind]}
        return {run_view.adapter_stage(value["stages"]) if stage == "train" else stage for stage in wanted}

    value = run_view.finished(store, name, needs, screen.say)
    short = value["recipe"]
    recipe = recorded_recipe(value, sets)
    screen.say(f"from the run {short}@{value['run']}")
    if run_view.adapter_stage(value["stages"]) == "align":  # otherwise the adapter before it would be pushed
        run_view.done_folders(value, ["align"], name)
    # A stage that was done and whose files are gone is refused below, by name.
    done = {n: s for n, s in value["stages"].items() if s["status"] == "done" or (s["path"] and s["metrics"])}
    folders = {n: Path(s["path"]) for n, s in done.items()}
    needed = stages_read(list(recipe.publish.what), folders)
    manifests = {n: store.find(folders[n]) for n in needed | ({"ingest"} & set(folders))}
    unfinished = [n for n in folders if n in needed and manifests[n] is None]
    if unfinished:
        raise InputError(
            f"{', '.join(unfinished)} of {short} is missing or incomplete: run `finetune run {recipe_name}` first"
        )
    for name in [] if dry_run else sorted(needed):  # otherwise a flipped bit would be pushed and compared with itself
        manifest = manifests[name]
        if manifest and (wrong := store.verify(folders[name], manifest)):
            raise FinetuneError(
                f"cannot publish: {'; '.join(wrong[:3])}; remove {folders[name]} and run the recipe again"
            )
    trained, read = manifests.get("train"), manifests.get("ingest")
    pinned = read.fingerprint if read else {}
    facts = Facts(
        recipe,
        with_sets(recipe_text(value["folder"]), value["sets"]),
        metrics={n: s["metrics"] for n, s in value["stages"].items()},
        seconds={n: s["seconds"] for n, s in value["stages"].items() if s.get("seconds")},
        versions=trained.environment.get("versions", {}) if trained else {},
        sources=[*pinned.get("sources", []), *pinned.get("eval_sources", [])],
    )
    with signals_handled(screen) as stop:
        ctx = make_context(recipe, store, screen, stop, value["run"], 0, 1)
        receipt = publish.publish(facts, value["folder"], folders, repo, dry_run, ctx, force=force)
    if not quiet:
        _print_receipt(receipt)
    return receipt


def _print_receipt(receipt: dict[str, Any]) -> None:
    for push in receipt["pushes"]:
        if receipt["dry_run"]:
            print_text(f"{push['kind']} → {push['repo']}: {len(push['files'])} files, {push['bytes']:,} bytes")
            for file in push["files"]:
                print_text(f"  {file['bytes']:>15,}  {file['path']}")
            print_text(f"\n{push['card']}")
        else:
            print_text(f"{push['repo']} at {push['commit']}: {len(push['files'])} files verified")
