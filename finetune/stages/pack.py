"""Lay whole rendered rows into rows of equal length, so that no compute is spent on padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from finetune.context import Context
from finetune.data.records import RowRange, write_table
from finetune.errors import FinetuneError
from finetune.metrics import Headline, PackMetrics
from finetune.recipe import Recipe, Section
from finetune.utils.files import write_json

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

PART_TOKENS = 1 << 24  # packed together
TOKEN_BYTES = 64  # of memory: 40 while it is packed, 8 in each of the results that wait


class Spec(Section):
    """How rows are packed."""

    method: Literal["bfd"]
    length_tokens: int


def spec(recipe: Recipe) -> Spec | None:
    """The pack section; its length is render's if it states none. None if packing is off or nothing is trained."""
    if recipe.pack is None or recipe.train is None:
        return None
    return Spec(method=recipe.pack.method, length_tokens=recipe.pack.length_tokens or recipe.render.max_length_tokens)


def fingerprint(spec: Spec) -> dict[str, object]:
    """Nothing outside the spec."""
    return {}


def run(spec: Spec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> PackMetrics:
    """Pack the training rows. Raises GateRefused if a row does not fit, or a packed row would have no label.

    Writes no packed rows for a base whose documents would see each other (models/trial.py): training then takes the
    rendered rows one by one.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from finetune.models.inventory import why_not_packed
    from finetune.tokenization.packing import lower_bound, packed_schema

    source = inputs["render"] / "train.parquet"
    sizes = pq.read_table(source, columns=["length"])["length"].to_numpy().astype(np.int64)
    why = why_not_packed(inputs["base"]) if "base" in inputs else None
    if why is not None:
        ctx.say(f"pack: off: {why}; rows are trained one by one")
        write_json(out / "packing.json", {"packing": why})
        return {"rows": len(sizes), "tokens": int(sizes.sum()), "off": why}
    parts = _parts(source, sizes)
    names: list[list[str]] = []
    lengths: list[int] = []
    with pq.ParquetWriter(out / "packed.parquet", packed_schema(), compression="zstd") as writer:
        largest = max((int(sizes[part.start : part.stop].sum()) for part in parts), default=0)
        done = ctx.engine.map(partial(_packer, spec.length_tokens), parts, len(sizes), TOKEN_BYTES * largest)
        for table, part_names in ctx.track(done, f"pack {len(sizes)} rows", len(parts)):
            writer.write_table(table)
            names += part_names
            lengths += [sum(each) for each in table["seq_lengths"].to_pylist()]
    if (packed := sum(map(len, names))) != len(sizes):
        raise FinetuneError(f"pack: {packed} documents are packed of {len(sizes)}; this is a fault of the program")
    write_table(out / "row_ids.parquet", {"row_ids": names}, {"row_ids": pa.list_(pa.string())})
    tokens, bins = sum(lengths), len(lengths)
    return {
        "efficiency": tokens / (bins * spec.length_tokens) if bins else 0.0,
        "bins": bins,
        "bins_at_least": lower_bound(sizes, spec.length_tokens),
        "tokens": tokens,
        "longest": max(lengths, default=0),
        "documents": len(sizes),
    }


def headline(m: PackMetrics) -> Headline:
    """Return the row of this stage in a table of stages."""
    return Headline() if "off" in m else Headline(f"{m['efficiency']:.1%} full", None, m["bins"])


def _parts(source: Path, sizes: NDArray[np.int64]) -> list[RowRange]:
    """Return the rows in ranges of PART_TOKENS tokens or up to a row more; one, if there are none."""
    import numpy as np

    part = np.cumsum(sizes) // PART_TOKENS
    edges = np.flatnonzero(np.r_[True, part[1:] != part[:-1], True]) if len(sizes) else np.zeros(2, np.int64)
    return [RowRange(source, start, stop) for start, stop in pairwise(edges.tolist())]


def _packer(length: int) -> Callable[[RowRange], tuple[pa.Table, list[list[str]]]]:
    """Build the function that packs a range of rows into bins of `length` tokens, with the ids of each bin's rows."""
    from finetune.tokenization.packing import pack

    def packed(part: RowRange) -> tuple[pa.Table, list[list[str]]]:
        rows = part.table(["id", "input_ids", "mask"]).combine_chunks()
        ids = rows["id"].to_pylist()
        found = pack(rows["input_ids"].combine_chunks(), rows["mask"].combine_chunks(), length, part.start)
        return found.table, [[ids[i] for i in documents] for documents in found.documents]

    return packed
