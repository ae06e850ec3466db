"""Which of the curated rows are used: the sources' shares first, then at most one rule."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from finetune.context import Context
from finetune.data.records import Example, Reject, read_rows, reject_writer, write_rows
from finetune.errors import GateRefused, InputError
from finetune.metrics import Headline, SampleMetrics
from finetune.recipe import Recipe, Section

TOKENIZE_ROWS = 1000
COLUMN = "column:"

Pick = tuple[int, int]  # a row's number, and which copy of it, from 1


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The pool by the recipe's rule, best first; its metrics; each row's figure if one decides."""

    order: Sequence[Pick]
    limits: Mapping[str, object]
    figures: Sequence[float] = ()


class Spec(Section):
    """Weights and row counts by source name as in the row ids, the rule, and the seed of the choices."""

    seed: int
    weights: dict[str, float]
    rows: dict[str, int]
    top_k: int | None = None
    by: str = "tokens"
    random: int | None = None
    diverse: int | None = None
    clusters: int | None = None

    @property
    def limit(self) -> int | None:
        """How many rows the rule keeps."""
        return self.top_k or self.random or self.diverse


def spec(recipe: Recipe) -> Spec | None:
    """Off when every row is used once."""
    from finetune.data.formats import unique_labels

    labels = unique_labels(source.label for source in recipe.data)
    pairs = list(zip(labels, recipe.data, strict=True))
    weights = {label: source.weight for label, source in pairs if source.weight != 1}
    rows = {label: source.rows for label, source in pairs if source.rows is not None}
    rule = recipe.sample.model_dump() if recipe.sample else {}
    made = Spec(seed=0, weights=weights, rows=rows, **rule)
    if not weights and not rows and made.limit is None:
        return None
    # Who sees no choice depends on no seed.
    chooses = made.random or made.diverse or rows or any(w != int(w) for w in weights.values())
    return made.model_copy(update={"seed": recipe.seed}) if chooses else made


def fingerprint(spec: Spec) -> Mapping[str, object]:
    """Nothing outside the recipe and the inputs."""
    return {}


