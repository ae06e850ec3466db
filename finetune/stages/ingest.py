"""Read every source of the recipe into one file of rows; rows that do not fit are set aside with the reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path

from finetune.context import Context
from finetune.data.files import TRAINED_ON, evaluation_files
from finetune.data.formats import Decision, unique_labels
from finetune.data.records import Example, Reject, read_rows, reject_writer, write_rows
from finetune.data.sources import read_source, source_fingerprint
from finetune.data.values import listed
from finetune.errors import InputError
from finetune.metrics import Headline, IngestMetrics
from finetune.recipe import LocalSource, Recipe, Section, Source

HOPELESS_ROWS = 1000  # rows of a source refused and none read: the format is wrong, and the rest would be refused too
SHOWN_ROWS = 3


class Spec(Section):
    """The sources, without their weights and rows (those are applied after curation), and how strict reading is."""

    data: list[Source]
    max_refused_fraction: float
    ignore: tuple[str, ...] = ()
    eval_data: tuple[Source, ...] = ()


def spec(recipe: Recipe) -> Spec:
    """Ingest is never off."""
    data = [source.model_copy(update={"weight": 1.0, "rows": None}) for source in recipe.data]
    return Spec(
        data=data,
        max_refused_fraction=recipe.ingest.max_refused_fraction,
        ignore=tuple(sorted(set(recipe.ingest.ignore))),
        eval_data=tuple(recipe.eval_data or ()),
    )


def fingerprint(spec: Spec) -> dict[str, object]:
    """For each source, what its rows depend on: a file's name and digest, a commit of the Hub, a version of Python."""
    outside: dict[str, object] = {"sources": [source_fingerprint(source) for source in spec.data]}
    if spec.eval_data:
        outside["eval_sources"] = [source_fingerprint(source) for source in spec.eval_data]
    return outside


def run(spec: Spec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> IngestMetrics:
    """Write rows.parquet and refused.parquet; with `eval_data` its rows to eval.parquet, apart from the others.

    The rows of stage generate, if it is on, come behind those of the sources.

    Raises InputError if a source cannot be read, no row is left, or more than the allowed share is refused.
    """
    first: list[Reject] = []
    refused: Counter[str] = Counter()
    refused_of: Counter[str] = Counter()
    rows_of: Counter[str] = Counter()
    decisions: dict[str, Decision] = {}
    labels = unique_labels(source.label for source in (*spec.data, *spec.eval_data))
    named = list(zip(labels, (*spec.data, *spec.eval_data), strict=True))

    for line in _trained_on(named[: len(spec.data)]):
        ctx.say(line)

    def read(refuse: Callable[[Reject], None], sources: Iterable[tuple[str, Source]]) -> Iterator[Example]:
        for label, source in sources:
            decision, rows = read_source(source, label, ctx.scratch, spec.ignore)
            decisions[label] = decision
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
                _keep_first(first, row)
                _keep_first(here, row)
                if rows_of[label] == 0 and refused_of[label] >= HOPELESS_ROWS:
                    details = f"{_first(here)} {_read_as({label: decision})}"
                    raise InputError(f"data source {label}: none of its first rows fits. {details}")
            for note, rows_noted in sorted(decision.notes.items()):
                ctx.say(f"{label}: {note} ({rows_noted:,})")

    with reject_writer(out / "refused.parquet") as refuse:
        count = write_rows(
            out / "rows.parquet", chain(read(refuse, named[: len(spec.data)]), _generated(inputs, rows_of))
        )
        held_out = 0
        if spec.eval_data:
            held_out = write_rows(out / "eval.parquet", read(refuse, named[len(spec.data) :]))
    total, all_rows = refused.total(), count + held_out
    empty = [label for label in labels if not rows_of[label]]
    if (spec.data and not count) or (spec.eval_data and not held_out):
        raise InputError(f"no row could be read from {', '.join(empty)}. {_first(first)} {_read_as(decisions)}")
    fraction = total / (all_rows + total)
    if fraction > spec.max_refused_fraction:
        raise InputError(
            f"{total} of {all_rows + total} rows ({fraction:.1%}) do not fit their format, allowed are "
            f"{spec.max_refused_fraction:.1%} (ingest.max_refused_fraction). {_first(first)} {_read_as(decisions)}"
        )
    absent = set(spec.ignore) - {column for decision in decisions.values() for column in decision.known or ()}
    if absent:
        ctx.say(f"ingest.ignore: no source has a column {listed(sorted(absent))} in its first rows")
    metrics: IngestMetrics = {
        "rows_out": count,
        "sources": {
            label: {"rows": rows_of[label], "refused": refused_of[label]}
            for label in (*labels, *sorted({*rows_of} - {*labels}))
        },
        "refused": dict(sorted(refused.items())),
        "formats": {label: decision.format for label, decision in decisions.items()},
        "unused": {label: list(decision.unused) for label, decision in decisions.items() if decision.unused},
        "notes": {label: dict(sorted(d.notes.items())) for label, d in decisions.items() if d.notes},
    }
    return {**metrics, "eval_rows": held_out} if spec.eval_data else metrics


def headline(m: IngestMetrics) -> Headline:
    """Return the row of this stage in a table of stages."""
    refused = sum(m["refused"].values())
    return Headline(f"{refused:,} refused" if refused else "", None, m["rows_out"])


def _generated(inputs: Mapping[str, Path], rows_of: Counter[str]) -> Iterator[Example]:
    """The rows of stage generate, counted in `rows_of`; none if it is off."""
    for row in read_rows(inputs["generate"] / "rows.parquet") if "generate" in inputs else ():
        rows_of[row.source] += 1
        yield row


def _trained_on(sources: Iterable[tuple[str, Source]]) -> Iterator[str]:
    """A line for each source whose folder or pattern brings along files that are for evaluation by their names."""
    for label, source in sources:
        if isinstance(source, LocalSource) and (names := evaluation_files(source.paths)):
            yield f"{label}: {TRAINED_ON.format(listed(names))}"


def _read_as(decisions: Mapping[str, Decision]) -> str:
    """How each source was read, and what to do if that is wrong."""
    formats = ", ".join(f"{label} as {decision.format}" for label, decision in decisions.items())
    return f"(Read: {formats}. Fix those rows, or set the source's format and columns.)"


def _keep_first(examples: list[Reject], row: Reject) -> None:
    if len(examples) < SHOWN_ROWS:
        examples.append(row)


def _first(refused: list[Reject]) -> str:
    """The first few refused rows with their reasons."""
    return " ".join(f"[{r.id}] {r.detail}." for r in refused)
