"""Check what a valid recipe names on this machine: data files and their columns, a base's folder, a template.

Separate from the models, which read only the recipe, and from loading, which `show` does long after a run.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from finetune.errors import InputError
from finetune.quantized import formats
from finetune.recipe import LocalSource, Recipe, Source
from finetune.recipe.data import Contradiction, glob_parts
from finetune.recipe.filters import LanguageRule, Own, Rule, parse_condition
from finetune.recipe.load import LoadedRecipe
from finetune.utils.files import read_json
from finetune.utils.format import did_you_mean, nearest
from finetune.utils.links import require_model
from finetune.utils.resources import resource

MOST_ROWS = 1 << 19  # of an embedding: more than any base has
CHECKED_ROWS = 1000  # of each source, by `validate`


def absent(loaded: LoadedRecipe) -> list[str]:
    """Return a message with file and line for each missing file."""
    return loaded.located(_absent(loaded))


def _absent(loaded: LoadedRecipe) -> Iterator[Contradiction]:
    recipe = loaded.recipe
    folder = recipe.model.folder
    yield from _model_problems(recipe, folder) if folder is not None else ()
    encoder = recipe.dedup.embedding_folder if recipe.dedup else None
    for at, place in (("model", folder), ("lora.start_from", recipe.lora.start_folder), ("dedup.embedding", encoder)):
        yield from ((tuple(at.split(".")), why) for why in _not_its_own(place))
    for listed, sources in source_lists(recipe):
        for number, source in enumerate(sources):
            path: tuple[str | int, ...] = (*listed, number, "path")
            yield from ((path, why) for why in _no_file(source, loaded.path))
    problems = map(rule_problem, recipe.filter.rules if recipe.filter else [])
    yield from ((("filter", "rules", number), why) for number, why in enumerate(problems) if why)
    if encoder is not None and not encoder.is_dir():
        yield ("dedup", "embedding"), f"no such folder: {encoder}; allowed: lsa, OWNER/NAME, a folder"
    if recipe.evaluate and recipe.evaluate.task_path and not recipe.evaluate.task_path.is_dir():
        yield ("evaluate", "task_folder"), f"no such folder: {recipe.evaluate.task_path}"
    if recipe.evaluate and recipe.evaluate.metrics:
        from finetune.eval.answer_metrics import missing

        yield from ((("evaluate", "metrics"), why) for why in missing(recipe.evaluate.metrics))
    yield from _writers(recipe)
    if recipe.export and (why := formats.missing(recipe.export.hf)):
        yield ("export", "hf"), why
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


def _writers(recipe: Recipe) -> Iterator[Contradiction]:
    """Yield what is missing for the models that write and judge: folders, packages, prompts."""
    judge = recipe.evaluate.judge if recipe.evaluate else None
    for at, asked in ((("generate", "model"), recipe.generate), (("evaluate", "judge", "model"), judge)):
        if asked is None:
            continue
        folder = asked.model.local.folder if asked.model.local else None
        if asked.model.endpoint is not None and importlib.util.find_spec("openai") is None:
            yield (*at, "endpoint"), "openai is not installed (pip install 'finetune-recipes[synthetic]')"
        if folder is not None and not (folder / "config.json").is_file():
            yield (*at, "local"), f"{folder} {'holds no config.json' if folder.is_dir() else 'is not a folder'}"
        else:
            yield from (((*at, "local"), why) for why in _not_its_own(folder))
    if recipe.generate is not None:
        from finetune.synth.prompts import problem

        if why := problem(recipe.generate.prompts_path):
            yield ("generate", "prompts"), why


def unreadable(loaded: LoadedRecipe) -> list[str]:
    """Return an error for each local source whose first rows do not fit, and for each condition on an unknown column.

    Only the first CHECKED_ROWS rows of a source are read.
    """
    recipe = loaded.recipe
    problems: list[Contradiction] = []
    columns: set[str] = set()
    for listed, sources in source_lists(recipe):
        for number, source in enumerate(sources):
            if isinstance(source, LocalSource):
                try:
                    columns |= _columns(recipe, listed, source)
                except InputError as error:
                    problems.append(((*listed, number), str(error)))
    wheres = recipe.filter.keep_where if recipe.filter else []
    local = recipe.generate is None and all(isinstance(source, LocalSource) for source in recipe.data)
    if not problems and wheres and local:
        problems += [
            (("filter", "keep_where", n), why) for n, w in enumerate(wheres) if (why := _no_column(w, columns))
        ]
    return loaded.located(problems)


def _columns(recipe: Recipe, listed: tuple[str, ...], source: LocalSource) -> set[str]:
    """Return the other columns of a source's first rows of training data. Raises InputError if they cannot be read."""
    from finetune.data.records import Example
    from finetune.data.sources import read_source
    from finetune.preference.read import read_pairs

    if listed[0] == "preference":
        assert recipe.preference is not None  # noqa: S101
        read_pairs(source, source.label, Path(), recipe.ingest.ignore, recipe.preference.method)
        return set()
    if listed[0] == "generate":
        from finetune.synth.seeds import check_seeds

        assert recipe.generate is not None  # noqa: S101
        check_seeds(source, recipe.ingest.ignore, recipe.generate.method)
        return set()
    whole = listed[0] != "decontaminate"
    _, rows = read_source(source, source.label, Path(), recipe.ingest.ignore, whole=whole)
    extras = (json.loads(row.extra) for row in islice(rows, CHECKED_ROWS) if isinstance(row, Example) and row.extra)
    return set().union(*extras) if listed == ("data",) else set()


