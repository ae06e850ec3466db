"""Select among many rows by a search that may miss pairs, measure what it missed, and widen it until it is enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from finetune.dedup.cells import CellCosine, Cells
from finetune.dedup.index import FlatIndex
from finetune.dedup.jaccard import Jaccard
from finetune.dedup.measures import HERE, Cosine, Rows, Vectors
from finetune.dedup.recall import missed_twins, wilson
from finetune.dedup.select import Pair, select

if TYPE_CHECKING:
    from finetune.engine.interface import Engine

LARGE_ROWS = 100_000  # more are searched by cells on a CPU, unless the recipe asks for every pair
BLOCK_ROWS = 1 << 16  # compared together: several queries for each cell, and most twins were kept before
RECALL, LOW = 0.999, 0.998  # that a search must reach: measured, and the lower end of its 95 % interval
SAMPLED_PER_DROPPED = 2900  # × kept / dropped rows are compared with all: one miss among them is still enough
MOST_SAMPLED = 0.25  # share of the kept rows; a larger sample costs half of comparing every pair

Recall = dict[str, float | int | None]


def searched_by_cells(rows: int, device: str, exhaustive: bool) -> bool:
    """Return whether `rows` are searched by cells: many of them, on a CPU; a GPU compares every pair in seconds."""
    if exhaustive or rows <= LARGE_ROWS:
        return False
    from finetune.models.device import pick_device

    return pick_device(device) == "cpu"


def cell_measure(vectors: Vectors, threshold: float) -> CellCosine:
    """Return the cosine of `vectors` (N, d) with a search by their cells."""
    return CellCosine.of(vectors, threshold, Cells.of(vectors))


def select_measured(
    order: Sequence[int] | Rows,
    keys: Sequence[Hashable] | None,
    measures: Sequence[Jaccard],
    vectors: Vectors,
    threshold: float,
    say: Callable[[str], None] = lambda line: None,
    check: Callable[[], None] = lambda: None,
    engine: Engine = HERE,
) -> tuple[list[Pair], Recall]:
    """`select` by `measures` and by the cosine of `vectors`, with a search by cells whose recall is measured.

    Every dropped row has a kept twin, always. That no two kept rows reach the threshold holds for a share RECALL of the
    rows that repeat another, with LOW as the lower end of its interval; else the search is widened and run again, and
    at last every pair is compared. So it is at once if the rows that repeat another are too few for a sample to prove.

    Returns:
        The pairs as `select`, and {"sampled", "missed": sampled kept rows with a twin kept before them, "recall",
        "low": lower end of the 95 % interval, "probed": share of the cells searched; 1 if every pair was compared}.
    """
    cells = Cells.of(vectors)
    while cells.probes < len(cells.centres):
        measure = CellCosine.of(vectors, threshold, cells)
        pairs = select(order, keys, [*measures, measure], BLOCK_ROWS, check, engine)
        stats = measured(measure, np.asarray(order, np.int64), pairs, check)
        if stats is None:
            say("dedup: too few rows repeat another by cosine to prove a search by a sample: comparing every pair")
            break
        share = cells.probes / len(cells.centres)
        if float(stats["recall"] or 0) >= RECALL and float(stats["low"] or 0) >= LOW:
            return pairs, {**stats, "probed": share}
        say(
            f"dedup: {share:.1%} of the cells searched: recall {stats['recall']:.4f}, 95 % from {stats['low']:.4f}; "
            "searching more of them"
        )
        cells = cells.wider()
    exact = Cosine(vectors, threshold, FlatIndex)
    return select(order, keys, [*measures, exact], check=check, engine=engine), {
        "recall": 1.0,
        "low": 1.0,
        "probed": 1.0,
    }


def measured(
    measure: Cosine, order: Rows, pairs: Sequence[Pair], check: Callable[[], None] = lambda: None
) -> Recall | None:
    """Return the recall of a selection by `measure`, or None if a sample would be too large.

    Every dropped row was found, so only the kept ones can hold misses: M of them have a twin kept before them, and the
    recall is D / (D + M) with D rows dropped. M is estimated from evenly spread kept rows, each compared with all kept
    before it, and its 95 % interval is Wilson's (1927).
    """
    kept = order[~np.isin(order, np.array([p.dropped for p in pairs], np.int64))]
    dropped = sum(p.method == measure.name for p in pairs)
    sampled = math.ceil(SAMPLED_PER_DROPPED * len(kept) / dropped) if dropped else len(kept)
    if sampled > MOST_SAMPLED * len(kept):
        return None
    missed = missed_twins(measure, kept, sampled, check)
    high = wilson(missed, sampled)[1]
    return {
        "sampled": sampled,
        "missed": missed,
        "recall": dropped / (dropped + len(kept) * missed / sampled),
        "low": dropped / (dropped + len(kept) * high),
    }
