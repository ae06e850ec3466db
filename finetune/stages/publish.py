"""Push the adapter, the merged model or both to the Hub, and prove what was pushed.

An outward act, not a stage of the store: nothing is cached, and the receipt lies in the run's folder. One repository
holds one kind: the first of `publish.what` goes to the repository that was named, the other to the same name with
`-merged` or `-adapter` behind it.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from finetune.context import Context, Metrics
from finetune.errors import FinetuneError, InputError
from finetune.recipe import Recipe
from finetune.records import read_json, write_json

Kind = Literal["adapter", "merged"]

RECEIPT = "publish.json"
CARD = "README.md"
SCANNED_BYTES = 4_000_000  # a larger text file is a vocabulary
_LOCAL_PATH = re.compile(r"(/|~|\.{1,2}[/\\]|[A-Za-z]:[/\\]|file:).*", re.DOTALL)


class CardWriter(Protocol):
    """What writes README.md: report.model_card.model_card, handed in because a stage does not import the report."""

    def __call__(
        self,
        *,
        kind: Kind,
        repo: str,
        recipe: Recipe,
        recipe_text: str,
        metrics: Mapping[str, Metrics],
        base: Mapping[str, Any],
        certificate: Mapping[str, Any] | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> str:
        """The card's text."""


@dataclass(frozen=True)
class Prepared:
    """One push, looked at and ready: path in the repository → local file, and the text of the card."""

    kind: Kind
    repo: str
    contents: Mapping[str, Path]
    card: str


def repositories(recipe: Recipe, repo: str | None) -> dict[Kind, str]:
    """Kind → repository, in the order of `publish.what`; `repo` takes the place of `publish.repo`.

    Raises:
        InputError: no repository is named, or the name is not one.
    """
    first = repo or recipe.publish.repo
    if first is None:
        raise InputError(f"recipe {recipe.name}: publish.repo is not set; write it, or give --repo OWNER/NAME")
    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", first):
        raise InputError(f"publish.repo: found {first!r}; allowed is OWNER/NAME")
    kinds = list(dict.fromkeys(recipe.publish.what))
    return {kind: first if position == 0 else f"{first}-{kind}" for position, kind in enumerate(kinds)}


def publish(
    recipe: Recipe,
    run_folder: Path,
    folders: Mapping[str, Path],
    metrics: Mapping[str, Metrics],
    repo: str | None,
    dry_run: bool,
    ctx: Context,
    *,
    card: CardWriter,
    recipe_text: str,
) -> dict[str, Any]:
    """Stage each kind in a folder of its own under `ctx.scratch`, push it, compare, and write the receipt.

    Args:
        recipe: what was run; its `publish` section says what, where and how private.
        run_folder: where the receipt goes; its `run.json` names the `--set` of the run.
        folders: stage → finished folder; the adapter needs `base` and `train`, the model `base` and `merge`.
        metrics: stage → what it measured.
        repo: instead of `publish.repo`.
        dry_run: only list what would be pushed, with the cards; no network, no receipt.
        ctx: where to stage, and whom to tell.
        card: writes README.md.
        recipe_text: the recipe as it was read.

    Returns:
        {"recipe", "dry_run", "pushes": [push_folder's receipt, or {"kind", "repo", "files", "bytes", "card"}]}.

    Raises:
        InputError: nothing finished to push; a local path or a credential in it; the Hub's 401, 403 and 404.
        FinetuneError: the Hub's other answers; the disk is too small for a copy.
    """
    from finetune.backends.hub import push_folder

    prepared = [
        _prepared(kind, target, recipe, _with_sets(recipe_text, run_folder), folders, metrics, card)
        for kind, target in repositories(recipe, repo).items()  # all is looked at before anything is pushed
    ]
    shown = [_shown(push, ctx) for push in prepared] if dry_run else []
    receipt: dict[str, Any] = {"recipe": recipe.name, "dry_run": dry_run, "pushes": shown}
    for push in [] if dry_run else prepared:
        with _staged(push, ctx) as folder:
            ctx.say(f"pushing {push.kind} to {push.repo}: {len(push.contents) + 1} files, {_megabytes(folder)}")
            private, message = recipe.publish.private, f"{recipe.name}: {push.kind}"
            done = push_folder(folder, push.repo, push.kind, private, message, ctx.say)
        receipt["pushes"].append(done)
        write_json(run_folder / RECEIPT, receipt)  # after each push: a failure of the second leaves the first on record
        ctx.say(f"{'pushed' if done['new_commit'] else 'already there'}, every hash equal: {done['url']}")
    return receipt


def _prepared(
    kind: Kind,
    repo: str,
    recipe: Recipe,
    recipe_text: str,
    folders: Mapping[str, Path],
    metrics: Mapping[str, Metrics],
    card: CardWriter,
) -> Prepared:
    _require(kind, folders)
    contents = _files(folders["merge"] if kind == "merged" else folders["train"] / "adapter")
    _refuse_leaks(kind, contents, folders)
    text = card(
        kind=kind,
        repo=repo,
        recipe=recipe,
        recipe_text=recipe_text,
        metrics=metrics,
        base=read_json(folders["base"] / "base.json"),
        certificate=_optional_json(folders.get("certify"), "certificate.json"),
        template=_optional_json(folders.get("render"), "template/template.json"),
    )
    return Prepared(kind, repo, contents, text)


