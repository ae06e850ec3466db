"""Drop rows that repeat another: by text, then by cosine; every dropped row names the kept row it repeats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.context import Context, Metrics
from finetune.errors import GateRefused, InputError
from finetune.recipe import Dedup, Recipe, Section
from finetune.records import Example, read_rows, write_rows, write_table

if TYPE_CHECKING:
    from finetune.data.near_duplicates import Pair


class Spec(Section):
    """The dedup section without the embedding, whose vectors are an input."""

    exact: bool
    field: str
    threshold: float
    keep: str
    max_dropped_fraction: float = 1.0


def spec(recipe: Recipe) -> Spec | None:
    """Off when the recipe says so."""
    dedup: Dedup | None = recipe.dedup
    if dedup is None:
        return None
    return Spec(**dedup.model_dump(exclude={"embedding"}))


def fingerprint(spec: Spec) -> Mapping[str, object]:
    """Nothing outside the recipe and the inputs."""
    return {}


def run(spec: Spec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Metrics:
    """Write rows.parquet in the original order and pairs.parquet, sorted as the rows are.

    Both methods look at the chosen `field` only: the exact one compares its normalised text (NFKC, case folded,
    whitespace collapsed), and an empty text repeats nothing. `kept_id` always names a row that stays: the best-scoring
    one among those preferred to the dropped row. Where the twin of an exact duplicate was itself dropped by cosine,
    the twin's own kept row and score are named, and the method is exact still.
    """
    import numpy as np
    import pyarrow as pa

    from finetune.backends.search import FlatIndex
    from finetune.data.near_duplicates import exact_duplicates, field_text, near_duplicates, text_key

    source = inputs["filter"] / "rows.parquet"
    ids: list[str] = []
    keys: list[bytes] = []
    ranks: list[float] = []
    for row in ctx.track(read_rows(source), "read rows"):
        ids.append(row.id)
        keys.append(text_key(field_text(row, spec.field)))
        ranks.append(_rank(row, spec.keep))
    if spec.keep.startswith("column:") and ids and not any(math.isfinite(r) for r in ranks):
        name = spec.keep.removeprefix("column:")
        raise InputError(f"dedup.keep: no row has a column {name!r} that the format left over; use longest or first")
    order = sorted(range(len(ids)), key=lambda i: (-ranks[i], i))
    exact = exact_duplicates(keys, order) if spec.exact else []
    repeated = {pair.dropped for pair in exact}
    near: list[Pair] = []
    if (inputs["embed"] / "vectors.npy").exists():
        vectors = np.load(inputs["embed"] / "vectors.npy", allow_pickle=False)
        left = [i for i in order if i not in repeated]
        near = near_duplicates(vectors, left, spec.threshold, FlatIndex, check=ctx.stop.check)

    found = _resolved(exact, near)
    if len(found) > spec.max_dropped_fraction * len(ids):
        raise GateRefused(
            f"{len(found):,} of {len(ids):,} rows repeat the {spec.field} of another, more than "
            f"dedup.max_dropped_fraction {spec.max_dropped_fraction}; where answers are short and questions differ "
            "(labels, yes and no), compare both: dedup.field=both"
        )
    rows = (row for i, row in enumerate(read_rows(source)) if i not in found)
    rows_out = write_rows(out / "rows.parquet", rows)
    listed = sorted(found)
    write_table(
        out / "pairs.parquet",
        {
            "dropped_id": [ids[i] for i in listed],
            "kept_id": [ids[found[i].kept] for i in listed],
            "method": ["exact" if i in repeated else "embedding" for i in listed],
            "score": [found[i].score for i in listed],
        },
        {"dropped_id": pa.string(), "kept_id": pa.string(), "method": pa.string(), "score": pa.float64()},
    )
    return {"rows_in": len(ids), "rows_out": rows_out, "exact": len(exact), "embedding": len(near)}


def _resolved(exact: Sequence[Pair], near: Sequence[Pair]) -> dict[int, Pair]:
    """Dropped row -> its pair, led on from a twin that was dropped itself (by cosine) to the row that was kept."""
    from finetune.data.near_duplicates import Pair

    found = {pair.dropped: pair for pair in near}
    led_on = {}
    for pair in exact:
        further = found.get(pair.kept)
        led_on[pair.dropped] = Pair(pair.dropped, further.kept, further.score) if further else pair
    return found | led_on


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
