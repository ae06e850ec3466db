"""`finetune init`: a short recipe for a model, some data and a GPU, validated before it is written."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import yaml

from finetune.cli.run import DEFAULT_MODEL
from finetune.errors import InputError
from finetune.estimate.choice import DEVICES, Options
from finetune.estimate.memory import Training
from finetune.estimate.shapes import read_shapes
from finetune.eval.verdict import few_steps
from finetune.init.columns import Chosen
from finetune.init.data import FILE, Ask, Data, open_source, read_data
from finetune.init.preview import preview
from finetune.init.sizing import batch_for, held_out_fraction, length_for
from finetune.pipeline.recipe_checks import absent
from finetune.pipeline.store import Store
from finetune.recipe import Recipe
from finetune.recipe.data import local_path
from finetune.recipe.load import load_recipe, parse_recipe
from finetune.utils.files import canonical_json, read_json
from finetune.utils.resources import resource

DEFAULT_DEVICE = "t4"
LENGTHS = (2048, 1536, 1024, 768, 512, 256)  # render.max_length_tokens; the longest that fits is used
LARGEST_ON_CPU = 1_000_000_000  # parameters, as in preflight
# Names by which publishers tell a model with a chat template from a bare one.
CHATTY = re.compile(r"(?i)instruct|chat|zephyr|hermes|tulu|assistant|[-_]it\b|[-_]sft|[-_]dpo|qwen3|gpt-oss")
TINY_POSITIONS = 512
TINY_TRAIN = "train: {learning_rate: 1e-2, max_steps: 150, batch_rows: 4}"  # recipes/tiny-pydoc.yaml gives the reasons
LORA = "lora: {r: 16, alpha: 32}"
TRAIN = "train: {learning_rate: 2e-4, epochs: 1, batch_rows: 16}"
ANY_MACHINE = "any machine with 2 cores and 4 GB of memory; no GPU"
TINY_RATE = "a rate for a small model: a 7B takes 2e-4"
COMMENTS = {  # by the beginning of a line
    "schema:": "the version of this format",
    "name:": "runs are in artifacts/runs/NAME",
    "model:": "the base; its revision is pinned when it is first read",
    "data:": "a line a source; weight: 2 takes its rows twice",
    "eval_data:": "held out, and no row of data repeats one",
    "  - {source: local": "its format was found by its columns",
    "  - {source: hub": "split: train, format: auto, where not written",
    "  - source: local": "a file of this machine",
    "    format:": "how a row is laid out",
    "    path:": "next to this recipe, or under the working folder",
    "    columns:": "the format's names, each with yours",
    "  - {source: pydoc": "rows made of Python's own documentation",
    "ingest:": "columns that are not read",
    "filter: {keep_where": "conditions on other columns of the file",
    "filter:": "rejects.parquet says why a row is left out",
    "split:": "the share of rows that is held out to measure on",
    "pack:": "few rows: each is a row of the batch",
    "render:": "tokens of a row; GPU memory grows with them",
    "lora:": "r: the adapter's size; alpha / r scales it",
    "train:": "a step learns from batch_rows, on any number of GPUs",
}
COMMENT_COLUMN = 58


def ask_terminal(question: str, default: str) -> str:
    """Prompt on the terminal; a question without a default is repeated until it is answered."""
    import typer

    return str(typer.prompt(question, default=default or None)).strip()


def write_recipe(
    name: str | None,
    model: str | None,
    data: str | None,
    device: str | None,
    out: Path | None,
    *,
    eval_data: str | None = None,
    force: bool = False,
    ask: Ask | None = None,
    chosen: Chosen = Chosen(),  # noqa: B008 - frozen
    length: int | None = None,
    store: Store | None = None,
) -> str:
    """Write the recipe and return lines to print: its text, findings on the data, the next commands.

    `name`, `model`, `data`, `device` and `out` are the options: None asks, or takes the default of the last two;
    `force` writes over a file that is there, and keeps a question and an answer that seem to be swapped; `ask` is None
    if there is no terminal; `chosen` has the columns of question, answer and system text, and conditions on others;
    `length` is the row length in tokens, chosen by the rows and the device if it is None; in `store` a finished base is
    looked for, to show one row with its labels.

    Raises:
        InputError: an answer is missing and there is no terminal; a model, data, a column or a device that cannot be; a
            file that is there already.
    """
    missing = [f"--{n}" for n, v in (("name", name), ("model", model), ("data", data)) if v is None]
    if missing and ask is None:
        raise InputError(f"finetune init prompts only on a terminal; pass {', '.join(missing)}")
    if ask is not None:
        model = model or ask("base model (OWNER/NAME on the Hub, a folder, builtin:tiny-mistral)", DEFAULT_MODEL)
        data = data or ask("data (a file or folder of rows, a pattern, OWNER/NAME on the Hub, or pydoc)", "")
        if device is None and not model.startswith("builtin:"):
            device = ask(f"GPU to fit ({', '.join(DEVICES)}, or cpu)", DEFAULT_DEVICE)
        name = name or ask("name of the recipe", suggested_name(data))
    assert name is not None and model is not None and data is not None  # noqa: S101 - for mypy
    path = target(name, out, force=force)
    data_found = read_data(data, chosen, tiny=model.startswith("builtin:"), force=force, ask=ask)
    text, notes = recipe_text(name, model, data_found, device or DEFAULT_DEVICE, path, eval_data, length)
    recipe = write_file(text, path)
    measured = data_found.measured
    if store is not None and measured is not None and measured.first is not None:
        notes.append(preview(recipe, measured.first, store))
    away = [data_found.file] if data_found.file and Path(_written_path(data_found.file, path)).is_absolute() else []
    if device is not None and away:
        notes.append(
            f"{away[0].name}: the recipe names its place on this machine; write another path for one without it"
        )
    called = path.stem if path.parent == Path("recipes") else path
    lines = [text, *notes, f"wrote {path}", f"next: finetune plan {called}, then finetune run {called}"]
    return "\n".join(lines)


def target(name: str, out: Path | None, *, force: bool) -> Path:
    """Return the file to write. Raises InputError for another suffix, and for an existing file without `force`."""
    default = Path("recipes" if Path("recipes").is_dir() else "", f"{name}.yaml")
    path = _path("out" if out else "name", str(out or default))
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(f"--out {path}: a recipe's file ends in .yaml")
    if path.exists() and not force:
        raise InputError(f"{path} exists; use --force to overwrite it, or --out for another file")
    return path


def write_file(text: str, path: Path) -> Recipe:
    """Write a recipe that was validated. Raises InputError if it cannot be written, or names what is not there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
    loaded = load_recipe(str(path))
    if problems := absent(loaded):
        raise InputError("\n".join(problems))
    return loaded.recipe


