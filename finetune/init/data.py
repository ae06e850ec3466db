"""The data of a new recipe: a file with its format or its columns mapped, a data set on the Hub, or pydoc."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from finetune.data.files import TRAINED_ON, evaluation_files
from finetune.data.formats import Decision
from finetune.data.readers import local_rows
from finetune.data.records import Example, Reject
from finetune.data.sources import SAMPLE_ROWS, read_source
from finetune.data.text_files import encoding_of
from finetune.data.values import listed
from finetune.errors import InputError
from finetune.estimate.rows import Measured, measure
from finetune.filters.private_text import warning
from finetune.init.columns import Chosen, Column, check_names, describe, suggest, swapped, table
from finetune.recipe import LocalSource
from finetune.recipe.data import local_path
from finetune.recipe.filters import parse_condition
from finetune.utils.files import canonical_json

Ask = Callable[[str, str], str]
"""Asks a person. Arguments: the question, and the answer if the person enters an empty line."""

FILE = re.compile(r"\.(jsonl|ndjson|json|csv|tsv|parquet)(\.gz|\.zst)?$")
TEXT = re.compile(r"\.(jsonl|ndjson|json|csv|tsv)(\.gz|\.zst)?$")
CANONICAL = {"question": "prompt", "answer": "completion", "system": "system"}  # of the format prompt_completion
NONE = "none"


@dataclass
class Data:
    """One source: its fields as the recipe writes them, its format, what was measured, and notes for the person."""

    fields: dict[str, object]
    file: Path | None = None
    format: str = ""
    keep: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    measured: Measured | None = None
    notes: list[str] = field(default_factory=list)

    def lines(self, written: Callable[[Path], str], scalar: Callable[[str], str]) -> list[str]:
        """The source as YAML, a line a field if it has columns; `written` gives the path as the recipe may name it."""
        fields = dict(self.fields)
        if self.file is not None:
            fields["path"] = written(self.file)
        written_fields = [f"{name}: {_value(value, scalar)}" for name, value in fields.items()]
        if "columns" in fields:
            return [f"{'  - ' if n == 0 else '    '}{line}" for n, line in enumerate(written_fields)]
        return [f"  - {{{', '.join(written_fields)}}}"]


def _value(value: object, scalar: Callable[[str], str]) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{scalar(k)}: {scalar(v)}" for k, v in value.items()) + "}"
    return scalar(value) if isinstance(value, str) else canonical_json(value)


def read_data(data: str, chosen: Chosen, *, tiny: bool, force: bool = False, ask: Ask | None = None) -> Data:
    """Look at the data. Of a file, columns are asked for if no format fits and they were not named.

    Raises InputError for a file that cannot be read, columns that are not there or seem to be swapped (without
    `force`), and conditions that keep no row.
    """
    for condition in chosen.keep:
        try:
            parse_condition(condition)
        except ValueError as error:
            raise InputError(f"--keep {condition!r}: {error}") from None
    if data == "pydoc":
        _no_columns(chosen, data)
        return Data({"source": "pydoc"}, format="messages", keep=chosen.keep, ignore=chosen.ignore)
    try:
        file = local_path(data)
    except ValueError as error:
        raise InputError(f"--data {data[:60]}: {error}") from None
    if not (file.exists() or FILE.search(data) or data.startswith((".", "/", "~")) or data.count("/") > 1):
        _no_columns(chosen, data)
        notes = [f"{data}: its format is found when it is read"]
        return Data({"source": "hub", "id": data}, keep=chosen.keep, ignore=chosen.ignore, notes=notes)
    return _file(file, chosen, tiny=tiny, force=force, ask=ask)


def _no_columns(chosen: Chosen, data: str) -> None:
    if chosen.given:
        raise InputError(f"--question, --answer and --system name columns of a file; {data} is none")


def _file(file: Path, chosen: Chosen, *, tiny: bool, force: bool, ask: Ask | None) -> Data:
    fields: dict[str, object] = {"source": "local", "path": file.absolute()}
    encoding = encoding_of(file) if file.is_file() and TEXT.search(file.name) else None
    encoding = None if encoding == "utf-8" else encoding
    if encoding is not None:
        fields["encoding"] = encoding
    one = chosen.given or file.is_file()  # else a folder or a pattern
    found_rows = local_rows(file, encoding) if one else ()
    sample = [r.row for r in islice(found_rows, SAMPLE_ROWS) if r.row is not None]
    columns = describe(sample)
    notes = [f"{file.name}: columns, each with a sample value:\n{table(columns)}"] if columns else []
    asked = [("--ignore", c) for c in chosen.ignore] + [("--keep", parse_condition(c)[0]) for c in chosen.keep]
    there = {column.name for column in columns}
    if absent := [f"{option} {c}" for option, c in asked if columns and c not in there]:
        raise InputError(f"{absent[0]}: no column of that name. The columns are:\n{table(columns)}")
    if not chosen.given:
        try:
            decision, rows, chosen = open_source(fields, file.name, chosen, columns, ask)
        except InputError as error:
            if not columns or not (isinstance(error, NotNeeded) or "no format fits" in str(error)):
                raise
            chosen = _ask_columns(file, columns, chosen, ask)
    if chosen.given:
        check_names(chosen, columns)
        question, answer = str(chosen.question), str(chosen.answer)
        if (why := swapped(question, answer, sample)) and not force:
            raise InputError(
                f"{file.name}: question and answer seem to be reversed ({why}). Swap the two sides: "
                f"--question {answer!r} --answer {question!r}; --force keeps them as they are"
            )
        named = {CANONICAL[k]: v for k in CANONICAL if (v := getattr(chosen, k)) is not None}
        fields |= {"format": "prompt_completion", "columns": named}
        decision, rows, chosen = open_source(fields, file.name, chosen, columns, ask)
    else:
        fields["format"] = decision.format
    measured = measure(rows, chosen.keep, tiny=tiny)
    notes.append(_summary(file, decision.format, decision.why, decision.unused, measured))
    notes += [f"{file.name}: {note} ({count:,})" for note, count in sorted(decision.notes.items())]
    if not file.is_file() and (evaluation := evaluation_files([file])):
        notes.append(f"{file.name}: {TRAINED_ON.format(listed(evaluation))} (--eval-data)")
    if measured.kept == 0:
        why = f"none can be read: {measured.first_reject}"
        why = f"--keep {' and '.join(chosen.keep)} keeps none" if chosen.keep else why
        raise InputError(f"{file.name}: of {measured.rows:,} rows {why}. The columns are:\n{table(columns)}")
    if line := warning(measured.private, "training"):
        notes.append(line)
    return Data(fields, file, decision.format, chosen.keep, chosen.ignore, measured, notes)


class NotNeeded(InputError):
    """A person does not want to leave out a column that the format does not read."""


def open_source(
    fields: Mapping[str, object], label: str, chosen: Chosen, columns: Sequence[Column] = (), ask: Ask | None = None
) -> tuple[Decision, Iterator[Example | Reject], Chosen]:
    """Read a source as `read_source` does; of a column that no format uses a person is asked if it may be ignored.

    Returns `chosen` with the columns that are ignored. Raises InputError as `read_source` does, with the option that
    ignores the column if there is no terminal; NotNeeded if it may not be ignored.
    """
    while True:
        try:
            source = LocalSource.model_validate(fields)
            return *read_source(source, label, Path(), chosen.ignore), chosen
        except InputError as error:
            column = getattr(error.__cause__, "column", None)
            if column is None:
                raise
            if ask is None:
                raise InputError(f"{error}; here: --ignore {shlex.quote(column)}") from None
            columns_table = table([c for c in columns if c.name == column])
            asked = f"{error}\n{columns_table}\nleave the column {column!r} out (ingest.ignore)? yes or no"
            if not ask(asked, "").lower().startswith("y"):
                raise NotNeeded(str(error)) from None
            chosen = replace(chosen, ignore=(*chosen.ignore, column))


def _summary(file: Path, format_: str, why: str, unused: tuple[str, ...], measured: Measured) -> str:
    parts = [f"{file.name}: format {format_}, since {why}"]
    parts += [f"not used: {', '.join(unused)}"] if unused else []
    parts.append(
        f"{measured.kept:,} of {measured.rows:,} rows kept" + ("" if measured.whole else ", of the first ones")
    )
    if measured.refused:
        parts.append(f"{measured.refused:,} cannot be read, the first: {measured.first_reject}")
    return "; ".join(parts)


def _ask_columns(file: Path, columns: list[Column], chosen: Chosen, ask: Ask | None) -> Chosen:
    """The columns as a person names them; an error that lists them if there is no terminal."""
    question, answer = suggest(columns)
    if ask is None:
        hint = f"--question {question or 'NAME'!r} --answer {answer or 'NAME'!r}"
        raise InputError(f"{file.name}: which column is the question, which the answer? Add {hint}\n{table(columns)}")
    overview = f"{file.name} has these columns:\n{table(columns)}\n"
    question = ask(f"{overview}column of the question", question)
    answer = ask("column of the answer", answer)
    system = ask("column of a system text", NONE)
    return replace(chosen, question=question, answer=answer, system=None if system == NONE else system)