def _with_sets(text: str, run_folder: Path) -> str:
    """The recipe with the `--set` that changed it, or the card would show another run."""
    sets = (_optional_json(run_folder, "run.json") or {}).get("sets") or []
    return "\n".join([text.rstrip("\n"), *(f"# --set {s}" for s in sets)]) + "\n"


def _require(kind: Kind, folders: Mapping[str, Path]) -> None:
    needed = ("base", "train" if kind == "adapter" else "merge")
    if missing := [stage for stage in needed if stage not in folders]:
        raise InputError(f"cannot publish the {kind}: stage {missing[0]} is not finished; run the recipe first")
    weights = folders["train"] / "adapter" if kind == "adapter" else folders["merge"]
    if not any(weights.glob("*.safetensors")):
        raise InputError(f"cannot publish the {kind}: no *.safetensors in {weights}; run the recipe again")


def _files(folder: Path) -> dict[str, Path]:
    """The files of a stage's folder, without the store's own and without a card."""
    skipped = {CARD, "manifest.json", "building.json"}
    found = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: path for name, path in found.items() if name not in skipped and not name.startswith("lease.")}


def _refuse_leaks(kind: Kind, contents: Mapping[str, Path], folders: Mapping[str, Path]) -> None:
    from finetune.backends.secrets import find_secrets

    for name, path in contents.items():
        if path.is_symlink() and not path.resolve().is_relative_to(path.parent.resolve()):
            raise InputError(f"cannot publish {path}: it is a link to a file outside its folder")
        if not name.endswith((".json", ".jinja", ".txt", ".md", ".jsonl")) or path.stat().st_size > SCANNED_BYTES:
            continue
        if found := find_secrets(path.read_text(encoding="utf-8", errors="replace")):
            raise InputError(f"cannot publish {path}: it holds {found[0]}")
        if name in ("adapter_config.json", "config.json", "generation_config.json", "tokenizer_config.json"):
            for field, value in _local_paths(read_json(path), everywhere=name != "tokenizer_config.json"):
                raise InputError(
                    f"cannot publish {path}: {field} is {value!r}, a path of this machine; make the stage again so "
                    "that it names the Hub id"
                )
    if kind == "adapter":
        _check_base(contents.get("adapter_config.json"), read_json(folders["base"] / "base.json"))


def _local_paths(value: object, everywhere: bool, field: str = "") -> Iterator[tuple[str, str]]:
    """(field, value) of every string that is a local path; a tokenizer's other strings are tokens."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _local_paths(inner, everywhere or "path" in key, f"{field}.{key}" if field else key)
    elif isinstance(value, list):
        for inner in value:
            yield from _local_paths(inner, everywhere, field)
    elif everywhere and isinstance(value, str) and _LOCAL_PATH.fullmatch(value):
        yield field, value


def _check_base(config: Path | None, base: Mapping[str, Any]) -> None:
    """An adapter is worth nothing without the very base it was trained over."""
    if config is None:
        raise InputError("cannot publish the adapter: adapter_config.json is missing; run the recipe again")
    if base["kind"] == "folder":
        raise InputError(
            f"cannot publish the adapter: its base {base['id']} is a folder of this machine, which nobody else has; "
            "publish the merged model instead (`what: [merged]`)"
        )
    written = read_json(config)
    for field, key in (("base_model_name_or_path", "id"), ("revision", "revision")):
        if written.get(field) != base[key]:
            raise InputError(
                f"cannot publish {config}: {field} is {written.get(field)!r}, but the adapter was trained over "
                f"{base[key]!r}; train again"
            )


@contextmanager
def _staged(push: Prepared, ctx: Context) -> Iterator[Path]:
    """A folder under scratch that holds what is pushed: hard links, or copies where there are no links."""
    ctx.scratch.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="publish-", dir=ctx.scratch))
    try:
        for name, source in push.contents.items():
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(source.resolve(), place)
        (folder / CARD).write_text(push.card, encoding="utf-8")
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _link_or_copy(source: Path, place: Path) -> None:
    try:
        os.link(source, place)
    except OSError:  # another file system, or one without links such as a mounted Drive
        free, size = shutil.disk_usage(place.parent).free, source.stat().st_size
        if free < size:
            raise FinetuneError(
                f"{place.parent} has {free / 1e9:.1f} GB free, {size / 1e9:.1f} GB are needed to copy {source.name}; "
                "give --scratch a larger disk"
            ) from None
        shutil.copyfile(source, place)


def _shown(push: Prepared, ctx: Context) -> dict[str, Any]:
    sizes = {name: path.stat().st_size for name, path in push.contents.items()} | {CARD: len(push.card.encode())}
    total = sum(sizes.values())
    ctx.say(f"would push {push.kind} to {push.repo}: {len(sizes)} files, {total / 1e6:,.1f} MB; nothing was sent")
    files = [{"path": name, "bytes": size} for name, size in sorted(sizes.items())]
    return {"kind": push.kind, "repo": push.repo, "files": files, "bytes": total, "card": push.card}


def _megabytes(folder: Path) -> str:
    return f"{sum(p.stat().st_size for p in folder.rglob('*') if p.is_file()) / 1e6:,.1f} MB"


def _optional_json(folder: Path | None, name: str) -> Any:  # noqa: ANN401 - JSON
    return read_json(folder / name) if folder is not None and (folder / name).exists() else None