def from_axolotl(file: Path, name: str | None, out: Path | None, *, force: bool = False) -> str:
    """Write the recipe for an axolotl configuration; returns its text and the keys that have no counterpart."""
    from finetune.init import axolotl

    translated = axolotl.translate(axolotl.read(file), name or suggested_name(file.stem))
    path = target(translated.recipe["name"], out, force=force)
    for source in translated.recipe.get("data", []):
        if source["source"] == "local":
            source["path"] = _written_path(_path("from", source["path"]), path)
    text = "\n".join([*_schema_line(path), f"# Translated from axolotl's {file.name}.", axolotl.text(translated)])
    parse_recipe(text, path)
    lines = [text]
    lines += [f"needs no key: {key} ({why})" for key, why in translated.by_itself.items()]
    lines += [f"NO COUNTERPART: {key}: {why}" for key, why in translated.lost.items()]
    write_file(text, path)
    return "\n".join([*lines, f"wrote {path}", f"next: finetune plan {path}, then finetune run {path}"])


def _held_out(data: str, path: Path, ignore: tuple[str, ...]) -> tuple[str, list[str]]:
    """The recipe's line for rows to evaluate on (a file, a folder or a pattern if there is one, else a Hub data set),
    and what was found in them.
    """
    file = _path("eval-data", data)
    pattern = any(c in data for c in "*?[")
    if not (file.exists() or pattern or data.startswith((".", "/", "~")) or data.count("/") != 1):
        return f"{{source: hub, id: {_scalar(data)}}}", []
    fields = {"source": "local", "path": file.absolute()}
    decision, _, _ = open_source(fields, file.name, Chosen(ignore=ignore))
    where = _scalar(_written_path(file, path))
    note = f"{file.name}: format {decision.format}, since {decision.why}"
    return f"{{source: local, path: {where}, format: {decision.format}}}", [note]


