"""Drop rows that repeat another: by text, by wording, by cosine; every dropped row names the kept row it repeats."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from finetune.context import Context
from finetune.data.records import Example, RowRange, read_rows, row_ranges, write_rows, write_table
from finetune.errors import GateRefused, InputError
from finetune.metrics import DedupMetrics, Headline
from finetune.recipe import Dedup, Recipe, Section
from finetune.recipe import Jaccard as JaccardSection

PART_ROWS = 10_000
MEASURED_FROM = 100_000  # rows; tests compare fewer with brute force


class Spec(Section):
    """The dedup section without the embedding, whose vectors are an input."""

    exact: bool
    minhash: JaccardSection | None = None
    field: str
    threshold: float
    keep: str
    max_dropped_fraction: float = 1.0
    exhaustive: bool = False


def spec(recipe: Recipe) -> Spec | None:
    """Off when the recipe says so."""
    dedup: Dedup | None = recipe.dedup
    if dedup is None:
        return None
    return Spec(**dedup.model_dump(exclude={"embedding", "jaccard"}), minhash=dedup.jaccard)


def fingerprint(spec: Spec) -> Mapping[str, object]:
    """Nothing outside the recipe and the inputs."""
    return {}


def run(spec: Spec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> DedupMetrics:
    """Write rows.parquet in the original order and pairs.parquet, sorted as the rows are.

    All methods look at the chosen `field` only: the exact one compares its normalised text (NFKC, case folded,
    whitespace collapsed), and an empty text repeats nothing; the others reach their thresholds. Rows are taken the
    preferred first, and one is dropped exactly when a kept row repeats it by any method: no two rows that stay repeat
    each other, and `kept_id` always names a row that stays and reaches the method's threshold with that score. Of
    more than MEASURED_FROM rows a sample is compared with every kept one, and the metrics contain the recall; of
    more than LARGE_ROWS the cosine pairs are searched by cells (dedup/large.py) on a CPU, unless the recipe asks for
    every pair.
    """
    import numpy as np
    import pyarrow as pa

    from finetune.dedup.answers import AnswerCheck
    from finetune.dedup.index import exact_search
    from finetune.dedup.jaccard import Jaccard, row_sets
    from finetune.dedup.large import searched_by_cells, select_measured
    from finetune.dedup.measures import Cosine
    from finetune.dedup.recall import measured_recall
    from finetune.dedup.select import equal_texts, select

    source = inputs["filter"] / "rows.parquet"
    ids: list[str] = []
    keys: list[bytes] = []
    ranks: list[float] = []
    answers = AnswerCheck()
    parts = row_ranges(source, PART_ROWS)
    rows = parts[-1].stop if parts else 0
    for part in ctx.track(ctx.engine.map(partial(_facts, spec), parts, rows), "read rows", len(parts)):
        ids += part[0]
        keys += part[1]
        ranks += part[2]
        answers.add(part[3])
    answers.require_varied()
    if spec.keep.startswith("column:") and ids and not any(math.isfinite(r) for r in ranks):
        name = spec.keep.removeprefix("column:")
        raise InputError(f"dedup.keep: no row has a column {name!r} that the format left over; use longest or first")
    order = ctx.engine.sort(-np.array(ranks))
    known = equal_texts(keys, ctx.engine) if spec.exact else None
    words = []
    if (wording := spec.minhash) is not None:
        words.append(Jaccard(row_sets(parts, spec.field, wording.ngram, ctx.engine), wording.threshold))
    vectors = inputs["embed"] / "vectors.npy"
    measures: list[Cosine | Jaccard] = [*words]
    recall: dict[str, object] = {}
    if vectors.exists() and searched_by_cells(len(ids), ctx.device, spec.exhaustive):
        mapped = np.load(vectors, mmap_mode="r", allow_pickle=False)
        pairs, found_by_cells = select_measured(
            order, known, words, mapped, spec.threshold, ctx.say, ctx.stop.check, ctx.engine
        )
        recall = {"embedding": found_by_cells}
    else:
        if vectors.exists():
            search = exact_search(ctx.device, len(ids))
            measures.append(Cosine(np.load(vectors, allow_pickle=False), spec.threshold, search))
        pairs = select(order, known, measures, check=ctx.stop.check, engine=ctx.engine)
    pair_of = {pair.dropped: pair for pair in pairs}
    if len(pair_of) > spec.max_dropped_fraction * len(ids):
        raise GateRefused(
            f"{len(pair_of):,} of {len(ids):,} rows repeat the {spec.field} of another, more than "
            f"dedup.max_dropped_fraction {spec.max_dropped_fraction}; if answers are short and questions differ "
            "(labels, yes and no), compare both: dedup.field=both"
        )
    rows_out = write_rows(out / "rows.parquet", (row for i, row in enumerate(read_rows(source)) if i not in pair_of))
    listed = [pair_of[i] for i in sorted(pair_of)]
    write_table(
        out / "pairs.parquet",
        {
            "dropped_id": [ids[pair.dropped] for pair in listed],
            "kept_id": [ids[pair.kept] for pair in listed],
            "method": [pair.method for pair in listed],
            "score": [pair.score for pair in listed],
        },
        {"dropped_id": pa.string(), "kept_id": pa.string(), "method": pa.string(), "score": pa.float64()},
    )
    counts = Counter(pair.method for pair in listed)
    if len(ids) > MEASURED_FROM:
        recall = measured_recall(order, set(pair_of), known, measures, check=ctx.stop.check) | recall
    metrics: DedupMetrics = {
        "rows_in": len(ids),
        "rows_out": rows_out,
        "exact": counts["exact"],
        "minhash": counts["minhash"],
        "embedding": counts["embedding"],
    }
    return {**metrics, "recall": recall} if recall else metrics


def headline(m: DedupMetrics) -> Headline:
    """Return the row of this stage in a table of stages."""
    near = m["minhash"] + m["embedding"]
    return Headline(f"{m['exact']:,} exact, {near:,} near-duplicates dropped", m["rows_in"], m["rows_out"])


Facts = tuple[list[str], list[bytes], list[float], list[bytes]]
"""Ids, text keys, ranks and, if answers may be labels, the keys that `AnswerCheck` counts."""


def _facts(spec: Spec) -> Callable[[RowRange], Facts]:
    """Build the function from a range of rows to what this stage compares of them."""
    from finetune.data.text import field_text, text_key
    from finetune.dedup.answers import answer_key

    def facts(part: RowRange) -> Facts:
        rows = part.read()
        keys = [text_key(field_text(row, spec.field)) for row in rows]
        checked = rows if spec.field == "output" and spec.max_dropped_fraction < 1 else ()
        return [row.id for row in rows], keys, [_rank(row, spec.keep) for row in rows], [*map(answer_key, checked)]

    return facts


def _rank(row: Example, keep: str) -> float:
    """Rows of higher rank are preferred: the most characters, or the highest figure in a column (none ranks last)."""
    if keep == "first":
        return 0.0
    if keep == "longest":
        return float(len(row.joined("system", "user", "assistant", "tool")))
    name = keep.removeprefix("column:")
    value = row.column(name)
    if value is None:
        return -math.inf
    if not isinstance(value, int | float):
        raise InputError(f"dedup.keep: column {name!r} of row {row.id} is {value!r}; only numbers can be ranked")
    return float(value) if math.isfinite(value) else -math.inf
