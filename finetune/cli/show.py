"""`finetune show` and `finetune inspect`: runs and rows as text, JSON and HTML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from pydantic import BaseModel

from finetune.errors import InputError
from finetune.pipeline import runner
from finetune.pipeline.runs import recorded, recorded_recipe
from finetune.pipeline.stage_list import STAGE_NAMES, headline_of
from finetune.pipeline.store import Store
from finetune.recipe import Recipe
from finetune.utils.console import print_table
from finetune.utils.format import NONE, first_line, visible

if TYPE_CHECKING:
    from finetune.report.rows import InspectedRow
    from finetune.tokenization.inspection import Tokenizer


def print_runs(values: list[dict[str, Any]]) -> None:
    """Print a table per run; for two runs also the recipe fields and metrics that differ, side by side."""
    for value in values:
        with recorded(value["folder"]):
            rows = []
            for stage, record in value["stages"].items():
                seconds = f"{record['seconds']:.1f}" if record["seconds"] is not None else ""
                headline = headline_of(stage, record["metrics"])
                figure = record.get("message") or headline.figure
                rows.append([stage, record["status"], headline.rows, seconds, figure])
        print_table(f"{value['recipe']}@{value['run']}", ["stage", "status", "rows", "seconds", "figure"], rows)
    if len(values) == 2:
        _print_comparison(*values)


def _print_comparison(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Print the recipe fields that differ, then the metrics that differ."""
    names = [f"{v['recipe']}@{v['run']}" for v in (first, second)]
    try:
        asked = recipe_differences(*(recorded_recipe(v) for v in (first, second)))
    except InputError as error:
        asked = [("recipe.yaml", "cannot be read now", first_line(error))]
    came = figure_differences(first["stages"], second["stages"])
    if not asked and not came:
        typer.echo("the two runs have the same recipe and the same figures")
    if asked:
        print_table("recipe: what differs", ["field", *names], asked)
    if came:
        print_table("figures: what differs", ["figure", *names, "ratio"], came)


def recipe_differences(first: Recipe, second: Recipe) -> list[tuple[str, str, str]]:
    """Return every field that differs, defaults included: its name and both values in YAML ("–": absent)."""
    a, b = dict(_fields(first)), dict(_fields(second))
    for here, there in ((a, b), (b, a)):
        for name in [
            n for n, value in here.items() if value == "null" and n not in there
        ]:  # a section in one recipe only
            inside = {n: v for n, v in there.items() if n.startswith((f"{name}.", f"{name}["))}
            there[name] = ", ".join(f"{n.removeprefix(f'{name}.')}: {v}" for n, v in inside.items())
            for n in inside:
                del there[n]
    names = dict.fromkeys([*a, *b])
    return [(name, a.get(name, NONE), b.get(name, NONE)) for name in names if a.get(name) != b.get(name)]


def _fields(value: object, at: str = "") -> Iterator[tuple[str, str]]:
    """The leaves below `value` with their names: train.learning_rate, data[0].path."""
    if isinstance(value, BaseModel):
        for key, field in type(value).model_fields.items():
            if not field.exclude or field.is_required():  # other fields excluded from dumps are derived
                yield from _fields(dict(value)[key], f"{at}.{field.alias or key}".lstrip("."))
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _fields(inner, f"{at}.{name}")
    elif isinstance(value, (list, tuple)) and any(isinstance(v, BaseModel) for v in value):
        for number, inner in enumerate(value):
            yield from _fields(inner, f"{at}[{number}]")
    else:
        yield at, _scalar(value)


def _scalar(value: object) -> str:
    """Return a value as written in a recipe."""
    if isinstance(value, float):
        mantissa, _, exponent = f"{value:.6e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}" if 0 < abs(value) < 1e-3 else f"{value:g}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_scalar(v) for v in value)}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def figure_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return each metric that differs between two runs: its name, both values, and second / first for numbers."""
    rows = []
    for stage in STAGE_NAMES:
        a, b = (dict(_figures(stages[stage]["metrics"], stage)) for stages in (first, second))
        for name in sorted({*a, *b}):
            if a.get(name) != b.get(name):
                rows.append((name, _figure(a.get(name)), _figure(b.get(name)), _ratio(a.get(name), b.get(name))))
    return rows


def _figures(metrics: Mapping[str, Any], at: str) -> Iterator[tuple[str, Any]]:
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _figures(value, f"{at}.{name}")
        else:
            yield f"{at}.{name}", value


def _figure(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_figure(v) for v in value)}]"
    return f"{value:.6g}" if isinstance(value, float) else NONE if value is None else str(value)


def _ratio(first: object, second: object) -> str:
    numbers = (int, float)
    if isinstance(first, bool) or isinstance(second, bool):
        return ""
    if not isinstance(first, numbers) or not isinstance(second, numbers) or not first:
        return ""
    return f"{second / first:.4g}"


