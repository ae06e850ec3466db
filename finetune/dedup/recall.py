"""Measure the recall of deduplication: compare a sample with every kept row by brute force, without a search.

It is measured on large data, which cannot be inspected by eye: an exact search should have 1, one by cells nearly 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from finetune.dedup.jaccard import Jaccard, Sets, ranges
from finetune.dedup.measures import SCORE_DECIMALS, Cosine, Rows

SAMPLED = 1000
COLUMNS = 4096  # kept rows compared together
FLOAT32_ERROR = 1e-4  # far above that of an inner product of unit vectors

Twins = NDArray[np.bool_]


class Repeats(Protocol):
    """Function that returns which of `rows` (n,) match another row of `kept` (m,), by comparing all pairs."""

    def __call__(self, rows: Rows, kept: Rows) -> Twins:
        """(n,) bool."""


def measured_recall(
    order: Sequence[int] | Rows,
    dropped: set[int],
    keys: Sequence[Hashable] | None,
    measures: Sequence[Cosine | Jaccard],
    sampled: int = SAMPLED,
    check: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, float | int | None]]:
    """Return for each method the share of the sampled rows repeating a kept row that was dropped.

    Args:
        order: the row numbers that were compared.
        dropped: those that were dropped, by any method.
        keys: the key of every row number, or None if equal keys were not compared.
        measures: the other methods.
        sampled: number of rows compared with all kept ones, evenly spread over the row numbers.
        check: called between blocks; may raise to stop.

    Returns:
        Method → {"sampled", "repeats": how many of them repeat a kept row, "recall": None if none does}.
    """
    rows = np.sort(np.asarray(order, np.int64))
    kept = rows[~np.isin(rows, np.fromiter(dropped, np.int64))]
    some = rows[np.unique(np.linspace(0, len(rows) - 1, min(sampled, len(rows))).astype(np.int64))]
    gone = np.isin(some, np.fromiter(dropped, np.int64))
    methods: dict[str, Repeats] = {}
    if keys is not None:
        methods["exact"] = lambda rows, kept: _same_key(keys, rows, kept)
    for measure in measures:
        methods[measure.name] = _of(measure)
    recalls: dict[str, dict[str, float | int | None]] = {}
    for name, repeats in methods.items():
        check()
        twin = repeats(some, kept)
        share = float(gone[twin].mean()) if twin.any() else None
        recalls[name] = {"sampled": len(some), "repeats": int(twin.sum()), "recall": share}
    return recalls


def missed_twins(measure: Cosine, kept: Rows, sampled: int, check: Callable[[], None] = lambda: None) -> int:
    """Return how many of `sampled` evenly spread rows of `kept` (m,) reach the threshold with a row before them."""
    places = np.unique(np.linspace(0, len(kept) - 1, sampled).astype(np.int64))
    has_twin = np.zeros(len(places), bool)
    for start in range(0, len(kept), COLUMNS):
        check()
        later = np.flatnonzero(places > start)
        part = measure.vectors[kept[start : start + COLUMNS]]
        for low in range(0, len(later), SAMPLED):
            some = later[low : low + SAMPLED]
            queries = measure.vectors[kept[places[some]]]
            i, j = np.nonzero(queries @ part.T >= measure.threshold - FLOAT32_ERROR)
            earlier = start + j < places[some[i]]
            i, j = i[earlier], j[earlier]
            a, b = queries[i].astype(np.float64), part[j].astype(np.float64)
            norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
            scores = np.round(np.einsum("ij,ij->i", a, b) / np.where(norms > 0, norms, 1), SCORE_DECIMALS)
            has_twin[some[i[scores >= measure.threshold]]] = True
    return int(has_twin.sum())


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a share, `hits` of `trials` (Wilson, JASA 22, 1927)."""
    z2 = 1.959964**2
    middle = (hits + z2 / 2) / (trials + z2)
    half = np.sqrt(z2 * (hits * (trials - hits) / trials + z2 / 4)) / (trials + z2)
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def _of(measure: Cosine | Jaccard) -> Repeats:
    if isinstance(measure, Cosine):
        return lambda rows, kept: _cosine(measure, rows, kept)
    return lambda rows, kept: _jaccard(measure, rows, kept)


def _same_key(keys: Sequence[Hashable], rows: Rows, kept: Rows) -> Twins:
    counts = Counter(keys[row] for row in kept.tolist())
    there = set(kept.tolist())
    return np.array([bool(keys[r]) and counts[keys[r]] > (r in there) for r in rows.tolist()], bool)


def _cosine(measure: Cosine, rows: Rows, kept: Rows) -> Twins:
    def unit(some: Rows) -> NDArray[np.float64]:
        wide = measure.vectors[some].astype(np.float64)
        lengths = np.linalg.norm(wide, axis=1, keepdims=True)
        scaled: NDArray[np.float64] = wide / np.where(lengths > 0, lengths, 1)
        return scaled

    queries, has_twin = unit(rows), np.zeros(len(rows), bool)
    for start in range(0, len(kept), COLUMNS):
        part = kept[start : start + COLUMNS]
        reach = np.round(queries @ unit(part).T, SCORE_DECIMALS) >= measure.threshold
        reach &= rows[:, None] != part[None, :]
        has_twin |= reach.any(axis=1)
    return has_twin


def _jaccard(measure: Jaccard, rows: Rows, kept: Rows) -> Twins:
    """Count the n-grams that each row shares with every kept row, without prefix or size filter."""
    others = measure.sets.take(kept)
    holder = np.repeat(np.arange(len(kept), dtype=np.int32), others.starts[1:] - others.starts[:-1])
    order = np.argsort(others.tokens, kind="stable")
    tokens, holder = others.tokens[order], holder[order]
    queries = measure.sets.take(rows)
    has_twin = np.zeros(len(rows), bool)
    for place, own in enumerate(_each(queries)):
        low, high = (np.searchsorted(tokens, own, side) for side in ("left", "right"))
        common = np.bincount(holder[ranges(low, high - low)], minlength=len(kept))
        scores = common / np.maximum(queries.sizes[place] + others.sizes - common, 1)
        has_twin[place] = bool(((scores >= measure.threshold) & (kept != rows[place])).any())
    return has_twin


def _each(sets: Sets) -> Iterator[NDArray[np.int32]]:
    for start, stop in zip(sets.starts[:-1].tolist(), sets.starts[1:].tolist(), strict=True):
        yield sets.tokens[start:stop]
