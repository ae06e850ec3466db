"""Push the adapter, the merged model, its GGUF files or the curated rows to the Hub, and verify the push.

Not a stage of the store: nothing is cached, and the receipt is in the run's folder. One repository holds one kind: the
first of `publish.what` goes to the named repository, each other one to the same name with its kind appended.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.context import Context
from finetune.errors import GateRefused, InputError
from finetune.eval.verdict import REPEATS, verdict_of
from finetune.hub.client import Kind, require_token
from finetune.publish import private_rows
from finetune.publish.card import write_card
from finetune.publish.contents import CARD, collect
from finetune.publish.facts import Facts
from finetune.recipe import HubSource, Recipe
from finetune.utils.files import read_json, write_json
from finetune.utils.limits import require_space

RECEIPT = "publish.json"


@dataclass(frozen=True)
class Prepared:
    """One checked push: path in the repository → local file, and the text of the card."""

    kind: Kind
    repo: str
    contents: Mapping[str, Path]
    card: str


def repositories(recipe: Recipe, repo: str | None) -> dict[Kind, str]:
    """Return kind → repository, in the order of `publish.what`; `repo` overrides `publish.repo`.

    Raises:
        InputError: no repository is named, or the name is not one.
    """
    first = repo or recipe.publish.repo
    if first is None:
        raise InputError(f"recipe {recipe.name}: publish.repo is not set; set it, or pass --repo OWNER/NAME")
    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", first):
        raise InputError(f"publish.repo: found {first!r}; allowed is OWNER/NAME")
    kinds = list(dict.fromkeys(recipe.publish.what))
    return {kind: first if position == 0 else f"{first}-{kind}" for position, kind in enumerate(kinds)}


def publish(
    facts: Facts,
    run_folder: Path,
    folders: Mapping[str, Path],
    repo: str | None,
    dry_run: bool,
    ctx: Context,
    *,
    force: bool = False,
) -> dict[str, Any]:
    """Stage each kind in a separate folder under `ctx.scratch`, push it, compare, load it, and write the receipt.

    Args:
        facts: the recipe with its `publish` section, and the records of its run; the rest is read from `folders`.
        run_folder: where the receipt is written.
        folders: stage → finished folder; contents.NEEDED lists those that a kind needs.
        repo: instead of `publish.repo`.
        dry_run: only list what would be pushed, with the cards; no network, no receipt.
        ctx: scratch folder and progress output.
        force: push although the adapter does not differ from its base, or is worse.

    Returns:
        {"recipe", "dry_run", "licences": {label: name}, "pushes": [push_folder's receipt with "loaded", or {"kind",
        "repo", "files", "bytes", "card"}]}.

    Raises:
        InputError: nothing finished to push; a local path or a credential in it; the Hub's 401, 403 and 404.
        GateRefused: a licence forbids it; the adapter is no better than its base; the pushed model differs from the
            trained one.
        FinetuneError: other errors of the Hub; the disk is too small for a copy.
    """
    recipe, targets = facts.recipe, repositories(facts.recipe, repo)
    if not dry_run:
        require_token(next(iter(targets.values())))
    ctx.scratch.mkdir(parents=True, exist_ok=True)
    with _folder(ctx, "publish-made") as made:
        facts = _with_files(facts, folders, targets)
        _check_worth(facts, list(targets), ctx, force=force, dry_run=dry_run)
        if line := private_rows.private_text(recipe, folders, "this push"):
            ctx.say(line)
        collected = {kind: collect(kind, folders, made) for kind in targets}  # checked before any network access
        facts = replace(facts, licences=_licences(facts, list(targets), ctx, ask=not dry_run))
        prepared = []
        for kind, (contents, rows) in collected.items():
            card = write_card(kind, targets[kind], replace(facts, rows=rows))
            for name, content in card.files.items():
                contents[name] = made / kind / name
                contents[name].parent.mkdir(parents=True, exist_ok=True)
                contents[name].write_bytes(content)
            prepared.append(Prepared(kind, targets[kind], contents, card.text))
        receipt: dict[str, Any] = {"recipe": recipe.name, "dry_run": dry_run, "licences": dict(facts.licences)}
        receipt["pushes"] = [_push_summary(push, ctx) for push in prepared] if dry_run else []
        for push in [] if dry_run else prepared:
            _push(push, recipe, folders, receipt, run_folder / RECEIPT, ctx)
    return receipt


def _push(
    push: Prepared, recipe: Recipe, folders: Mapping[str, Path], receipt: dict[str, Any], path: Path, ctx: Context
) -> None:
    from finetune.hub.client import push_folder
    from finetune.publish.verify import check_loaded

    template = folders["render"] / "template" if "render" in folders else None
    with _folder(ctx, "publish") as folder:
        for name, source in push.contents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(source.resolve(), folder / name)
        (folder / CARD).write_text(push.card, encoding="utf-8")
        total = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        ctx.say(f"pushing {push.kind} to {push.repo}: {len(push.contents) + 1} files, {total / 1e6:,.1f} MB")
        private, message = recipe.publish.private, f"{recipe.name}: {push.kind}"
        done = push_folder(folder, push.repo, push.kind, private, message, ctx.say)
        receipt["pushes"].append(done)
        write_json(path, receipt)  # after each push, so that the first is recorded if the second fails
        done["loaded"] = check_loaded(push.repo, done["commit"], push.kind, folder, template, ctx.say)
        write_json(path, receipt)
    also = f"; loaded from there and equal to the trained: {', '.join(done['loaded'])}" if done["loaded"] else ""
    ctx.say(f"{'pushed' if done['new_commit'] else 'already there'}, every hash equal: {done['url']}{also}")


def _with_files(facts: Facts, folders: Mapping[str, Path], targets: Mapping[Kind, str]) -> Facts:
    """Return the input of the cards: the records of a run, with what its stages' files hold."""
    if "base" not in folders:
        raise InputError("cannot publish: stage base is not finished; run the recipe first")
    return replace(
        facts,
        base=read_json(folders["base"] / "base.json"),
        certificate=_optional_json(folders.get("certify"), "certificate.json"),
        template=_optional_json(folders.get("render"), "template/template.json"),
        steps=_lines(folders.get("train"), "metrics.jsonl"),
        samples=_lines(folders.get("evaluate"), "samples.jsonl")[: private_rows.samples_shown(facts.recipe)],
        siblings=targets,
        verdict=verdict_of(facts.metrics, folders),
    )