def inspected_rows(recipe: Recipe, store: Store, count: int) -> list[InspectedRow]:
    """The first rendered rows, each with its source and the nearest rows that were dropped for it; then the first
    preference pairs, each side a row.

    Raises InputError if nothing is rendered yet.
    """
    from finetune.models.loading import load_tokenizer
    from finetune.report.rows import InspectedRow, notes_on, sources_and_repeats
    from finetune.tokenization.inspection import segments
    from finetune.tokenization.token_rows import read_token_rows

    steps = {s.stage.name: s for s in runner.plan(recipe, store)}
    render, base, dedup, pairs = steps["render"], steps["base"], steps["dedup"], steps["pairs"]
    sides: list[InspectedRow] = []
    if pairs.manifest is not None and pairs.folder is not None and base.folder is not None:
        sides = _inspected_pairs(pairs.folder / "train.parquet", load_tokenizer(base.folder), count)
    if render.manifest is None or render.folder is None or base.folder is None:
        if sides:
            return sides
        raise InputError(f"nothing rendered yet: run `finetune run {recipe.name} --until render` first")
    tokenizer: Any = load_tokenizer(base.folder)
    rows = read_token_rows(render.folder / "train.parquet", count, whole=False)
    split = render.inputs["split"].folder
    read = [p for p in (split / "train.parquet", split / "rows.parquet") if p.is_file()][:1]
    notes = notes_on([r.id for r in rows], read, render.folder / "masked.jsonl")
    sources, repeats = sources_and_repeats(
        [r.id for r in rows],
        read,
        dedup.folder / "pairs.parquet" if dedup.manifest and dedup.folder else None,
        dedup.inputs["filter"].folder / "rows.parquet" if dedup.manifest else None,
    )
    return [
        InspectedRow(
            id=row.id,
            source=sources.get(row.id, ""),
            tokens=len(row.ids),
            supervised=int(row.mask.sum()),
            segments=segments(tokenizer, row.ids.tolist(), row.mask.tolist()),
            repeats=repeats[row.id][0] if row.id in repeats else [],
            dropped=repeats[row.id][1] if row.id in repeats else 0,
            notes=notes[row.id],
        )
        for row in rows
    ] + sides


def _inspected_pairs(path: Path, tokenizer: Tokenizer, count: int) -> list[InspectedRow]:
    """The first pairs of the stage pairs: a row for each side, the prompt with that answer."""
    import pyarrow.parquet as pq

    from finetune.preference.records import SIDES
    from finetune.report.rows import InspectedRow
    from finetune.tokenization.inspection import segments

    with pq.ParquetFile(path) as file:
        table = next(file.iter_batches(batch_size=count), None)
    inspected = []
    for row in table.to_pylist() if table is not None else []:
        for side in SIDES["kto" if "label" in row else "dpo"]:
            prompt, answer, labels = row["prompt_ids"], row[f"{side}_ids"], row[f"{side}_mask"]
            label = f", label {str(row['label']).lower()}" if "label" in row else ""
            name = f"{row['pair_id']} ({side}{label})"
            runs = segments(tokenizer, prompt + answer, [0] * len(prompt) + labels)
            tokens, supervised = len(prompt) + len(answer), sum(labels)
            inspected.append(InspectedRow(name, row["source"], tokens, supervised, runs, repeats=[], dropped=0))
    return inspected


def print_rows(recipe: Recipe, store: Store, count: int) -> None:
    """Print the first rendered rows: special tokens visible, supervised text in colour."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for row in inspected_rows(recipe, store, count):
        head = Text.assemble(
            (visible(row.id), "bold"), f"  {visible(row.source)}  {row.tokens} tokens, {row.supervised} supervised"
        )
        console.print(head, highlight=False)
        text = Text()
        for segment in row.segments:
            style = ("green" if segment.supervised else "") + (" reverse" if segment.special else "")
            text.append(visible(segment.text), style=style.strip())
        console.print(text, soft_wrap=True)
        for note in row.notes:
            console.print(Text(visible(note), style="dim"), soft_wrap=True)
        if row.repeats:
            near = ", ".join(f"{one.dropped.id} ({one.dropped.method} {one.dropped.score:.3f})" for one in row.repeats)
            more = f" and {row.dropped - len(row.repeats)} more" if row.dropped > len(row.repeats) else ""
            console.print(Text(visible(f"dropped for it: {near}{more}"), style="dim"), soft_wrap=True)
        console.print()


def write_rows_page(recipe: Recipe, store: Store, count: int, path: Path) -> None:
    """Write the same as one self-contained HTML page. Raises InputError if `path` cannot be written."""
    from finetune.report.html import render_page
    from finetune.utils.files import write_bytes

    rows = inspected_rows(recipe, store, count)
    render = next(s for s in runner.plan(recipe, store) if s.stage.name == "render")
    total = render.manifest.metrics["rows"] if render.manifest else len(rows)
    page = render_page("rows.jinja", {"recipe": recipe.name, "rows": rows, "all_rows": total})
    try:
        write_bytes(path, page)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
