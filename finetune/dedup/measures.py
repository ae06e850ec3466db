"""Similarity measures with a threshold, and the interface of a search for pairs.

A search over vectors works in float32, and its last digits depend on library, threads and tile size. So every pair
within BAND of a threshold is scored again in float64, and the threshold is applied to that score, rounded to 12
decimals. The rows kept do not depend on the search or on the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
Rows = NDArray[np.int64]
Scores = NDArray[np.float64]
BAND = 1e-4  # far above the error of a float32 inner product of unit vectors (about 1e-6 at 1,024 dimensions)
NORM_TOLERANCE = 2e-5
SCORE_DECIMALS = 12
RESCORE_ROWS = 4096


class Search(Protocol):
    """An exact incremental search over features (vectors, sets)."""

    def add(self, features: Any) -> None:  # noqa: ANN401 - whatever its measure's features are
        """Append the features of some rows; they get the next numbers, from 0."""

    def pairs(self, queries: Any, score: float) -> Iterator[tuple[Rows, Rows, NDArray[Any]]]:  # noqa: ANN401 - the same
        """Yield all (query i, added j, score) above `score`, sorted by i and j, in chunks that end between queries."""


NewSearch = Callable[[int], Search]
"""Function that creates an empty search for vectors of a dimension."""


class Measure(Protocol):
    """A similarity of rows with a threshold."""

    @property
    def name(self) -> str:
        """Name of the method in the recorded pairs."""

    @property
    def threshold(self) -> float:
        """Score from which two rows are near-duplicates."""

    @property
    def band(self) -> float:
        """Largest error of a search's score."""

    def search(self) -> Search:
        """An empty search."""

    def features(self, rows: Rows) -> Any:  # noqa: ANN401 - the same
        """Return the features of `rows` for the search."""

    def settled(self, a: Rows, b: Rows, scores: NDArray[Any]) -> Scores:
        """Return the exact scores of row a[k] with row b[k], given the search's scores."""


@dataclass(frozen=True)
class Cosine:
    """Rows are near-duplicates if their cosine is at least `threshold`; a row of zeros matches nothing.

    Attributes:
        vectors: (N, d) float32, every row of length 1, or all zero.
        threshold: in (0, 1].
        new_search: creates an empty search.

    Raises:
        ValueError: rows are neither unit nor zero, or not finite.
    """

    vectors: Vectors
    threshold: float
    new_search: NewSearch
    name: str = "embedding"
    band: float = BAND

    def __post_init__(self) -> None:
        nonzero(self.vectors)

    def search(self) -> Search:
        """An empty search."""
        return self.new_search(self.vectors.shape[1])

    def features(self, rows: Rows) -> Vectors:
        """The vectors of `rows`."""
        return self.vectors[rows]

    def settled(self, a: Rows, b: Rows, scores: NDArray[Any]) -> Scores:
        """The cosines in float64."""
        out = np.empty(len(a), np.float64)
        for start in range(0, len(a), RESCORE_ROWS):
            part = slice(start, start + RESCORE_ROWS)
            out[part] = cosines(self.vectors[a[part]], self.vectors[b[part]])
        return out


class Best:
    """The best partner seen so far (a row number) of each row of a block, by a measure's exact score."""

    def __init__(self, block: Rows, measure: Measure) -> None:
        """Start without partners for the rows of `block` (n,)."""
        self._block, self._measure = block, measure
        self.score = np.full(len(block), -np.inf)
        self.row = np.full(len(block), -1, np.int64)

    def take(self, i: Rows, partner: Rows, scores: NDArray[Any]) -> None:
        """Update from a search's `scores` of block positions `i` (ascending) with rows `partner`, preferred first."""
        if not len(i):
            return
        # Only partners that could be the best once settled are scored again.
        starts = np.flatnonzero(np.r_[True, i[1:] != i[:-1]])
        top = np.repeat(np.maximum.reduceat(scores, starts), np.diff(np.r_[starts, len(i)]))
        near = scores >= top - 2 * self._measure.band
        i, partner = i[near], partner[near]
        exact = self._measure.settled(self._block[i], partner, scores[near])
        order = np.lexsort((np.arange(len(i)), -exact, i))  # per row: best first, then the earlier one
        first = order[np.r_[True, i[order][1:] != i[order][:-1]]]
        better = first[(exact[first] >= self._measure.threshold) & (exact[first] > self.score[i[first]])]
        self.score[i[better]] = exact[better]
        self.row[i[better]] = partner[better]


def reaches(measure: Measure, a: Rows, b: Rows, scores: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which pairs of rows a[k] and b[k] reach the threshold; those within its band are scored exactly."""
    reach: NDArray[np.bool_] = scores >= measure.threshold
    close = np.flatnonzero(np.abs(scores - measure.threshold) <= measure.band)
    reach[close] = measure.settled(a[close], b[close], scores[close]) >= measure.threshold
    return reach


def cosines(a: Vectors, b: Vectors) -> Scores:
    """Return cosines of row i of `a` (n, d) and `b` (n, d), float64, rounded to 12 decimals; 0 for a zero row."""
    out = np.zeros(len(a), np.float64)
    for start in range(0, len(a), RESCORE_ROWS):
        x = a[start : start + RESCORE_ROWS].astype(np.float64)
        y = b[start : start + RESCORE_ROWS].astype(np.float64)
        # A single square root of the product makes the cosine of a row with itself exactly 1.
        norms = np.sqrt(np.einsum("ij,ij->i", x, x) * np.einsum("ij,ij->i", y, y))
        dots = np.einsum("ij,ij->i", x, y)
        out[start : start + len(x)] = np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0)
    return np.round(out, SCORE_DECIMALS)


def nonzero(vectors: Vectors) -> NDArray[np.bool_]:
    """Return which rows are not all zero. Raises ValueError for a row whose length is neither 0 nor 1."""
    squares = np.einsum("ij,ij->i", vectors, vectors)
    bad = ~((squares == 0) | (np.abs(squares - 1) <= 2 * NORM_TOLERANCE))  # NaN fails both
    if bad.any():
        row = int(np.argmax(bad))
        raise ValueError(f"row {row} has length {float(np.sqrt(squares[row])):.6g}; vectors must have length 1 or 0")
    alive: NDArray[np.bool_] = squares > 0
    return alive