def _check_worth(facts: Facts, kinds: list[Kind], ctx: Context, *, force: bool, dry_run: bool) -> None:
    """Refuse a model that is no better than its base by the interval that was measured, or memorised its rows."""
    refusal = facts.verdict.refusal if facts.verdict else ""
    if not refusal or kinds == ["dataset"]:
        return
    if force or dry_run:
        ctx.say(f"publish: {refusal}{'; pushed because of --force' if force and not dry_run else ''}")
        return
    repeats = refusal.startswith(REPEATS)
    advice = "take fewer train.epochs or more rows" if repeats else "train longer or on more rows"
    raise GateRefused(f"publish: {refusal}; {advice}; --force pushes it all the same")


def _licences(facts: Facts, kinds: list[Kind], ctx: Context, *, ask: bool) -> dict[str, str]:
    """Return label → licence and print notes. Raises GateRefused if a licence forbids the push."""
    from finetune.publish.licenses import judge, read_licences

    asked: dict[str, tuple[Any, str, str | None]] = {}
    if facts.base["kind"] == "hub":
        asked[f"model {facts.base['id']}"] = ("model", facts.base["id"], facts.base["revision"])
    for number, source in enumerate(facts.recipe.data):
        if isinstance(source, HubSource):
            pinned = facts.sources[number].get("commit") if number < len(facts.sources) else None
            asked.setdefault(f"dataset {source.id}", ("dataset", source.id, pinned or source.revision))
    written = facts.recipe.generate
    if written is not None and written.model.local is not None and written.model.local.kind == "hub":
        local = written.model.local
        asked.setdefault(f"model {local.id}", ("model", local.id, local.revision))
    for source in facts.recipe.preference.data if facts.recipe.preference else []:
        if isinstance(source, HubSource):
            asked.setdefault(f"dataset {source.id}", ("dataset", source.id, source.revision))
    if not ask:
        return {}
    licences = read_licences(asked, ctx.say)
    notes, refusal = judge(asked, licences, facts.recipe.publish.license, kinds)
    for note in notes:
        ctx.say(note)
    if refusal:
        raise GateRefused(refusal)
    return licences


@contextmanager
def _folder(ctx: Context, kind: str) -> Iterator[Path]:
    """Yield a new folder under scratch, named after this process: `clean` removes it if the process was killed."""
    prefix = f"{kind}-{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=ctx.scratch, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _link_or_copy(source: Path, place: Path) -> None:
    try:
        os.link(source, place)
    except OSError:  # another file system, or one without links, such as a mounted Drive
        size = source.stat().st_size
        require_space(place.parent, size, f"a copy of {source.name}", "set --scratch to a larger disk")
        shutil.copyfile(source, place)


def _push_summary(push: Prepared, ctx: Context) -> dict[str, Any]:
    sizes = {name: path.stat().st_size for name, path in push.contents.items()} | {CARD: len(push.card.encode())}
    total = sum(sizes.values())
    ctx.say(f"would push {push.kind} to {push.repo}: {len(sizes)} files, {total / 1e6:,.1f} MB; nothing was sent")
    files = [{"path": name, "bytes": size} for name, size in sorted(sizes.items())]
    return {"kind": push.kind, "repo": push.repo, "files": files, "bytes": total, "card": push.card}


def _optional_json(folder: Path | None, name: str) -> dict[str, Any] | None:
    return read_json(folder / name) if folder is not None and (folder / name).exists() else None


def _lines(folder: Path | None, name: str) -> list[dict[str, Any]]:
    """Return the JSON objects of a finished stage's file, one per line."""
    if folder is None or not (folder / name).exists():
        return []
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines() if line.strip()]
