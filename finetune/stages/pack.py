"""Lay whole rendered rows into rows of equal length, so that no compute is spent on padding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from finetune.context import Context
from finetune.metrics import Headline, PackMetrics
from finetune.recipe import Recipe, Section


class Spec(Section):
    """How rows are packed."""

    method: Literal["bfd"]
    length_tokens: int


def spec(recipe: Recipe) -> Spec | None:
    """The pack section; its length is render's where it states none. None if packing is off or nothing is trained."""
    if recipe.pack is None or recipe.train is None:
        return None
    return Spec(method=recipe.pack.method, length_tokens=recipe.pack.length_tokens or recipe.render.max_length_tokens)


def fingerprint(spec: Spec) -> dict[str, object]:
    """Nothing outside the spec."""
    return {}


def run(spec: Spec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> PackMetrics:
    """Pack the training rows. Raises GateRefused where a row does not fit, or a packed row would have no label.

    Writes no packed rows for a base whose documents would see each other (models/trial.py): training then takes the
    rendered rows one by one.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from finetune.data.records import write_table
    from finetune.models.inventory import why_not_packed
    from finetune.tokenization.packing import lower_bound, pack
    from finetune.utils.files import write_json

    why = why_not_packed(inputs["base"]) if "base" in inputs else None
    if why is not None:
        ctx.say(f"pack: off: {why}; rows are trained one by one")
        write_json(out / "packing.json", {"packing": why})
        lengths = pq.read_table(inputs["render"] / "train.parquet", columns=["input_ids"])["input_ids"]
        return {"rows": len(lengths), "tokens": int(pc.sum(pc.list_value_length(lengths)).as_py() or 0), "off": why}
    rows = pq.read_table(inputs["render"] / "train.parquet", columns=["id", "input_ids", "mask"]).combine_chunks()
    ids = rows["id"].to_pylist()
    bar = ctx.bar(f"pack {len(ids)} rows", 1)
    try:
        packed = pack(rows["input_ids"].combine_chunks(), rows["mask"].combine_chunks(), spec.length_tokens)
        bar.advance()
    finally:
        bar.close()
    ctx.stop.check()
    pq.write_table(packed.table, out / "packed.parquet", compression="zstd")
    names = [[ids[i] for i in documents] for documents in packed.documents]
    write_table(out / "row_ids.parquet", {"row_ids": names}, {"row_ids": pa.list_(pa.string())})
    lengths = [sum(lengths) for lengths in packed.table["seq_lengths"].to_pylist()]
    tokens, bins = sum(lengths), len(lengths)
    sizes = np.diff(rows["input_ids"].combine_chunks().offsets.to_numpy())
    return {
        "efficiency": tokens / (bins * spec.length_tokens) if bins else 0.0,
        "bins": bins,
        "bins_at_least": lower_bound(sizes, spec.length_tokens),
        "tokens": tokens,
        "longest": max(lengths, default=0),
        "documents": len(ids),
    }


def headline(m: PackMetrics) -> Headline:
    """Return the row of this stage in a table of stages."""
    return Headline() if "off" in m else Headline(f"{m['efficiency']:.1%} full", None, m["bins"])
