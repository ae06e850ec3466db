"""Drop training rows that repeat a row of eval_data, or that share a long run of words with evaluation data or ask the
same by their vectors.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from finetune.context import Context, Metrics
from finetune.data.records import ROLES, Example, Reject, read_rows, write_rows, write_table
from finetune.dedup.embedding_names import LSA, model_fingerprint
from finetune.errors import GateRefused, InputError
from finetune.recipe import Decontaminate, Dedup, Recipe, Section, Source
from finetune.recipe import Jaccard as JaccardSection

if TYPE_CHECKING:
    from finetune.dedup.measures import Measure

WORD = re.compile(r"\w+")


class Repeats(Section):
    """By what a training row repeats a held-out one: the dedup section's measures, or equal texts without them."""

    exact: bool = True
    minhash: JaccardSection | None = None
    field: Literal["instruction", "output", "both"] = "both"
    threshold: float = 1.0
    embedding: str | None = None
    folder: Annotated[Path | None, Field(exclude=True)] = None


class Spec(Section):
    """The decontaminate section with the model whose vectors it compares, and what counts as a repeat of eval_data."""

    section: Decontaminate | None
    embedding: str | None = None
    repeats: Repeats | None = None
    folder: Annotated[Path | None, Field(exclude=True)] = None


def spec(recipe: Recipe) -> Spec | None:
    """Off unless the recipe names evaluation data or has held-out rows of its own."""
    section = recipe.decontaminate
    repeats = _repeats(recipe.dedup) if recipe.eval_data else None
    if section is None and repeats is None:
        return None
    if section is None or section.embedding_threshold is None:
        return Spec(section=section, repeats=repeats)
    if recipe.dedup is None or recipe.dedup.embedding is None:
        return Spec(section=section, embedding=LSA, repeats=repeats)
    folder = recipe.dedup.embedding_folder
    return Spec(section=section, embedding=recipe.dedup.embedding, repeats=repeats, folder=folder)


def _repeats(dedup: Dedup | None) -> Repeats:
    if dedup is None:
        return Repeats()
    return Repeats(
        exact=dedup.exact,
        minhash=dedup.jaccard,
        field=dedup.field,
        threshold=dedup.threshold,
        embedding=dedup.embedding,
        folder=dedup.embedding_folder,
    )


def fingerprint(spec: Spec) -> Mapping[str, object]:
    """Return the identity of the evaluation data (a file's digest, a Hub data set's commit, the Python that is
    documented), and the model whose vectors are compared.
    """
    from finetune.data.sources import source_fingerprint

    digests_of: dict[str, object] = {}
    if spec.section is not None:
        digests_of["against"] = [source_fingerprint(source) for source in spec.section.against]
    if spec.embedding is not None:
        digests_of["model"] = model_fingerprint(spec.embedding, spec.folder)
    if spec.repeats is not None and spec.repeats.embedding is not None:
        digests_of["repeats_model"] = model_fingerprint(spec.repeats.embedding, spec.repeats.folder)
    return digests_of


def also(spec: Spec) -> tuple[str, ...]:
    """With held-out rows of the user's own, the stage that read them."""
    return ("ingest",) if spec.repeats is not None else ()


