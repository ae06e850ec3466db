"""A source of the recipe, whatever its kind, as Examples and as Rejects with a reason."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from finetune.data import pydoc_rows
from finetune.data.formats import Decision, FormatError, RowError, decide, to_example
from finetune.data.readers import RawRow, content_digest, hub_rows, local_rows
from finetune.data.records import Example, Reject
from finetune.errors import InputError
from finetune.recipe import HubSource, LocalSource, Source

SAMPLE_ROWS = 100  # looked at to decide a format


def source_fingerprint(source: Source, scratch: Path | None = None) -> dict[str, object]:
    """What the source's rows depend on beside the recipe: a file's digest, a commit of the Hub, a version of Python.

    Raises InputError where the file or the data set does not exist.
    """
    if isinstance(source, LocalSource):
        return {"file": source.path.name, "xxh3_128": content_digest(source.path)}
    if isinstance(source, HubSource):
        return {"commit": _commit(source, scratch)}
    return {"python": pydoc_rows.fingerprint()}


def read_source(source: Source, label: str, scratch: Path) -> tuple[Decision, Iterator[Example | Reject]]:
    """How the source is read, and its rows in order: each an Example, or a Reject where it does not fit.

    `label` begins every row id; `scratch` keeps what comes from the Hub. Raises InputError where the source as a whole
    cannot be read: no such file, no format that fits, no rows.
    """
    raw = _raw_rows(source, scratch)
    head = list(islice(raw, SAMPLE_ROWS))
    sample = [r.row for r in head if r.row is not None]
    if not sample:
        found = head[0].problem if head else "no row at all"
        raise InputError(f"data source {label}: nothing in it can be read as a row: {found}{_place(source)}")
    try:
        decision = decide(source.format, source.columns, sample)
    except FormatError as error:
        raise InputError(f"data source {label}: {error}{_place(source)}") from error
    return decision, _converted(chain(head, raw), decision, label)


def _place(source: Source) -> str:
    return f" ({source.path})" if isinstance(source, LocalSource) else ""


def _converted(rows: Iterator[RawRow], decision: Decision, label: str) -> Iterator[Example | Reject]:
    for raw in rows:
        row_id = f"{label}:{raw.number}"
        if raw.row is None:
            yield Reject(row_id, label, "unreadable", raw.problem, _printable(raw.text))
            continue
        try:
            yield to_example(raw.row, decision, row_id, label)
        except RowError as error:
            yield Reject(row_id, label, error.reason, _printable(str(error)), _printable(_shown(raw.row)))


def _raw_rows(source: Source, scratch: Path) -> Iterator[RawRow]:
    end = None if source.take is None else source.skip + source.take
    if isinstance(source, HubSource):
        return hub_rows(
            source.id,
            source.split,
            config=source.config,
            revision=_commit(source, scratch),
            streaming=source.streaming,
            skip=source.skip,
            take=source.take,
            cache=scratch / "hub",
        )
    if isinstance(source, LocalSource):
        return islice(local_rows(source.path), source.skip, end)
    rows = (RawRow(number, row) for number, row in enumerate(pydoc_rows.rows(), start=1))
    return islice(rows, source.skip, end)


def _commit(source: HubSource, scratch: Path | None) -> str:
    from finetune.hub.client import resolve_revision

    return resolve_revision(source.id, source.revision, repo_type="dataset", scratch=scratch)


def _shown(row: dict[str, object]) -> str:
    try:
        return str(row)
    except RecursionError:
        return "(nested too deeply to be shown)"


def _printable(text: str) -> str:
    """The first 200 characters, with what no file can hold shown as an escape."""
    return text[:200].encode("utf-8", "backslashreplace").decode()
