"""Find training rows that share a run of words with evaluation data, or whose questions have similar vectors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field

from finetune.context import Context
from finetune.data.formats import unique_labels
from finetune.data.records import Example, Reject
from finetune.data.sources import read_source, source_fingerprint
from finetune.data.text import word_runs, words
from finetune.dedup.embedding_names import LSA, model_fingerprint
from finetune.errors import InputError
from finetune.recipe import Decontaminate, Recipe, Section, Source


class Against(Section):
    """The decontaminate section with the model whose vectors it compares; None: by words only."""

    section: Decontaminate
    embedding: str | None = None
    folder: Annotated[Path | None, Field(exclude=True)] = None

    @classmethod
    def of(cls, recipe: Recipe) -> Against | None:
        """Return the recipe's evaluation data and measures; None without a decontaminate section."""
        section, dedup = recipe.decontaminate, recipe.dedup
        if section is None or section.embedding_threshold is None:
            return None if section is None else cls(section=section)
        if dedup is None or dedup.embedding is None:
            return cls(section=section, embedding=LSA)
        return cls(section=section, embedding=dedup.embedding, folder=dedup.embedding_folder)

    def fingerprint(self) -> dict[str, object]:
        """Return the identity of the evaluation data (a file's digest, a Hub data set's commit, the Python that is
        documented), and of the model whose vectors are compared.
        """
        found: dict[str, object] = {"against": [source_fingerprint(source) for source in self.section.against]}
        if self.embedding is not None:
            found["model"] = model_fingerprint(self.embedding, self.folder)
        return found


@dataclass(frozen=True)
class Overlaps:
    """Row id -> its matching evaluation row; number of rows compared, and of evaluation rows read."""

    matches: Mapping[str, Match]
    rows: int
    evaluation_rows: int


def find_overlaps(asked: Against, rows: Iterable[Example], ctx: Context) -> Overlaps:
    """Compare `rows` with the evaluation data by words, and those that share none by the vectors of their questions.

    Raises InputError for evaluation data that cannot be read.
    """
    section = asked.section
    index = NgramIndex(section.ngram)
    labels = unique_labels(source.label for source in section.against)
    questions: list[tuple[str, str]] = []
    for label, against in zip(labels, section.against, strict=True):
        for row in _evaluation_rows(against, label, ctx):
            index.add(row)
            questions.append((row.id, row.joined("user")))
    matched: dict[str, Match] = {}
    unlike: dict[str, str] = {}  # the question of every row that shares no words
    for row in ctx.track(rows, "compare"):
        match = index.match(row)
        if match is not None:
            matched[row.id] = match
        else:
            unlike[row.id] = row.joined("user") if asked.embedding is not None else ""
    count = len(matched) + len(unlike)
    if asked.embedding is not None and unlike:
        matched |= _alike(asked, unlike, questions, ctx)
    return Overlaps(matched, count, len(questions))


def _alike(
    against: Against, asked: Mapping[str, str], questions: Sequence[tuple[str, str]], ctx: Context
) -> dict[str, Match]:
    """Return row id -> its nearest evaluation question, if the similarity reaches the threshold."""
    from finetune.dedup.embed import embed
    from finetune.dedup.index import exact_search
    from finetune.dedup.select import links_between

    threshold = against.section.embedding_threshold
    assert against.embedding is not None and threshold is not None  # noqa: S101 - the caller asked
    # Together, since LSA makes its vectors of the texts it is given.
    texts = [*asked.values(), *(text for _, text in questions)]
    made_by = model_fingerprint(against.embedding, against.folder)
    vectors = embed(texts, against.embedding, ctx, against.folder, made_by)
    left, right = vectors[: len(asked)], vectors[len(asked) :]
    new_search = exact_search(ctx.device, len(asked))
    rows, partners, scores = links_between(left, right, threshold, new_search)
    ids = list(asked)
    return {
        ids[row]: Match(questions[partner][0], "", questions[partner][1], score, "embedding")
        for row, partner, score in zip(rows.tolist(), partners.tolist(), scores.tolist(), strict=True)
    }


@dataclass(frozen=True, slots=True)
class Match:
    """A matching evaluation row: its id, the words in common, its text, the score, the method."""

    evaluation_id: str
    words: str
    text: str
    score: float | None = None
    method: str = "words"


@dataclass
class NgramIndex:
    """The runs of `size` words in evaluation texts; 16 bytes and a dictionary slot each, the texts once."""

    size: int
    _first: dict[int, int] = field(default_factory=dict)  # hash of a run -> turn
    _whole: dict[str, int] = field(default_factory=dict)  # a short question's words -> turn
    _turns: list[tuple[str, str, str]] = field(default_factory=list)  # (row id, text, its words between spaces)

    def add(self, row: Example) -> None:
        """Add every turn of an evaluation row."""
        for is_question, text in _turns(row):
            spoken = words(text)
            if len(spoken) < self.size and not (is_question and spoken):
                continue
            joined = " ".join(spoken)
            if len(spoken) < self.size:
                self._whole.setdefault(joined, len(self._turns))
            for run in word_runs(spoken, self.size):
                self._first.setdefault(hash(run), len(self._turns))
            self._turns.append((row.id, text, f" {joined} "))

    def match(self, row: Example) -> Match | None:
        """The first run of words that `row` has in common with an evaluation row."""
        for is_question, text in _turns(row):
            spoken = words(text)
            joined = " ".join(spoken)
            if is_question and joined in self._whole:
                row_id, found, _ = self._turns[self._whole[joined]]
                return Match(row_id, joined, found)
            for run in word_runs(spoken, self.size):
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


def _evaluation_rows(source: Source, label: str, ctx: Context) -> Iterator[Example]:
    """The rows of an evaluation source. Raises InputError for one that cannot be read: it would not be protected."""
    _, rows = read_source(source, label, ctx.scratch, whole=False)
    for row in ctx.track(rows, f"read {label}", total=source.take):
        if isinstance(row, Reject):
            raise InputError(
                f"decontaminate.against: row {row.id} cannot be read, so nothing could be compared with it: "
                f"{row.detail}; fix the row, or leave it out with skip and take"
            )
        yield row