def run(spec: Spec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Metrics:
    """Write rows.parquet, in order, and pairs.parquet: dropped_id, evaluation_id, method, score, words, text.

    With `eval_data`, a row that repeats one of its rows by the dedup measures is dropped: exact, minhash, embedding.

    By words: turns are compared as words (NFKC, case folded, punctuation left out), one turn at a time, whatever its
    role; a row is dropped when one of its turns shares `ngram` consecutive words with an evaluation turn
    (arXiv:2005.14165, appendix C). An evaluation question of fewer words matches a question that is the same as a
    whole; a short answer matches nothing. By embedding, where `embedding_threshold` is given: a row is dropped when the
    cosine of its question (all user turns) with that of an evaluation row reaches the threshold; the best is named.
    """
    import pyarrow as pa

    source_rows = inputs["dedup"] / "rows.parquet"
    matches: dict[str, Match] = {}
    figures: dict[str, Any] = {}
    if spec.repeats is not None:
        matches, figures = _repeating(spec.repeats, source_rows, inputs["ingest"] / "eval.parquet", ctx)
    if spec.section is not None:
        figures |= _matching(spec, spec.section, source_rows, matches, ctx)
    listed = [row.id for row in read_rows(source_rows) if row.id in matches]
    rows_out = write_rows(out / "rows.parquet", (row for row in read_rows(source_rows) if row.id not in matches))
    columns: dict[str, Sequence[object]] = {
        "dropped_id": listed,
        "evaluation_id": [matches[i].evaluation_id for i in listed],
        "method": [matches[i].method for i in listed],
        "score": [matches[i].score for i in listed],
        "words": [matches[i].words for i in listed],
        "text": [matches[i].text for i in listed],
    }
    write_table(out / "pairs.parquet", columns, dict.fromkeys(columns, pa.string()) | {"score": pa.float64()})
    return {"rows_in": rows_out + len(matches), "rows_out": rows_out, "dropped": len(matches), **figures}


def _repeating(repeats: Repeats, source: Path, theirs: Path, ctx: Context) -> tuple[dict[str, Match], dict[str, Any]]:
    """Row id -> the held-out row of the user's that it repeats, and the figures."""
    import numpy as np

    from finetune.data.text import field_text, text_key
    from finetune.dedup.embed import embed
    from finetune.dedup.index import exact_search
    from finetune.dedup.jaccard import Jaccard, word_sets
    from finetune.dedup.measures import Cosine
    from finetune.dedup.select import repeats_of

    ids: list[str] = []
    texts: list[str] = []
    wholes: list[bytes] = []  # a row that is a held-out row is never trained on, whatever the measures are
    for row in chain(read_rows(source), read_rows(theirs)):
        ids.append(row.id)
        texts.append(field_text(row, repeats.field))
        wholes.append(text_key(row.joined(*ROLES)))
    held_out = sum(1 for _ in read_rows(theirs))
    ours = np.arange(len(ids) - held_out, dtype=np.int64)
    others = np.arange(len(ids) - held_out, len(ids), dtype=np.int64)
    measures: list[Measure] = []
    if repeats.minhash is not None:
        measures.append(Jaccard(word_sets(texts, repeats.minhash.ngram), repeats.minhash.threshold))
    if repeats.embedding is not None:
        # Together, since LSA makes its vectors of the texts it is given.
        made_by = model_fingerprint(repeats.embedding, repeats.folder)
        vectors = embed(texts, repeats.embedding, ctx, repeats.folder, made_by)
        measures.append(Cosine(vectors, repeats.threshold, exact_search(ctx.device, len(ids))))
    keys = [text_key(text) for text in texts] if repeats.exact else wholes
    pairs = {pair.dropped: pair for pair in repeats_of(ours, others, wholes, [])}
    pairs |= {pair.dropped: pair for pair in repeats_of(ours, others, keys, measures)}
    if len(ours) and len(pairs) == len(ours):
        raise GateRefused(
            f"decontaminate: every one of {len(ours):,} training rows repeats the {repeats.field} of a row of "
            f"eval_data (the first, {ids[0]}, that of {ids[pairs[0].kept]}); is eval_data the training data itself, or "
            "do only the answers repeat (labels, yes and no)? Name other rows, or compare both: dedup.field=both"
        )
    if pairs:
        ctx.say(f"decontaminate: {len(pairs):,} training rows repeat a row of eval_data and are left out")
    by = {name: sum(pair.method == name for pair in pairs.values()) for name in ("exact", "minhash", "embedding")}
    matches = {
        ids[row]: Match(ids[pair.kept], "", texts[pair.kept], pair.score, pair.method) for row, pair in pairs.items()
    }
    return matches, {
        "repeat_eval_data": {name: count for name, count in by.items() if count},
        "eval_data_rows": held_out,
    }


def _matching(
    spec: Spec, section: Decontaminate, source: Path, matches: dict[str, Match], ctx: Context
) -> dict[str, Any]:
    """Add the rows that share words or their meaning with `section.against` to `found`; returns the figures."""
    from finetune.data.formats import unique_labels

    index = NgramIndex(section.ngram)
    labels = unique_labels(source.label for source in section.against)
    questions: list[tuple[str, str]] = []
    for label, against in zip(labels, section.against, strict=True):
        for row in _evaluation_rows(against, label, ctx):
            index.add(row)
            questions.append((row.id, row.joined("user")))
    matched: dict[str, Match] = {}
    asked: dict[str, str] = {}  # the question of every row that shares no words
    for row in ctx.track((row for row in read_rows(source) if row.id not in matches), "compare"):
        match = index.match(row)
        if match is not None:
            matched[row.id] = match
        else:
            asked[row.id] = row.joined("user") if spec.embedding is not None else ""
    rows, by_words = len(matched) + len(asked), len(matched)
    if spec.embedding is not None and asked:
        matched |= _alike(spec, asked, questions, ctx)
    if rows and len(matched) == rows:
        raise GateRefused(_why_all(next(iter(matched.values())), rows, section))
    matches |= matched
    return {"words": by_words, "embedding": len(matched) - by_words, "evaluation_rows": len(questions)}


def _alike(
    spec: Spec, asked: Mapping[str, str], questions: Sequence[tuple[str, str]], ctx: Context
) -> dict[str, Match]:
    """Row id -> the evaluation question that its own comes nearest to, where they reach the threshold."""
    from finetune.dedup.embed import embed
    from finetune.dedup.index import exact_search
    from finetune.dedup.select import links_between

    threshold = spec.section.embedding_threshold if spec.section else None
    assert spec.embedding is not None and threshold is not None  # noqa: S101 - the caller asked
    # Together, since LSA makes its vectors of the texts it is given.
    texts = [*asked.values(), *(text for _, text in questions)]
    made_by = model_fingerprint(spec.embedding, spec.folder)
    vectors = embed(texts, spec.embedding, ctx, spec.folder, made_by)
    left, right = vectors[: len(asked)], vectors[len(asked) :]
    new_search = exact_search(ctx.device, len(asked))
    rows, partners, scores = links_between(left, right, threshold, new_search)
    ids = list(asked)
    return {
        ids[row]: Match(questions[partner][0], "", questions[partner][1], score, "embedding")
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
    """The evaluation row a training row is like, the words they share, the evaluation text, the score, the method."""

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
                row_id, matched, _ = self._turns[self._whole[joined]]
                return Match(row_id, joined, matched)
            for run in _runs(words, self.size):
                turn = self._first.get(hash(run))
                # Two runs may share a hash: the words themselves decide.
                if turn is not None and f" {run} " in self._turns[turn][2]:
                    row_id, matched, _ = self._turns[turn]
                    return Match(row_id, run, matched)
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
