"""Find missing files of a valid recipe: data files, a base's folder, a template.

Separate from the models, which read only the recipe, and from loading, which `show` does long after a run.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.errors import InputError
from finetune.recipe import LocalSource, Recipe, Source
from finetune.recipe.data import glob_parts
from finetune.recipe.filters import LanguageRule, Own, Rule
from finetune.recipe.load import LoadedRecipe
from finetune.recipe.messages import in_file_order
from finetune.utils.files import read_json
from finetune.utils.links import require_model
from finetune.utils.resources import resource


def absent(loaded: LoadedRecipe) -> list[str]:
    """Return a message with file and line for each missing file."""
    found = _absent(loaded)
    return in_file_order(f"{loaded.line_of(*at)}: {'.'.join(map(str, at))}: {why}" for at, why in found)


def _absent(loaded: LoadedRecipe) -> Iterator[tuple[tuple[str | int, ...], str]]:
    recipe = loaded.recipe
    folder = recipe.model.folder
    if folder is not None and (why := _model_problem(recipe, folder)):
        yield ("model",), why
    encoder = recipe.dedup.embedding_folder if recipe.dedup else None
    named = (
        (("model",), folder),
        (("lora", "start_from"), recipe.lora.start_folder),
        (("dedup", "embedding"), encoder),
    )
    yield from ((at, why) for at, place in named if place is not None for why in _not_its_own(place))
    for number, source in enumerate(recipe.data):
        yield from ((("data", number, "path"), why) for why in _no_file(source, loaded.path))
    for number, source in enumerate(recipe.eval_data or []):
        yield from ((("eval_data", number, "path"), why) for why in _no_file(source, loaded.path))
    for number, source in enumerate(recipe.decontaminate.against if recipe.decontaminate else []):
        yield from ((("decontaminate", "against", number, "path"), why) for why in _no_file(source, loaded.path))
    problems = map(rule_problem, recipe.filter.rules if recipe.filter else [])
    yield from ((("filter", "rules", number), why) for number, why in enumerate(problems) if why)
    if encoder is not None and not encoder.is_dir():
        yield ("dedup", "embedding"), f"no such folder: {encoder}; allowed: lsa, OWNER/NAME, a folder"
    if recipe.evaluate and recipe.evaluate.task_path and not recipe.evaluate.task_path.is_dir():
        yield ("evaluate", "task_folder"), f"no such folder: {recipe.evaluate.task_path}"
    if recipe.evaluate and recipe.evaluate.metrics:
        from finetune.eval.answer_metrics import missing

        yield from ((("evaluate", "metrics"), why) for why in missing(recipe.evaluate.metrics))
    start = recipe.lora.start_folder
    if start is not None and not (start / "adapter_config.json").is_file():
        yield (
            ("lora", "start_from"),
            f"{start} {'holds no adapter_config.json' if start.is_dir() else 'is not a folder'}",
        )
    if recipe.render.template_file is not None:
        if not recipe.render.template_file.is_file():
            yield ("render", "template"), f"no such file: {recipe.render.template_file}"
    elif recipe.render.template != "auto":
        yield from ((("render", "template"), why) for why in _no_template(recipe.render.template))


def _model_problem(recipe: Recipe, folder: Path) -> str | None:
    if not (folder / "config.json").is_file():
        return f"{folder} {'holds no config.json' if folder.is_dir() else 'is not a folder'}"
    return base_problem(recipe, read_json(folder / "config.json"))


def _not_its_own(folder: Path) -> Iterator[str]:
    try:
        require_model(folder, "found")
    except InputError as error:
        yield str(error)


def base_problem(recipe: Recipe, config: Mapping[str, Any]) -> str | None:
    """Return why the base with this config.json cannot be used in this recipe, or None."""
    from finetune.gguf import support
    from finetune.models import quantized_base

    merges = recipe.merge is not None
    quantizes = recipe.quantization is not None
    if why := quantized_base.problem(config, recipe.model.id, quantizes=quantizes, merges=merges):
        return why
    if recipe.export is not None and merges and recipe.export.gguf and (why := support.problem(config)):
        return f"export.gguf: {why}; set export: null"
    return None


def rule_problem(rule: Rule) -> str | None:
    """Return a message on a filter rule's missing package or module; None if there is none."""
    from finetune.filters import custom, language

    if isinstance(rule, LanguageRule):
        return language.missing()
    if isinstance(rule, Own):
        try:
            custom.module_file(rule)
        except InputError as error:
            return str(error)
    return None


def _no_file(source: Source, recipe: Path) -> Iterator[str]:
    if not isinstance(source, LocalSource):
        return
    from finetune.data.files import data_files

    for path in source.paths:
        if path.is_file():
            continue
        if path.is_dir() or glob_parts(path) is not None:
            try:
                data_files([path])
            except InputError as error:
                yield str(error)
            continue
        tried = [path]
        if path.is_relative_to(Path.cwd()):  # paths that are not next to the recipe are searched in the working folder
            tried.append(recipe.absolute().parent / path.relative_to(Path.cwd()))
        names = [p.name for at in tried if at.parent.is_dir() for p in at.parent.iterdir()]
        near = difflib.get_close_matches(path.name, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        yield f"no such file: {', nor '.join(str(p) for p in dict.fromkeys(tried))}{hint}"


def _no_template(name: str) -> Iterator[str]:
    folder = resource("templates")
    known = ["auto", *(sorted(p.stem for p in folder.glob("*.jinja")) if folder else [])]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        yield f"found {name!r}; allowed: {', '.join(known)}, or a .jinja file{hint}"
