"""Sources of preference data as Pairs, and as Rejects with a reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import chain
from pathlib import Path

from finetune.context import Context
from finetune.data.files import skipped_files
from finetune.data.formats import FormatError
from finetune.data.records import Reject
from finetune.data.sources import converted, first_rows, place_of, raw_rows
from finetune.data.values import listed
from finetune.errors import InputError
from finetune.preference.formats import CURATED, Layout, decide_pairs, to_pairs
from finetune.preference.pydoc_pairs import pydoc_pairs
from finetune.preference.records import Pair
from finetune.recipe import LocalSource, PydocSource, Source

SHOWN_ROWS = 3
KIND = "kind"  # a column of the built-in pairs: it becomes part of the source's name, so that each kind is measured


def read_pairs(
    source: Source, label: str, scratch: Path, ignore: Collection[str], method: str
) -> tuple[Layout, Iterator[Pair | Reject]]:
    """Return how the source is read, and its rows in order: each a Pair (for kto two Pairs per pair), or a Reject.

    Raises InputError if the source as a whole cannot be read: no file, no format that fits, no rows.
    """
    builtin: Callable[[], Iterator[dict[str, object]]] = lambda: pydoc_pairs(source.format)  # noqa: E731
    raw = raw_rows(source, scratch, {}, builtin)
    head, sample = first_rows(raw, f"preference data {label}", source)
    try:
        layout = decide_pairs(source.format, source.columns, sample, ignore, method)
    except FormatError as error:
        raise InputError(f"preference data {label}: {error}{place_of(source)}") from error
    if isinstance(source, LocalSource) and (skipped := skipped_files(source.paths)):
        layout.notes[f"not read, by their names: {listed(skipped)}"] += len(skipped)

    def convert(row: dict[str, object], pair_id: str) -> list[Pair]:
        name = f"{label}/{row[KIND]}" if isinstance(source, PydocSource) else label
        return to_pairs(row, layout, pair_id, name, method)

    return layout, converted(chain(head, raw), label, convert)


class Reading:
    """Reads sources, and collects refused rows (not a pair) and left-out ones (a pair without a preference)."""

    def __init__(self, labels: Iterable[str], method: str, ignore: Collection[str]) -> None:
        """`labels`: the sources' names in row ids, in the order in which they will be read."""
        self._labels, self._method, self._ignore = iter(labels), method, ignore
        self.rows = 0  # pairs and rejects
        self.rejects: list[Reject] = []
        self.refused: Counter[str] = Counter()
        self.curated: Counter[str] = Counter()
        self.rows_of: dict[str, dict[str, int]] = {}
        self.formats: dict[str, str] = {}
        self.notes: dict[str, dict[str, int]] = {}

    def read(self, sources: Iterable[Source], ctx: Context) -> list[Pair]:
        """The pairs of some sources in order. Raises InputError if a source cannot be read."""
        pairs: list[Pair] = []
        for source in sources:
            label = next(self._labels)
            layout, rows = read_pairs(source, label, ctx.scratch, self._ignore, self._method)
            self.formats[label] = layout.format
            unused = f"; left out: {listed(layout.unused)}" if layout.unused else ""
            ctx.say(f"{label}: format {layout.format}, since {layout.why}{unused}")
            counts = self.rows_of.setdefault(label, {"rows": 0, "refused": 0})
            for row in ctx.track(rows, f"reading {label}", total=source.take):
                self.rows += 1
                if not isinstance(row, Reject):
                    counts["rows"] += 1
                    pairs.append(row)
                    continue
                self.rejects.append(row)
                (self.curated if row.reason in CURATED else self.refused)[row.reason] += 1
                counts["refused"] += 1
            if layout.notes:
                self.notes[label] = dict(sorted(layout.notes.items()))
            for note, rows_noted in sorted(layout.notes.items()):
                ctx.say(f"{label}: {note} ({rows_noted:,})")
        return pairs

    def check(self, allowed: float) -> None:
        """Raise InputError if a larger share of the rows than `allowed` are not pairs."""
        total = self.refused.total()
        if total > allowed * self.rows:
            first = [r for r in self.rejects if r.reason in self.refused][:SHOWN_ROWS]
            examples = " ".join(f"[{r.id}] {r.detail}." for r in first)
            raise InputError(
                f"preference.data: {total} of {self.rows} rows ({total / self.rows:.1%}) are not pairs; allowed are "
                f"{allowed:.1%} (ingest.max_refused_fraction). {examples} Fix those rows, or set the source's columns."
            )
