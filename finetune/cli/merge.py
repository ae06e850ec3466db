"""`finetune merge`: a peft adapter made by any tool, merged, certified on given data, exported and pushed.

It writes a recipe with `train: null` and runs it, so that `show`, `report`, `chat` and `publish` work on the result.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from finetune.cli.publish import publish_run
from finetune.cli.run import run_recipe
from finetune.context import Context
from finetune.errors import FinetuneError, InputError
from finetune.lora.imported import template_of
from finetune.lora.resume import folder_of
from finetune.lora.start import NAMED, read_adapter
from finetune.pipeline import run_view
from finetune.pipeline.store import Store
from finetune.recipe import Lora, Recipe, Runtime, Tracking
from finetune.recipe.load import parse_recipe
from finetune.utils.console import Screen

LINKED = (".safetensors", ".gguf")  # as large as the model: linked into --out if the disk allows it


@dataclass(frozen=True)
class Request:
    """Arguments of the command line."""

    adapter: str
    base: str | None = None
    data: tuple[Path, ...] = ()
    out: Path | None = None
    gguf: tuple[str, ...] = ()
    push: str | None = None
    four_bit: bool | None = None
    sets: tuple[str, ...] = field(default=())


def merge_adapter(asked: Request, artifacts: Path, scratch: Path) -> None:
    """Merge as `asked`; the merged model is in the store, and in `asked.out` if that is given.

    Raises InputError for a folder that is not an adapter, an unknown base, or a folder `out` that is not empty;
    errors of the stages are not caught.
    """
    if asked.out is not None and asked.out.exists() and (not asked.out.is_dir() or any(asked.out.iterdir())):
        raise InputError(f"--out {asked.out}: it exists and is not an empty folder; name another or empty it")
    for path in asked.data:
        if not path.exists():
            raise InputError(f"--data {path}: no such file")
    store, screen = Store(artifacts, scratch), Screen()
    recipe = write_recipe(asked, store, screen)
    if not asked.data:
        screen.say("no --data: merged without a certificate; give rows that were not trained on to have one")
    record = run_recipe(
        str(recipe), until=None, sets=asked.sets, artifacts=artifacts, scratch=scratch, fresh=False, force=False
    )
    name = f"{record.recipe}@{record.name}"
    if asked.out is not None:
        write_out(store, name, asked.out, screen)
    if asked.push is not None:
        publish_run(name, repo=None, dry_run=False, sets=[], artifacts=artifacts, scratch=scratch)


def write_recipe(asked: Request, store: Store, screen: Screen) -> Path:
    """Write the recipe of the merge under scratch/recipes; return its path."""
    start, own = _start_of(asked.adapter, store, screen)
    adapter = read_adapter(start.start_folder or Path())
    if not adapter.base and not asked.base:
        raise InputError(f"{asked.adapter}: its adapter_config.json names no base; pass --base OWNER/NAME|FOLDER")
    model = _model_of(asked.base or str(adapter.base), None if asked.base else adapter.config.get("revision"), own)
    short = asked.adapter.rstrip("/").rpartition("/")[2].partition("@")[0]
    name = f"merge-{re.sub(r'[^A-Za-z0-9_.-]+', '-', short).strip('-.') or 'adapter'}"[:80]
    content: dict[str, Any] = {"schema": 1, "name": name, "model": model, "lora": {"start_from": str(start.start_from)}}
    if asked.base and adapter.base and re.fullmatch(NAMED, adapter.base):
        content["lora"]["start_base"] = adapter.base
        if adapter.base != asked.base:
            screen.say(f"the adapter names the base {adapter.base}; merging into {asked.base}, as --base asks")
    content |= {
        "train": None,
        "preference": None,
        "evaluate": None,
        "filter": None,
        "dedup": None,
        "quantization": None,
    }
    quantized = asked.four_bit if asked.four_bit is not None else own is not None and own.quantization is not None
    if quantized:
        content["quantization"] = own.quantization.model_dump() if own and own.quantization else {}
    if asked.data:
        content["eval_data"] = [{"source": "local", "path": str(path.absolute())} for path in asked.data]
        content["render"] = {"max_truncated_fraction": 1.0, "max_dropped_fraction": 0.5}
        template = template_of(start.start_folder or Path())
        if template is not None:
            path = store.scratch / "recipes" / f"{name}.jinja"
            _write(path, template)
            content["render"]["template"] = str(path)
    if asked.gguf:
        content["export"] = {"gguf": list(asked.gguf)}
    if asked.push:
        content["publish"] = {"repo": asked.push, "what": ["merged", *(["gguf"] if asked.gguf else [])]}
    path = store.scratch / "recipes" / f"{name}.yaml"
    _write(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return path


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FinetuneError(f"{path}: cannot be written: {error.strerror}; choose another --scratch") from None


def _start_of(adapter: str, store: Store, screen: Screen) -> tuple[Lora, Recipe | None]:
    """Return the adapter's location (`start_folder` set, downloaded if necessary), and the recipe of its run."""
    folder = Path(adapter).expanduser()
    if folder.is_dir() or adapter.startswith(("/", ".", "~")):
        read_adapter(folder)
        start = Lora.model_validate({"start_from": str(folder.absolute()), "start_folder": folder.absolute()})
        return start.model_copy(update={"start_from": str(folder.absolute())}), None
    try:
        start = Lora.model_validate({"start_from": adapter})
    except ValueError:
        raise InputError(f"{adapter}: no folder, RECIPE[@RUN] or OWNER/NAME[@REVISION] of an adapter") from None
    if start.start_run is not None:
        value = run_view.finished(store, adapter, run_view.adapter_needs, screen.say)
        (trained,) = run_view.done_folders(value, [run_view.adapter_stage(value["stages"])], adapter)
        pinned = f"{value['recipe']}@{value['run']}"
        path = value["folder"] / "recipe.yaml"
        own = parse_recipe(path.read_text(encoding="utf-8"), path, value["sets"])
        return start.model_copy(update={"start_from": pinned, "start_folder": trained / "adapter"}), own
    ctx = Context(store.scratch, Runtime(), Tracking(), say=screen.say, bar=screen.bar)
    return start.model_copy(update={"start_folder": folder_of(start, ctx)}), None


