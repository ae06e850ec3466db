"""Read every source of the recipe into one file of rows; rows that do not fit are set aside with the reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from finetune.context import Context, Metrics
from finetune.data.formats import listed, unique_labels
from finetune.data.records import Example, Reject, reject_writer, write_rows
from finetune.data.sources import read_source, source_fingerprint
from finetune.errors import InputError
from finetune.recipe import Recipe, Section, Source

HOPELESS_ROWS = 1000  # so many rows of a source refused and none read: the format is wrong, the rest is the same
SHOWN_ROWS = 3


class Spec(Section):
    """The sources, without their weights and rows (those are applied after curation), and how strict reading is."""

    data: list[Source]
    max_refused_fraction: float


def spec(recipe: Recipe) -> Spec:
    """Ingest is never off."""
    data = [source.model_copy(update={"weight": 1.0, "rows": None}) for source in recipe.data]
    return Spec(data=data, max_refused_fraction=recipe.ingest.max_refused_fraction)


def fingerprint(spec: Spec) -> dict[str, object]:
    """For each source, what its rows depend on: a file's name and digest, a commit of the Hub, a version of Python."""
    return {"sources": [source_fingerprint(source) for source in spec.data]}


def run(spec: Spec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Metrics:
    """Write rows.parquet and refused.parquet.

    Raises InputError where a source cannot be read, no row is left, or more than the allowed share is refused.
    """
    first: list[Reject] = []
    refused: Counter[str] = Counter()
    refused_of: Counter[str] = Counter()
    rows_of: Counter[str] = Counter()
    formats: dict[str, str] = {}
    labels = unique_labels(source.label for source in spec.data)

    def read(refuse: Callable[[Reject], None]) -> Iterator[Example]:
        for source, label in zip(spec.data, labels, strict=True):
            decision, rows = read_source(source, label, ctx.scratch)
            formats[label] = decision.format
            unused = f"; kept beside the text or left out: {listed(decision.unused)}" if decision.unused else ""
            ctx.say(f"{label}: format {decision.format}, since {decision.why}{unused}")
            here: list[Reject] = []
            for row in ctx.track(rows, f"reading {label}", total=source.take):
                if isinstance(row, Example):
                    rows_of[label] += 1
                    yield row
                    continue
                refuse(row)
                refused[row.reason] += 1
                refused_of[label] += 1
                first.extend([row] * (len(first) < SHOWN_ROWS))
                here.extend([row] * (len(here) < SHOWN_ROWS))
                if rows_of[label] == 0 and refused_of[label] >= HOPELESS_ROWS:
                    shown = f"{_first(here)} {_read_as({label: decision.format})}"
                    raise InputError(f"data source {label}: none of its first rows fits. {shown}")

    with reject_writer(out / "refused.parquet") as refuse:
        count = write_rows(out / "rows.parquet", read(refuse))
    total = refused.total()
    if not count:
        raise InputError(f"no row could be read from {', '.join(labels)}. {_first(first)} {_read_as(formats)}")
    fraction = total / (count + total)
    if fraction > spec.max_refused_fraction:
        raise InputError(
            f"{total} of {count + total} rows ({fraction:.1%}) do not fit their format, allowed are "
            f"{spec.max_refused_fraction:.1%} (ingest.max_refused_fraction). {_first(first)} {_read_as(formats)}"
        )
    return {
        "rows_out": count,
        "sources": {label: {"rows": rows_of[label], "refused": refused_of[label]} for label in labels},
        "refused": dict(sorted(refused.items())),
        "formats": formats,
    }


def _read_as(formats: Mapping[str, str]) -> str:
    """How each source was read, and what to do where that is wrong."""
    shown = ", ".join(f"{label} as {format_}" for label, format_ in formats.items())
    return f"(Read: {shown}. Mend those rows, or set the source's format and columns.)"


def _first(refused: list[Reject]) -> str:
    """The first few refused rows with their reasons."""
    return " ".join(f"[{r.id}] {r.detail}." for r in refused)
