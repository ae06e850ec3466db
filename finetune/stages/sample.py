"""Which of the curated rows are used: source weights first, then at most one rule."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from finetune.context import Context, Metrics
from finetune.errors import GateRefused
from finetune.recipe import Recipe, Section
from finetune.records import Example, read_rows, write_rows

TOKENIZE_ROWS = 1000


class Spec(Section):
    """The weights by source name as in the row ids, the rule, and the seed of the choices."""

    seed: int
    weights: dict[str, float]
    top_k: int | None = None
    random: int | None = None


def spec(recipe: Recipe) -> Spec | None:
    """Off when every row is used once."""
    from finetune.data.formats import unique_labels

    labels = unique_labels(source.label for source in recipe.data)
    pairs = zip(labels, recipe.data, strict=True)
    weights = {label: source.weight for label, source in pairs if source.weight != 1}
    top_k, random = (recipe.sample.top_k, recipe.sample.random) if recipe.sample else (None, None)
    if not weights and top_k is None and random is None:
        return None
    # Who sees no choice depends on no seed.
    seed = recipe.seed if random is not None or any(w != int(w) for w in weights.values()) else 0
    return Spec(seed=seed, weights=weights, top_k=top_k, random=random)


def fingerprint(spec: Spec) -> Mapping[str, object]:
    """Nothing outside the recipe and the inputs."""
    return {}


def run(spec: Spec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Metrics:
    """Write rows.parquet in the original order, copies of a row next to it with ids that end in ~2, ~3 and so on.

    A source of weight w gives round(w × rows) rows: whole copies of all, and one more of as many as are missing, chosen
    by a hash of seed and row id. `random` then keeps that many by such a hash; `top_k` those with most tokens of the
    base's own tokenizer (the contents of all turns, no special tokens), the earlier row on a tie.
    """
    from finetune.data.near_duplicates import copy_id

    source = inputs["decontaminate"] / "rows.parquet"
    names = [(row.id, row.source) for row in ctx.track(read_rows(source), "read rows")]
    copies = _copies(names, spec)
    pool = [(i, n) for i, count in enumerate(copies) for n in range(1, count + 1)]
    kept_by: dict[str, object] = {"weight": dict(sorted(_by_source(names, copies, spec.weights).items()))}
    limit = spec.top_k or spec.random
    chosen = pool
    if limit is not None and limit < len(pool):
        if spec.top_k:
            lengths = _token_counts(source, inputs["base"], ctx)
            ranked = sorted(pool, key=lambda p: (-lengths[p[0]], p))
            kept_by["fewest_tokens"] = lengths[ranked[limit - 1][0]]
        else:
            ranked = sorted(pool, key=lambda p: _hash(spec.seed, "random", copy_id(names[p[0]][0], p[1])))
        chosen = sorted(ranked[:limit])
    elif limit is not None:
        ctx.say(f"sample: {limit} rows were asked for, there are {len(pool)}; all are used")
    if limit is not None:
        kept_by["top_k" if spec.top_k else "random"] = len(chosen)
    if not chosen:
        raise GateRefused(
            f"sample: none of {len(names)} rows is left; raise the sources' weight, or loosen filter and dedup"
        )
    numbers: dict[int, list[int]] = {}
    for i, n in chosen:
        numbers.setdefault(i, []).append(n)
    # Copies left over count from 1 again, so that the first is the row itself.
    rows_out = write_rows(
        out / "rows.parquet",
        (
            _renamed(row, copy_id(row.id, k))
            for i, row in enumerate(read_rows(source))
            for k in range(1, len(numbers.get(i, ())) + 1)
        ),
    )
    return {"rows_in": len(names), "rows_out": rows_out, "kept_by": kept_by}


def _copies(names: Sequence[tuple[str, str]], spec: Spec) -> list[int]:
    """How often each row (id, source) is used."""
    copies = [1] * len(names)
    for label, weight in spec.weights.items():
        rows = [i for i, (_, source) in enumerate(names) if source == label]
        total = math.floor(weight * len(rows) + 0.5)
        whole, more = divmod(total, len(rows)) if rows else (0, 0)
        once_more = set(sorted(rows, key=lambda i: _hash(spec.seed, "weight", names[i][0]))[:more])
        for i in rows:
            copies[i] = whole + (i in once_more)
    return copies


def _by_source(names: Sequence[tuple[str, str]], copies: Sequence[int], weights: Mapping[str, float]) -> Counter[str]:
    counts: Counter[str] = Counter(dict.fromkeys(weights, 0))
    for (_, source), count in zip(names, copies, strict=True):
        if source in weights:
            counts[source] += count
    return counts


def _token_counts(rows: Path, base: Path, ctx: Context) -> list[int]:
    """Tokens of every row of a rows file, by the tokenizer of a base folder."""
    from finetune.backends.models import load_tokenizer

    tokenizer = load_tokenizer(base)
    counts: list[int] = []
    batch: list[str] = []
    for row in ctx.track(read_rows(rows), "count tokens"):
        batch.append(row.joined("system", "user", "assistant", "tool"))
        if len(batch) == TOKENIZE_ROWS:
            counts += [len(ids) for ids in tokenizer(batch, add_special_tokens=False)["input_ids"]]
            batch = []
    if batch:
        counts += [len(ids) for ids in tokenizer(batch, add_special_tokens=False)["input_ids"]]
    return counts


def _hash(seed: int, purpose: str, row_id: str) -> bytes:
    """A rank that depends on nothing but its arguments: a row keeps it when others come or go."""
    return hashlib.blake2b(f"{seed}\n{purpose}\n{row_id}".encode(), digest_size=16).digest()


def _renamed(row: Example, row_id: str) -> Example:
    return dataclasses.replace(row, id=row_id)
