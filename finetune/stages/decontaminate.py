"""Drop training rows that share a long run of words with evaluation data, or ask the same by their vectors."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field

from finetune.context import Context, Metrics
from finetune.data.records import Example, Reject, read_rows, write_rows, write_table
from finetune.dedup.embedding_names import LSA, model_fingerprint
from finetune.errors import GateRefused, InputError
from finetune.recipe import Decontaminate, Recipe, Section, Source

WORD = re.compile(r"\w+")


class Spec(Section):
    """The decontaminate section, and the model whose vectors are compared where the recipe asks for that."""

    section: Decontaminate
    embedding: str | None = None
    folder: Annotated[Path | None, Field(exclude=True)] = None


def spec(recipe: Recipe) -> Spec | None:
    """Off unless the recipe names evaluation data."""
    section = recipe.decontaminate
    if section is None or section.embedding_threshold is None:
        return None if section is None else Spec(section=section)
    if recipe.dedup is None or recipe.dedup.embedding is None:
        return Spec(section=section, embedding=LSA)
    return Spec(section=section, embedding=recipe.dedup.embedding, folder=recipe.dedup.embedding_folder)


def fingerprint(spec: Spec) -> Mapping[str, object]:
    """Return the identity of the evaluation data (a file's digest, a Hub data set's commit, the Python that is
    documented), and the model whose vectors are compared.
    """
    from finetune.data.sources import source_fingerprint

    found: dict[str, object] = {"against": [source_fingerprint(source) for source in spec.section.against]}
    if spec.embedding is not None:
        found["model"] = model_fingerprint(spec.embedding, spec.folder)
    return found


def run(spec: Spec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Metrics:
    """Write rows.parquet, in order, and pairs.parquet: dropped_id, evaluation_id, method, score, words, text.

    By words: turns are compared as words (NFKC, case folded, punctuation left out), one turn at a time, whatever its
    role; a row is dropped when one of its turns shares `ngram` consecutive words with an evaluation turn
    (arXiv:2005.14165, appendix C). An evaluation question of fewer words matches a question that is the same as a
    whole; a short answer matches nothing. By embedding, where `embedding_threshold` is given: a row is dropped when the
    cosine of its question (all user turns) with that of an evaluation row reaches the threshold; the best is named.
    """
    import pyarrow as pa

    from finetune.data.formats import unique_labels

    section = spec.section
    index = NgramIndex(section.ngram)
    labels = unique_labels(source.label for source in section.against)
    questions: list[tuple[str, str]] = []
    for label, source in zip(labels, section.against, strict=True):
        for row in _evaluation_rows(source, label, ctx):
            index.add(row)
            questions.append((row.id, row.joined("user")))

    source_rows = inputs["dedup"] / "rows.parquet"
    found: dict[str, Match] = {}
    asked: dict[str, str] = {}  # the question of every row that shares no words
    for row in ctx.track(read_rows(source_rows), "compare"):
        match = index.match(row)
        if match is not None:
            found[row.id] = match
        else:
            asked[row.id] = row.joined("user") if spec.embedding is not None else ""
    rows_in, by_words = len(found) + len(asked), len(found)
    if spec.embedding is not None:
        found |= _alike(spec, asked, questions, ctx)
    if rows_in and len(found) == rows_in:
        raise GateRefused(_why_all(next(iter(found.values())), rows_in, section))
    listed = [row.id for row in read_rows(source_rows) if row.id in found]
    rows_out = write_rows(out / "rows.parquet", (row for row in read_rows(source_rows) if row.id not in found))
    columns: dict[str, Sequence[object]] = {
        "dropped_id": listed,
        "evaluation_id": [found[i].evaluation_id for i in listed],
        "method": ["words" if found[i].score is None else "embedding" for i in listed],
        "score": [found[i].score for i in listed],
        "words": [found[i].words for i in listed],
        "text": [found[i].text for i in listed],
    }
    write_table(out / "pairs.parquet", columns, dict.fromkeys(columns, pa.string()) | {"score": pa.float64()})
    return {
        "rows_in": rows_in,
        "rows_out": rows_out,
        "dropped": len(found),
        "words": by_words,
        "embedding": len(found) - by_words,
        "evaluation_rows": len(questions),
    }


def _alike(
    spec: Spec, asked: Mapping[str, str], questions: Sequence[tuple[str, str]], ctx: Context
) -> dict[str, Match]:
    """Row id -> the evaluation question that its own comes nearest to, where they reach the threshold."""
    from finetune.dedup.embed import embed
    from finetune.dedup.index import exact_search
    from finetune.dedup.select import links_between

    assert spec.embedding is not None and spec.section.embedding_threshold is not None  # noqa: S101 - the caller asked
    # Together, since LSA makes its vectors of the texts it is given.
    texts = [*asked.values(), *(text for _, text in questions)]
    made_by = model_fingerprint(spec.embedding, spec.folder)
    vectors = embed(texts, spec.embedding, ctx, spec.folder, made_by)
    left, right = vectors[: len(asked)], vectors[len(asked) :]
    new_search = exact_search(ctx.device, len(asked))
    rows, partners, scores = links_between(left, right, spec.section.embedding_threshold, new_search)
    ids = list(asked)
    return {
        ids[row]: Match(questions[partner][0], "", questions[partner][1], score)
        for row, partner, score in zip(rows.tolist(), partners.tolist(), scores.tolist(), strict=True)
    }


def _why_all(some: Match, rows: int, section: Decontaminate) -> str:
    how, setting = f"shares {section.ngram} words", "decontaminate.ngram"
    what = repr(some.words)
    if some.score is not None:
        how, setting = f"shares {section.ngram} words or its meaning", "decontaminate.embedding_threshold"
        what = f"at cosine {some.score:.3f}"
    return (
        f"decontaminate: every one of {rows} rows {how} with the evaluation data, the first one {what} with "
        f"{some.evaluation_id}; is decontaminate.against the training data itself, or does every row begin with the "
        f"same instruction? Name other data or raise {setting}"
    )


@dataclass(frozen=True, slots=True)
class Match:
    """The evaluation row a training row is like, the words they share, the evaluation turn, and the cosine if by it."""

    evaluation_id: str
    words: str
    text: str
    score: float | None = None


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
    from finetune.data.text import normalised

    return WORD.findall(normalised(text))


def _runs(words: list[str], size: int) -> Iterator[str]:
    window: deque[str] = deque(maxlen=size)
    for word in words:
        window.append(word)
        if len(window) == size:
            yield " ".join(window)


def _evaluation_rows(source: Source, label: str, ctx: Context) -> Iterator[Example]:
    """The rows of an evaluation source. Raises InputError for one that cannot be read: it would not be protected."""
    from finetune.data.sources import read_source

    _, rows = read_source(source, label, ctx.scratch, whole=False)
    for row in ctx.track(rows, f"read {label}", total=source.take):
        if isinstance(row, Reject):
            raise InputError(
                f"decontaminate.against: row {row.id} cannot be read, so nothing could be compared with it: "
                f"{row.detail}; fix the row, or leave it out with skip and take"
            )
        yield row
