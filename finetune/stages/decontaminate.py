"""Drop training rows that share a long run of words with evaluation data."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from finetune.context import Context, Metrics
from finetune.errors import GateRefused, InputError
from finetune.recipe import Decontaminate, Recipe, Source
from finetune.records import Example, Reject, read_rows, write_rows, write_table

WORD = re.compile(r"\w+")


def spec(recipe: Recipe) -> Decontaminate | None:
    """Off unless the recipe names evaluation data."""
    return recipe.decontaminate


def fingerprint(spec: Decontaminate) -> Mapping[str, object]:
    """What the evaluation data hold: a file's digest, a Hub data set's commit, the Python that is documented."""
    from finetune.backends.sources import source_fingerprint

    return {"against": [source_fingerprint(source) for source in spec.against]}


def run(spec: Decontaminate, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Metrics:
    """Write rows.parquet, in order, and pairs.parquet: dropped_id, evaluation_id, words (what both have), text.

    Turns are compared as words (NFKC, case folded, punctuation left out), one turn at a time, whatever its role: a row
    is dropped when one of its turns shares `ngram` consecutive words with an evaluation turn (arXiv:2005.14165,
    appendix C). An evaluation question of fewer words matches a question that is the same as a whole; a short answer
    matches nothing.
    """
    import pyarrow as pa

    from finetune.data.formats import unique_labels

    index = NgramIndex(spec.ngram)
    labels = unique_labels(source.label for source in spec.against)
    evaluation_rows = 0
    for label, source in zip(labels, spec.against, strict=True):
        for row in _evaluation_rows(source, label, ctx):
            index.add(row)
            evaluation_rows += 1

    source_rows = inputs["dedup"] / "rows.parquet"
    found: dict[str, Match] = {}
    rows_in = 0
    for row in ctx.track(read_rows(source_rows), "compare"):
        rows_in += 1
        match = index.match(row)
        if match is not None:
            found[row.id] = match
    if rows_in and len(found) == rows_in:
        some = next(iter(found.values()))
        raise GateRefused(
            f"decontaminate: every one of {rows_in} rows shares {spec.ngram} words with the evaluation data, the first "
            f"one {some.words!r} with {some.evaluation_id}; is decontaminate.against the training data itself, or does "
            "every row begin with the same instruction? Name other data or raise decontaminate.ngram"
        )
    rows_out = write_rows(out / "rows.parquet", (row for row in read_rows(source_rows) if row.id not in found))
    columns: dict[str, Sequence[object]] = {
        "dropped_id": list(found),
        "evaluation_id": [m.evaluation_id for m in found.values()],
        "words": [m.words for m in found.values()],
        "text": [m.text for m in found.values()],
    }
    write_table(out / "pairs.parquet", columns, dict.fromkeys(columns, pa.string()))
    return {"rows_in": rows_in, "rows_out": rows_out, "dropped": len(found), "evaluation_rows": evaluation_rows}


@dataclass(frozen=True, slots=True)
class Match:
    """The evaluation row a training row shares words with, those words, and the evaluation turn."""

    evaluation_id: str
    words: str
    text: str


@dataclass
class NgramIndex:
    """The runs of `size` words in evaluation texts; 16 bytes and a dictionary slot each, the texts once."""

    size: int
    _first: dict[int, int] = field(default_factory=dict)  # hash of a run -> turn
    _whole: dict[str, int] = field(default_factory=dict)  # a short question's words -> turn
    _turns: list[tuple[str, str, str]] = field(default_factory=list)  # (row id, text, its words between spaces)

    def add(self, row: Example) -> None:
        """Take in every turn of an evaluation row."""
        for is_question, text in _turns(row):
            words = _words(text)
            if len(words) < self.size and not (is_question and words):
                continue
            joined = " ".join(words)
            if len(words) < self.size:
                self._whole.setdefault(joined, len(self._turns))
            for run in _runs(words, self.size):
                self._first.setdefault(hash(run), len(self._turns))
            self._turns.append((row.id, text, f" {joined} "))

    def match(self, row: Example) -> Match | None:
        """The first run of words that `row` has in common with an evaluation row."""
        for is_question, text in _turns(row):
            words = _words(text)
            joined = " ".join(words)
            if is_question and joined in self._whole:
                row_id, found, _ = self._turns[self._whole[joined]]
                return Match(row_id, joined, found)
            for run in _runs(words, self.size):
                turn = self._first.get(hash(run))
                # Two runs may share a hash: the words themselves decide.
                if turn is not None and f" {run} " in self._turns[turn][2]:
                    row_id, found, _ = self._turns[turn]
                    return Match(row_id, run, found)
        return None


def _turns(row: Example) -> Iterator[tuple[bool, str]]:
    """(Is it a question, text) of every turn but the system's; a raw-text row is one question."""
    if row.text is not None:
        yield True, row.text
    for message in row.messages:
        if message.role != "system":
            yield message.role == "user", message.content


def _words(text: str) -> list[str]:
    from finetune.data.near_duplicates import normalised

    return WORD.findall(normalised(text))


def _runs(words: list[str], size: int) -> Iterator[str]:
    window: deque[str] = deque(maxlen=size)
    for word in words:
        window.append(word)
        if len(window) == size:
            yield " ".join(window)


def _evaluation_rows(source: Source, label: str, ctx: Context) -> Iterator[Example]:
    """The rows of an evaluation source. Raises InputError for one that cannot be read: it would not be protected."""
    from finetune.backends.sources import read_source

    _, rows = read_source(source, label, ctx.scratch)
    for row in ctx.track(rows, f"read {label}", total=source.take):
        if isinstance(row, Reject):
            raise InputError(
                f"decontaminate.against: row {row.id} cannot be read, so nothing could be compared with it: "
                f"{row.detail}; mend the row, or leave it out with skip and take"
            )
        yield row