def recipe_text(
    name: str, model: str, data: Data, device: str, path: Path, eval_data: str | None = None, length: int | None = None
) -> tuple[str, list[str]]:
    """The validated recipe that will be at `path`, in 16 lines at most, and notes for the person.

    Raises InputError if an option has an invalid value, or if the model does not fit on the device.
    """
    if device.lower() not in (*DEVICES, "cpu"):
        raise InputError(f"--device {device}: allowed: {', '.join(DEVICES)}, cpu")
    where = _written_model(model, path)
    source = data.lines(lambda file: _written_path(file, path), _scalar)
    head = ["schema: 1", f"name: {_scalar(name)}", f"model: {_scalar(where)}", "data:", *source]
    if eval_data is not None:
        held_out, notes = _held_out(eval_data, path, data.ignore)
        head += ["eval_data:", f"  - {held_out}"]
        data = replace(data, notes=[*data.notes, *notes])
    if data.ignore:
        head.append(f"ingest: {{ignore: [{', '.join(map(_scalar, data.ignore))}]}}")
    tiny = model.startswith("builtin:")
    bare = _parse(head, path)
    positions = TINY_POSITIONS if tiny else _positions(bare)
    known = tiny or bare.model.folder is not None
    if length is not None and not 16 <= length <= (positions if known else length):
        raise InputError(f"--max-length-tokens {length}: allowed are 16 to {positions}, what this base was made for")
    if tiny and data.measured is None:
        longest = length or positions
        short = f"filter: {{max_length_tokens: {longest * 7 // 8}}}"  # a template and special tokens come on top
        lines = [*head, short, f"render: {{max_length_tokens: {longest}}}", TINY_TRAIN]
        _parse(lines, path)
        return _text(ANY_MACHINE, lines, path, {"train:": TINY_RATE}), data.notes
    template, note = ("", "") if tiny or data.format == "text" else _template(bare, where)
    lengths = [length] if length is not None else [n for n in LENGTHS if n <= positions] or [positions]
    if data.measured is not None and length is None:
        wanted = length_for(data.measured, lengths)
        lengths = [n for n in lengths if n <= wanted]
    best = ""
    for length in lengths:
        sized, notes = _sized(data, length, "1e-2" if tiny else "2e-4", own_held_out=eval_data is not None)
        lines = [*head, *sized[:-1], f"render: {{{template}max_length_tokens: {length}}}", LORA, sized[-1]]
        fits, best = (True, ANY_MACHINE) if tiny else _fits(_parse(lines, path), device.lower())
        if fits:
            _parse(lines, path)
            own = {**({"render:": note} if note else {}), **({"train:": TINY_RATE} if tiny else {})}
            return _text(best, lines, path, own), [*data.notes, *notes]
    raise InputError(best)


def _sized(data: Data, length: int, rate: str, *, own_held_out: bool) -> tuple[list[str], list[str]]:
    """Return the lines that depend on the number of rows, train last, and a note on how they were chosen."""
    keep = [f"filter: {{keep_where: [{', '.join(canonical_json(c) for c in data.keep)}]}}"] if data.keep else []
    measured = data.measured
    if measured is None:
        return [*keep, TRAIN], []
    sizing, share = batch_for(measured, length), held_out_fraction(measured)
    share = 0.0 if own_held_out else share
    lines = [*keep, *([f"split: {{eval_fraction: {share:g}}}"] if share not in (0.0, 0.05) else [])]
    lines += [] if sizing.packed else ["pack: null"]
    train = f"train: {{learning_rate: {rate}, epochs: {sizing.epochs}, batch_rows: {sizing.batch_rows}}}"
    about = "about " if measured.whole else "over "
    words = f"{measured.kept:,} rows, about {sum(measured.lengths):,} tokens: {about}{sizing.steps:,} optimiser steps"
    notes = [f"{words}, about {round(share * measured.kept):,} rows held out"]
    if longer := sum(n > length for n in measured.lengths):
        notes.append(f"about {longer:,} rows are longer than {length:,} tokens and would be cut (render.overlong)")
    if few := few_steps(sizing.steps, "add rows; so few cannot teach a model much"):
        notes.append(few)
    return [*lines, train], notes


def suggested_name(data: str) -> str:
    """Derive a recipe name from the data's name: `my rows.jsonl.gz` gives my-rows."""
    stem = FILE.sub("", data.rstrip("/").rpartition("/")[2])
    return re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "mine"


def _text(hardware: str, lines: list[str], path: Path, own: Mapping[str, str]) -> str:
    """Return the file's text: schema line, purpose, and each line with a comment."""
    comments = {**COMMENTS, **own}
    explained = [
        next((f"{line:<{COMMENT_COLUMN}}  # {why}" for start, why in comments.items() if line.startswith(start)), line)
        for line in lines
    ]
    return "\n".join([*_schema_line(path), f"# Hardware: {hardware}.", *explained]) + "\n"


