"""A source of the recipe, whatever its kind, as Examples and as Rejects with a reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from finetune.data import pydoc_rows
from finetune.data.files import data_files, digest, is_one_file, skipped_files
from finetune.data.formats import Decision, FormatError, decide, to_example
from finetune.data.json_files import RawRow
from finetune.data.readers import hub_rows, local_rows
from finetune.data.records import Example, Reject
from finetune.data.values import RowError, listed
from finetune.errors import InputError
from finetune.recipe import HubSource, LocalSource, Source

SAMPLE_ROWS = 100  # looked at to decide a format
T = TypeVar("T")


def source_fingerprint(source: Source, scratch: Path | None = None) -> dict[str, object]:
    """Return the inputs of a source apart from the recipe: a file's digest, a commit of the Hub, a version of Python.

    Raises InputError if the file or the data set does not exist.
    """
    if isinstance(source, LocalSource):
        return digest(source.paths)
    if isinstance(source, HubSource):
        return {"commit": _commit(source, scratch)}
    return {"python": pydoc_rows.fingerprint()}


def first_rows(
    raw: Iterator[tuple[str, RawRow]], name: str, source: Source
) -> tuple[list[tuple[str, RawRow]], list[dict[str, Any]]]:
    """Return the first SAMPLE_ROWS items of `raw`, and the rows among them, from which the format is decided.

    Raises InputError, which begins with `name`, if none of them can be read.
    """
    head = list(islice(raw, SAMPLE_ROWS))
    sample = [r.row for _, r in head if r.row is not None]
    if not sample:
        problem = head[0][1].problem if head else "no row at all"
        raise InputError(f"{name}: nothing in it can be read as a row: {problem}{place_of(source)}")
    return head, sample


def read_source(
    source: Source, label: str, scratch: Path, ignore: Collection[str] = (), *, whole: bool = True
) -> tuple[Decision, Iterator[Example | Reject]]:
    """How the source is read, and its rows in order: each an Example, or a Reject if it does not fit.

    `label` begins every row id; `scratch` keeps what comes from the Hub; columns named in `ignore` are not read. With
    `whole=False` rows may lose columns that mean something: they are only compared with others. Raises InputError if
    the source as a whole cannot be read: no such file, no format that fits, no rows, a column that means something and
    is not used.
    """
    columns_of: dict[str, set[str]] = {}
    raw = raw_rows(source, scratch, columns_of)
    head, sample = first_rows(raw, f"data source {label}", source)
    try:
        decision = decide(source.format, source.columns, sample, ignore, raw=source.raw)
        decision = decision if whole else replace(decision, watched=(), meaningful=False)
        _check_unused(head, decision, label)
    except FormatError as error:
        raise InputError(f"data source {label}: {error}{place_of(source)}") from error
    if isinstance(source, LocalSource) and (skipped := skipped_files(source.paths)):
        decision.notes[f"not read, by their names: {listed(skipped)}"] += len(skipped)
    return decision, _converted(chain(head, raw), decision, label, columns_of)


def place_of(source: Source) -> str:
    """The paths of a local source, in brackets; empty for others."""
    return f" ({', '.join(map(str, source.paths))})" if isinstance(source, LocalSource) else ""


def _check_unused(head: Sequence[tuple[str, RawRow]], decision: Decision, label: str) -> None:
    """Stop at once if one of the first rows would lose a column; later ones are refused row by row."""
    if not decision.watched:
        return
    trial = replace(decision, notes=Counter(), later={})
    for file, raw in head:
        try:
            if raw.row is not None:
                to_example(raw.row, trial, "", "")
        except RowError as error:
            if error.reason == "unused_column":
                raise FormatError(f"row {row_id(label, file, raw)}: {error}", error.where) from None
        except RecursionError:
            continue  # refused when its turn comes


def row_id(label: str, file: str, raw: RawRow) -> str:
    """`LABEL:N`, or `LABEL/FILE:N` if a source has several files."""
    return f"{label}/{file}:{raw.number}" if file else f"{label}:{raw.number}"


def _converted(
    rows: Iterable[tuple[str, RawRow]], decision: Decision, label: str, columns_of: Mapping[str, set[str]]
) -> Iterator[Example | Reject]:
    yield from converted(rows, label, lambda row, name: (to_example(row, decision, name, label),))
    everywhere = set().union(*columns_of.values())
    for column in sorted(everywhere):
        lacking = sorted(file for file, columns in columns_of.items() if column not in columns)
        if lacking:
            decision.notes[f"the column {column!r} is missing in {listed(lacking)}"] += len(lacking)


def converted(
    rows: Iterable[tuple[str, RawRow]], label: str, convert: Callable[[dict[str, object], str], Iterable[T]]
) -> Iterator[T | Reject]:
    """Yield what `convert` makes of each row and its id, or a Reject if the row cannot be read or does not fit."""
    for file, raw in rows:
        name = row_id(label, file, raw)
        if raw.row is None:
            yield Reject(name, label, "unreadable", raw.problem, _printable(raw.text))
            continue
        try:
            yield from convert(raw.row, name)
        except RowError as error:
            yield Reject(name, label, error.reason, _printable(str(error)), _printable(_row_text(raw.row)))
        except RecursionError:
            yield Reject(name, label, "nested", "a column is nested too deeply", _printable(_row_text(raw.row)))


def raw_rows(
    source: Source,
    scratch: Path,
    columns_of: dict[str, set[str]],
    builtin: Callable[[], Iterator[dict[str, object]]] | None = None,
) -> Iterator[tuple[str, RawRow]]:
    """The rows, each with the name of its file if there are several; `columns_of` takes in the columns of each.

    `builtin` makes the rows of the source pydoc; by default questions and answers.
    """
    end = None if source.take is None else source.skip + source.take
    if isinstance(source, HubSource):
        rows = hub_rows(
            source.id,
            source.split,
            config=source.config,
            revision=_commit(source, scratch),
            streaming=source.streaming,
            skip=source.skip,
            take=source.take,
            cache=scratch / "hub",
        )
        return (("", row) for row in rows)
    if isinstance(source, LocalSource):
        return islice(_file_rows(source, columns_of), source.skip, end)
    made = (("", RawRow(number, row)) for number, row in enumerate((builtin or pydoc_rows.rows)(), start=1))
    return islice(made, source.skip, end)


def _file_rows(source: LocalSource, columns_of: dict[str, set[str]]) -> Iterator[tuple[str, RawRow]]:
    if is_one_file(source.paths):
        yield from (("", row) for row in local_rows(source.paths[0], source.encoding))
        return
    for file in data_files(source.paths):
        seen = columns_of.setdefault(file.name, set())
        for raw in local_rows(file.path, source.encoding):
            if raw.row is not None and not raw.row.keys() <= seen:
                seen.update(raw.row)
            yield file.name, raw


def _commit(source: HubSource, scratch: Path | None) -> str:
    from finetune.hub.client import resolve_revision

    return resolve_revision(source.id, source.revision, repo_type="dataset", scratch=scratch)


def _row_text(row: dict[str, object]) -> str:
    """A raw row as text."""
    try:
        return str(row)
    except RecursionError:
        return "(nested too deeply to be shown)"


def _printable(text: str) -> str:
    """The first 200 characters, with what no file can hold shown as an escape."""
    return text[:200].encode("utf-8", "backslashreplace").decode()
