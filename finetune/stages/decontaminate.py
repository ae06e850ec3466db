"""Drop training rows that repeat a row of eval_data, or that share a long run of words with evaluation data or ask the
same by their vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from finetune.context import Context
from finetune.data.records import ROLES, read_rows, write_rows, write_table
from finetune.dedup.embedding_names import model_fingerprint
from finetune.errors import GateRefused
from finetune.filters.overlap import Against, Match, find_overlaps
from finetune.metrics import DecontaminateMetrics, Headline
from finetune.recipe import Decontaminate, Dedup, Recipe, Section
from finetune.recipe import Jaccard as JaccardSection

if TYPE_CHECKING:
    from finetune.dedup.measures import Measure


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

    @property
    def against(self) -> Against | None:
        """The evaluation data and how rows are compared with it."""
        if self.section is None:
            return None
        return Against(section=self.section, embedding=self.embedding, folder=self.folder)


def spec(recipe: Recipe) -> Spec | None:
    """Off unless the recipe names evaluation data or has held-out rows of its own."""
    against = Against.of(recipe)
    repeats = _repeats(recipe.dedup) if recipe.eval_data else None
    if against is None:
        return None if repeats is None else Spec(section=None, repeats=repeats)
    return Spec(section=against.section, embedding=against.embedding, repeats=repeats, folder=against.folder)


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
    """Return the identity of the evaluation data, and the models whose vectors are compared."""
    digests_of = {} if spec.against is None else spec.against.fingerprint()
    if spec.repeats is not None and spec.repeats.embedding is not None:
        digests_of["repeats_model"] = model_fingerprint(spec.repeats.embedding, spec.repeats.folder)
    return digests_of


def also(spec: Spec) -> tuple[str, ...]:
    """With held-out rows of the user's own, the stage that read them."""
    return ("ingest",) if spec.repeats is not None else ()


def run(spec: Spec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> DecontaminateMetrics:
    """Write rows.parquet, in order, and pairs.parquet: dropped_id, evaluation_id, method, score, words, text.

    With `eval_data`, a row that repeats one of its rows by the dedup measures is dropped: exact, minhash, embedding.

    By words: turns are compared as words (NFKC, case folded, punctuation left out), one turn at a time, whatever its
    role; a row is dropped when one of its turns shares `ngram` consecutive words with an evaluation turn
    (arXiv:2005.14165, appendix C). An evaluation question of fewer words matches a question that is the same as a
    whole; a short answer matches nothing. By embedding, if `embedding_threshold` is given: a row is dropped when the
    cosine of its question (all user turns) with that of an evaluation row reaches the threshold; the best is named.
    """
    import pyarrow as pa

    source_rows = inputs["dedup"] / "rows.parquet"
    matches: dict[str, Match] = {}
    figures: DecontaminateMetrics = {}
    if spec.repeats is not None:
        matches, figures = _repeating(spec.repeats, source_rows, inputs["ingest"] / "eval.parquet", ctx)
    if spec.against is not None:
        figures = {**figures, **_matching(spec.against, source_rows, matches, ctx)}
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


def headline(m: DecontaminateMetrics) -> Headline:
    """Return the row of this stage in a table of stages."""
    return Headline("", m["rows_in"], m["rows_out"])


def _repeating(
    repeats: Repeats, source: Path, theirs: Path, ctx: Context
) -> tuple[dict[str, Match], DecontaminateMetrics]:
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
        measures.append(Jaccard(word_sets(texts, repeats.minhash.ngram, ctx.engine), repeats.minhash.threshold))
    if repeats.embedding is not None:
        # Together, since LSA makes its vectors of the texts it is given.
        made_by = model_fingerprint(repeats.embedding, repeats.folder)
        vectors = embed(texts, repeats.embedding, ctx, repeats.folder, made_by)
        measures.append(Cosine(vectors, repeats.threshold, exact_search(ctx.device, len(ids))))
    keys = [text_key(text) for text in texts] if repeats.exact else wholes
    pairs = {pair.dropped: pair for pair in repeats_of(ours, others, wholes, [])}
    pairs |= {pair.dropped: pair for pair in repeats_of(ours, others, keys, measures, ctx.engine)}
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


def _matching(asked: Against, source: Path, matches: dict[str, Match], ctx: Context) -> DecontaminateMetrics:
    """Add the rows that share words or their meaning with the evaluation data to `found`; returns the figures."""
    overlaps = find_overlaps(asked, (row for row in read_rows(source) if row.id not in matches), ctx)
    matched = overlaps.matches
    if overlaps.rows and len(matched) == overlaps.rows:
        raise GateRefused(_why_all(next(iter(matched.values())), overlaps.rows, asked.section))
    matches |= matched
    by_words = sum(match.method == "words" for match in matched.values())
    return {"words": by_words, "embedding": len(matched) - by_words, "evaluation_rows": overlaps.evaluation_rows}


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