def run(spec: Spec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> SampleMetrics:
    """Write rows.parquet in the original order, copies of a row next to it with ids that end in ~2, ~3 and so on, and
    rejects.parquet: why a row is not used at all.

    A source of weight w gives round(w × rows) rows: whole copies of all, and one more of as many as are missing, chosen
    by a hash of seed and row id. A source with `rows` gives that many, chosen so; all if there are fewer. Then
    `random` keeps that many by such a hash; `top_k` those with the largest figure in a column, or with most tokens of
    the base's own tokenizer (the contents of all turns, no special tokens), the earlier row on a tie; `diverse` takes
    rows by turns from clusters of their vectors.
    """
    from finetune.dedup.select import copy_id

    source = inputs["decontaminate"] / "rows.parquet"
    names = [(row.id, row.source) for row in ctx.track(read_rows(source), "read rows")]
    copies = _copies(names, spec, ctx)
    pool = [(i, n) for i, count in enumerate(copies) for n in range(1, count + 1)]
    chosen, kept_by, ranking = pool, _by_source(names, copies, spec), Ranking(pool, {})
    if spec.limit is not None:
        if spec.limit < len(pool):
            ranking = _ranked(pool, names, spec, inputs, ctx)
            chosen = sorted(ranking.order[: spec.limit])
            kept_by |= ranking.limits
        elif spec.limit > len(pool):
            ctx.say(f"sample: {spec.limit} rows were asked for, there are {len(pool)}; all are used")
        kept_by["top_k" if spec.top_k else "random" if spec.random else "diverse"] = len(chosen)
    if not chosen:
        raise GateRefused(
            f"sample: none of {len(names)} rows is left; raise the sources' weight, or loosen filter and dedup"
        )
    numbers = Counter(i for i, _ in chosen)
    # Copies left over count from 1 again, so that the first is the row itself.
    rows_out = write_rows(
        out / "rows.parquet",
        (
            dataclasses.replace(row, id=copy_id(row.id, k))
            for i, row in enumerate(read_rows(source))
            for k in range(1, numbers[i] + 1)
        ),
    )
    with reject_writer(out / "rejects.parquet") as reject:
        for i, row in enumerate(read_rows(source)):
            if not numbers[i]:
                reject(_why_not(row, i, spec, ranking) if copies[i] else _why_none(row, spec))
    return {"rows_in": len(names), "rows_out": rows_out, "kept_by": kept_by}


def headline(m: SampleMetrics) -> Headline:
    """Return the row of this stage in a table of stages."""
    return Headline("", m["rows_in"], m["rows_out"])


def _why_none(row: Example, spec: Spec) -> Reject:
    """Why its source's share does not hold a row."""
    chosen = f"chosen by a hash of seed {spec.seed} and row id"
    if row.source in spec.rows:
        return Reject.of(row, "rows", f"not among the {spec.rows[row.source]} rows of {row.source}, {chosen}")
    weight = spec.weights[row.source]
    return Reject.of(row, "weight", f"not in the part of {row.source} that weight {weight:g} uses, {chosen}")


def _why_not(row: Example, place: int, spec: Spec, ranking: Ranking) -> Reject:
    """Why the rule does not take the row at `place`."""
    if spec.random:
        chosen = f"chosen by a hash of seed {spec.seed} and row id"
        return Reject.of(row, "random", f"not among the {spec.random} rows {chosen}")
    if spec.diverse:
        taken = "rows were taken before the turn of this one came in its cluster"
        return Reject.of(row, "diverse", f"{spec.diverse} {taken}")
    own, last = (ranking.figures[i] for i in (place, ranking.order[(spec.top_k or 1) - 1][0]))
    has, least = (None if math.isinf(f) else f for f in (own, last))
    values = ["none" if f is None else f"{f:g}" for f in (has, least)]
    detail = f"{spec.by} {values[0]}; the last of the {spec.top_k} rows that are used has {values[1]}"
    return Reject.of(row, "top_k", detail, has, least)


def _copies(names: Sequence[tuple[str, str]], spec: Spec, ctx: Context) -> list[int]:
    """How often each row (id, source) is used."""
    copies = [1] * len(names)
    for label in [*spec.weights, *spec.rows]:
        rows = [i for i, (_, source) in enumerate(names) if source == label]
        if label in spec.rows:
            total = min(spec.rows[label], len(rows))
            if total < spec.rows[label]:
                ctx.say(f"sample: {label} has {total} of the {spec.rows[label]} rows that were asked for")
        else:
            total = math.floor(spec.weights[label] * len(rows) + 0.5)
        whole, more = divmod(total, len(rows)) if rows else (0, 0)
        once_more = set(sorted(rows, key=lambda i: _hash(spec.seed, "weight", names[i][0]))[:more])
        for i in rows:
            copies[i] = whole + (i in once_more)
    return copies


def _by_source(names: Sequence[tuple[str, str]], copies: Sequence[int], spec: Spec) -> dict[str, object]:
    """Rows that each source with a weight, and each with a number of rows, gives."""
    counts: Counter[str] = Counter()
    for (_, source), count in zip(names, copies, strict=True):
        counts[source] += count
    figures: dict[str, object] = {"weight": {label: counts[label] for label in sorted(spec.weights)}}
    return figures | ({"rows": {label: counts[label] for label in sorted(spec.rows)}} if spec.rows else {})


def _ranked(
    pool: Sequence[Pick], names: Sequence[tuple[str, str]], spec: Spec, inputs: Mapping[str, Path], ctx: Context
) -> Ranking:
    """The pool by the recipe's rule, with the metrics of the last one that is kept."""
    from finetune.dedup.select import copy_id

    source = inputs["decontaminate"] / "rows.parquet"
    if spec.random:
        return Ranking(sorted(pool, key=lambda p: _hash(spec.seed, "random", copy_id(names[p[0]][0], p[1]))), {})
    if spec.diverse:
        return _spread(pool, [row_id for row_id, _ in names], spec, inputs["embed"], ctx)
    by_tokens = spec.by == "tokens"
    figures = _token_counts(source, inputs["base"], ctx) if by_tokens else _column(source, spec.by, ctx)
    ranked = sorted(pool, key=lambda p: (-figures[p[0]], p))
    last = figures[ranked[(spec.top_k or 1) - 1][0]]
    limits = {"fewest_tokens" if by_tokens else "lowest": last if math.isfinite(last) else None}
    return Ranking(ranked, limits, figures)


def _spread(pool: Sequence[Pick], ids: Sequence[str], spec: Spec, embedded: Path, ctx: Context) -> Ranking:
    """First copies by turns from the clusters, then second ones, and so on; the order of the rows does not matter."""
    from finetune.dedup.clusters import by_turns, cluster_count, clustered, vectors_of

    hashes = [_hash(spec.seed, "diverse", row_id) for row_id in ids]
    rows = sorted({i for i, _ in pool}, key=lambda i: hashes[i])
    vectors = vectors_of(embedded, [ids[i] for i in rows])
    if vectors is None:
        raise InputError(
            "sample.diverse needs vectors, and there are none; set dedup.embedding, or sample.diverse: null"
        )
    clusters = min(spec.clusters or cluster_count(len(rows), spec.diverse or 1), len(rows))
    cluster, distance = clustered(vectors, clusters, spec.seed, ctx.stop.check)
    order = by_turns(cluster.tolist(), distance.tolist(), [hashes[i] for i in rows])
    place = {rows[k]: turn for turn, k in enumerate(order)}
    ranked = sorted(pool, key=lambda p: (p[1], place[p[0]]))
    of = dict(zip(rows, cluster.tolist(), strict=True))
    seen = {of[i] for i, _ in ranked[: spec.limit]}
    return Ranking(ranked, {"clusters": len(set(of.values())), "clusters_kept": len(seen)})


def _token_counts(rows: Path, base: Path, ctx: Context) -> list[float]:
    """Tokens of every row of a rows file, by the tokenizer of a base folder."""
    from finetune.models.loading import load_tokenizer
    from finetune.tokenization.encoder import watched_batch

    tokenizer = load_tokenizer(base)

    def count(rows: list[Example]) -> list[float]:
        texts = [row.joined("system", "user", "assistant", "tool") for row in rows]
        return watched_batch(
            lambda batch: [len(ids) for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]],
            texts, [f"row {row.id}" for row in rows],
        )  # fmt: skip

    counts: list[float] = []
    batch: list[Example] = []
    for row in ctx.track(read_rows(rows), "count tokens"):
        batch.append(row)
        if len(batch) == TOKENIZE_ROWS:
            counts += count(batch)
            batch = []
    if batch:
        counts += count(batch)
    return counts


def _column(rows: Path, by: str, ctx: Context) -> list[float]:
    """The figure that each row has in the column of its source; a row without one ranks last."""
    name = by.removeprefix(COLUMN)
    figures = [_figure(row, name) for row in ctx.track(read_rows(rows), f"read {name}")]
    if figures and not any(math.isfinite(f) for f in figures):
        raise InputError(f"sample.by: no row has a figure in a column {name!r} that the format left over")
    return figures


def _figure(row: Example, name: str) -> float:
    """A number, or a text that is one, as every cell of a CSV file is."""
    value = row.column(name)
    try:
        figure = -math.inf if value is None or value == "" else float(value)
    except ValueError:
        raise InputError(
            f"sample.by: column {name!r} of row {row.id} is {value!r:.60}; only numbers can be ranked"
        ) from None
    return figure if math.isfinite(figure) else -math.inf


def _hash(seed: int, purpose: str, row_id: str) -> bytes:
    """A rank that depends on nothing but its arguments: a row keeps it when others come or go."""
    return hashlib.blake2b(f"{seed}\n{purpose}\n{row_id}".encode(), digest_size=16).digest()
