"""Rendered rows, as the stages after render read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq


@dataclass(frozen=True)
class TokenRow:
    """One rendered row: `ids` int64 (T,), `mask` bool (T,), True where the token is supervised."""

    id: str
    ids: np.ndarray
    mask: np.ndarray

    @property
    def answer_start(self) -> int:
        """Where the last supervised span begins: everything before it is the prompt of the last answer."""
        inside = np.flatnonzero(self.mask)
        gaps = np.flatnonzero(np.diff(inside) > 1)
        return int(inside[gaps[-1] + 1] if len(gaps) else inside[0])


def read_rendered(path: Path) -> pa.Table:
    """A rendered file as a table of `input_ids` and `labels` (list<int32>; -100 where not supervised)."""
    table = pq.read_table(path, columns=["input_ids", "mask"])
    ids, mask = table["input_ids"].combine_chunks(), table["mask"].combine_chunks()
    labels = pc.if_else(pc.equal(mask.flatten(), 1), ids.flatten(), pa.scalar(-100, pa.int32()))
    return pa.table({"input_ids": ids, "labels": pa.ListArray.from_arrays(ids.offsets, labels.cast(pa.int32()))})


def read_token_rows(path: Path, limit: int | None = None, *, whole: bool = True) -> list[TokenRow]:
    """The first `limit` rows with a supervised token; `whole` leaves out the rows that were cut to fit."""
    table = pq.read_table(path, columns=["id", "input_ids", "mask", "truncated"])
    rows = []
    for batch in table.to_batches(max_chunksize=1000):
        for row in batch.to_pylist():
            if (whole and row["truncated"]) or not any(row["mask"]):
                continue
            rows.append(TokenRow(row["id"], np.array(row["input_ids"]), np.array(row["mask"], dtype=bool)))
            if limit is not None and len(rows) == limit:
                return rows
    return rows


def under_other_prompts(rows: Sequence[TokenRow], seed: int) -> list[TokenRow]:
    """Return each row's last answer after the prompt of another row, never its own (a seeded rotation)."""
    order = np.random.default_rng(seed).permutation(len(rows))
    prompt_of = np.empty(len(rows), dtype=np.int64)
    prompt_of[order] = np.roll(order, 1)
    return [with_prompt(row, rows[prompt_of[i]]) for i, row in enumerate(rows)]


def with_prompt(row: TokenRow, other: TokenRow) -> TokenRow:
    """`row`'s last answer, supervised, behind `other`'s prompt, not supervised."""
    prompt, answer = other.ids[: other.answer_start], row.ids[row.answer_start :]
    mask = np.concatenate([np.zeros(len(prompt), dtype=bool), row.mask[row.answer_start :]])
    return TokenRow(row.id, np.concatenate([prompt, answer]), mask)