def _model_of(base: str, revision: object, own: Recipe | None) -> str | dict[str, object]:
    """Return the recipe's model: --base or the adapter's base, with the revision that the adapter pins."""
    if own is not None and own.model.id == base:
        if own.model.folder is not None:
            return str(own.model.folder)
        base = own.model.id
    if base.startswith("folder:"):
        raise InputError(
            f"the adapter's base is the folder {base.removeprefix('folder:')!r}; give its path: --base PATH"
        )
    if Path(base).expanduser().is_dir():
        return str(Path(base).expanduser().absolute())
    if base.startswith("/") or base.startswith("."):
        raise InputError(f"the base {base} is not a folder of this machine; pass --base OWNER/NAME|FOLDER")
    return {"id": base, "revision": revision} if revision and not base.startswith("builtin:") else base


def write_out(store: Store, run: str, out: Path, screen: Screen) -> None:
    """Write the merged model of a run, its GGUF files and its card to the folder `out`."""
    from finetune.models.loading import more_templates

    value = run_view.read(store, run)
    sources = [Path(value["stages"][s]["path"]) for s in ("merge", "export") if value["stages"][s]["status"] == "done"]
    card = publish_run(
        run, repo=f"OWNER/{value['recipe']}", dry_run=True, sets=["publish.what=[merged]"], artifacts=store.artifacts,
        scratch=store.scratch, quiet=True,
    )["pushes"][0]["card"]  # fmt: skip
    try:
        out.mkdir(parents=True, exist_ok=True)
        for source in sources:
            files = [p.name for p in source.iterdir() if p.is_file()]
            for name in sorted([*files, *more_templates(source)]):
                if name != "manifest.json" and not name.startswith("lease."):
                    (out / name).parent.mkdir(exist_ok=True)
                    _place(source / name, out / name)
        (out / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        raise FinetuneError(f"--out {out}: {error.strerror or error}; the merged model is in {sources[0]}") from None
    screen.say(f"merged model, with its card: {out}")


def _place(source: Path, target: Path) -> None:
    """Link a large file, copy a small one (it may be edited, which must not change the store)."""
    if source.suffix in LINKED:
        try:
            os.link(source, target)
            return
        except OSError:  # another file system, or one without links
            pass
    shutil.copyfile(source, target)


def formats(value: Sequence[str] | None) -> tuple[str, ...]:
    """Return the GGUF kinds of repeated or comma-separated options, each once."""
    return tuple(dict.fromkeys(kind.strip() for text in value or () for kind in text.split(",") if kind.strip()))