def _no_column(condition: str, columns: Collection[str]) -> str | None:
    column, *_ = parse_condition(condition)
    if column in columns:
        return None
    near = nearest(column, columns)
    hint = f"did you mean {near}?" if near else f"other columns there: {', '.join(sorted(columns)) or 'none'}"
    return f"{condition}: no row among the first {CHECKED_ROWS:,} has a column {column!r}; {hint}"


def source_lists(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], Sequence[Source]]]:
    """Every list of sources of a recipe with its place in the file."""
    yield ("data",), recipe.data
    yield ("eval_data",), recipe.eval_data or []
    yield ("decontaminate", "against"), recipe.decontaminate.against if recipe.decontaminate else []
    yield ("generate", "seeds"), recipe.generate.seeds if recipe.generate else []
    for name in ("data", "eval_data"):
        yield ("preference", name), getattr(recipe.preference, name, None) or []


def _model_problems(recipe: Recipe, folder: Path) -> Iterator[Contradiction]:
    if not (folder / "config.json").is_file():
        yield ("model",), f"{folder} {'holds no config.json' if folder.is_dir() else 'is not a folder'}"
    elif why := base_problem(recipe, read_json(folder / "config.json")):
        yield ("model",), why
    else:
        yield from _tokenizer_problems(recipe, folder)


def _not_its_own(folder: Path | None) -> Iterator[str]:
    try:
        if folder is not None:
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
    if recipe.export is None or not merges:
        return None
    if recipe.export.hf and (why := formats.problem(config, recipe.export.hf)):
        return f"export.hf: {why}"
    if not recipe.export.gguf:
        return None
    why = support.problem(config) or support.untied_problem(config, recipe.lora.modules_to_save)
    return f"export.gguf: {why}; set export: null" if why else None


def refuse_tokenizer(recipe: Recipe, base: Path | None) -> None:
    """Raise InputError if the base's tokenizer, as far as it is here, does not suit the recipe; a line for each reason.

    `base`: the folder of the finished base stage, which has been given the recipe's new tokens.
    """
    folder = base or recipe.model.folder
    if folder is not None and recipe.export and recipe.export.gguf and (why := _gguf_problem(folder)):
        raise InputError(f"export.gguf: {why}")
    if folder is not None and (problems := list(_tokenizer_problems(recipe, folder, given=base is not None))):
        raise InputError("\n".join(f"{'.'.join(map(str, at))}: {why}" for at, why in problems))


def _tokenizer_problems(recipe: Recipe, folder: Path, *, given: bool = False) -> Iterator[Contradiction]:
    if recipe.tokens is None or given:
        return
    from finetune.models.new_tokens import present_in_file

    try:
        present = present_in_file(folder / "tokenizer.json", recipe.tokens.add)
    except InputError as error:
        yield ("model",), str(error)
        return
    yield from ((("tokens", "add", number), why) for number, why in present)


def _gguf_problem(folder: Path) -> str | None:
    """Why the tokenizer in `folder` cannot be written as GGUF; None if it can, or if there is no tokenizer.json.

    transformers, which replaces parts of some tokenizers, is asked only if the file itself cannot be written.
    """
    from finetune.gguf.vocabulary import read_vocabulary
    from finetune.models.base_limits import check_tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    check_tokenizer(path)
    for read in (read_json, _as_loaded):
        try:
            read_vocabulary(folder, read(path), MOST_ROWS, None)
        except InputError as error:
            why = str(error)
        else:
            return None
    return why


def _as_loaded(path: Path) -> dict[str, Any]:
    from finetune.models.loading import load_tokenizer

    tokenizer: Any = load_tokenizer(path.parent)
    return json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else read_json(path)


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
        places = ", nor ".join(str(p) for p in dict.fromkeys(tried))
        yield f"no such file: {places}{did_you_mean(path.name, names)}"


def _no_template(name: str) -> Iterator[str]:
    folder = resource("templates")
    known = ["auto", *(sorted(p.stem for p in folder.glob("*.jinja")) if folder else [])]
    if name not in known:
        yield f"found {name!r}; allowed: {', '.join(known)}, or a .jinja file{did_you_mean(name, known)}"