def _schema_line(path: Path) -> list[str]:
    """Return the schema's location for editors: relative within a checkout, else a file URI."""
    schema = resource("schema.json")
    if schema is None:
        return []
    schema, folder = schema.absolute(), path.absolute().parent
    where = schema.as_uri()
    if folder.is_relative_to(schema.parent.parent) and ".." not in folder.parts:
        where = os.path.relpath(schema, folder)
        where = where if where.startswith(".") else f"./{where}"
    return [f"# yaml-language-server: $schema={where}"]


def _parse(lines: list[str], path: Path) -> Recipe:
    return parse_recipe("\n".join(lines), path)


def _path(option: str, text: str) -> Path:
    try:
        return local_path(text)
    except ValueError as error:
        raise InputError(f"--{option} {text[:60]}: {error}") from None


def _written_path(file: Path, recipe: Path) -> str:
    """Return a path as written in a recipe: relative to it or to the working folder, else absolute."""
    for folder in (recipe.absolute().parent, Path().absolute()):
        if file.absolute().is_relative_to(folder) and ".." not in file.absolute().parts:
            return file.absolute().relative_to(folder).as_posix()
    return str(file.absolute())


def _written_model(model: str, recipe: Path) -> str:
    """Return a folder in a form that recipes recognise as a folder; any other name unchanged."""
    folder = _path("model", model)
    if model.startswith("builtin:") or not (folder.is_dir() or model.startswith((".", "/", "~"))):
        return model
    if not (folder / "config.json").is_file():
        raise InputError(
            f"--model {model}: {'it holds no config.json' if folder.is_dir() else 'there is no such folder'}"
        )
    where = _written_path(folder, recipe)
    return where if where.startswith("/") else f"./{where}"


def _template(recipe: Recipe, name: str) -> tuple[str, str]:
    """`template: …, ` if the base has or seems to have no template, and the comment on it."""
    folder = recipe.model.folder
    if folder is not None:
        settings = folder / "tokenizer_config.json"
        own = (folder / "chat_template.jinja").is_file() or (
            settings.is_file() and read_json(settings).get("chat_template")
        )
        return ("", "") if own else ("template: alpaca, ", "this base has no chat template of its own")
    if CHATTY.search(name):
        return "", ""
    return "template: alpaca, ", "by its name no chat model; if it has a template: auto"


def _positions(recipe: Recipe) -> int:
    """Return the maximum positions of a base in a local folder; the default length for any other base."""
    if recipe.model.folder is None:
        return LENGTHS[0]
    positions = read_json(recipe.model.folder / "config.json").get("max_position_embeddings")
    return positions if isinstance(positions, int) and positions >= 16 else LENGTHS[0]


def _fits(recipe: Recipe, device: str) -> tuple[bool, str]:
    """Return whether training fits the device (true if the shapes are unknown), and a sentence about it."""
    shapes = read_shapes(recipe)
    hub = recipe.model.id
    if shapes is None:
        return True, f"meant for {_named(device)}; `finetune plan` can check it after the base's config was read"
    if device == "cpu":
        what = f"{shapes.parameters / 1e9:.1f} billion parameters"
        if shapes.parameters >= LARGEST_ON_CPU:
            return (
                False,
                f"--device cpu: {hub} has {what}, which would take weeks; give a GPU: {', '.join(DEVICES)}",
            )
        return True, "a CPU is enough"
    options = Options(shapes, Training.of(recipe))
    choice = options.best(DEVICES[device])
    needed = choice.total
    length = recipe.render.max_length_tokens
    if choice.fits:
        return True, f"{_named(device)}; {needed / 1e9:.1f} GB predicted for rows of {length:,} tokens"
    larger = [name for name, gpu in DEVICES.items() if options.best(gpu).fits]
    hint = f"take {', '.join(larger)}" if larger else "no single GPU we know holds it"
    return False, f"--device {device}: {hub} needs {needed / 1e9:.1f} GB even for rows of {length} tokens; {hint}"


def _named(device: str) -> str:
    if device == "cpu":
        return "a CPU"
    return f"one {device.upper()} ({DEVICES[device].memory_bytes / 1e9:.1f} GB usable)"


def _scalar(text: str) -> str:
    """Return `text` as a YAML scalar that is also valid between braces."""
    plain = re.fullmatch(r"[A-Za-z_./~][\w./~:-]*", text) and not text.endswith(":")
    if plain and isinstance(yaml.safe_load(text), str) and text.lower() not in ("null", "true", "false", "~"):
        return text
    return canonical_json(text)
