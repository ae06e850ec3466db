"""Size a recipe to its rows: row length, batch, epochs, held-out share, from an estimate of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

from finetune.estimate.rows import Measured
from finetune.train.batch import Sizing, size_to_rows

WANTED_HELD_OUT = 50
MARGIN = 1.3  # over the longest row that was estimated


def length_for(measured: Measured, lengths: Sequence[int]) -> int:
    """The shortest of `lengths` that holds all but 1 in 200 rows with a margin, else the longest."""
    if not measured.lengths:
        return max(lengths)
    longest = sorted(measured.lengths)[math.ceil(0.995 * measured.kept) - 1]
    return min((n for n in lengths if n >= MARGIN * longest), default=max(lengths))


def held_out_fraction(measured: Measured) -> float:
    """Share that holds out WANTED_HELD_OUT rows, from 5 to 20 %."""
    return min(0.2, max(0.05, round(WANTED_HELD_OUT / max(1, measured.kept), 2)))


def batch_for(measured: Measured, length: int) -> Sizing:
    """Batch, epochs and packing for the rows that are trained on, of at most `length` tokens each."""
    share = 1 - held_out_fraction(measured)
    tokens = share * sum(min(n, length) for n in measured.lengths)
    rows = max(1, math.floor(share * measured.kept))
    sizing = size_to_rows(rows, math.ceil(tokens / (0.95 * length)))
    return sizing if measured.whole else size_to_rows(100 * rows, math.ceil(100 * tokens / length))
