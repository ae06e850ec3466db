"""Similarity measures with a threshold, and the interface of a search for pairs.

A search over vectors works in float32, and its last digits depend on library, threads and tile size. So every pair
within BAND of a threshold is scored again in float64, and the threshold is applied to that score, rounded to 12
decimals. The rows kept do not depend on the search or on the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from finetune.dedup.index import MAX_PAIRS, Queries, sorted_pairs
from finetune.engine.local import Local

if TYPE_CHECKING:
    from finetune.engine.interface import Engine

Vectors = NDArray[np.float32]
Rows = NDArray[np.int64]
Scores = NDArray[np.float64]
BAND = 1e-4  # far above the error of a float32 inner product of unit vectors (about 1e-6 at 1,024 dimensions)
NORM_TOLERANCE = 2e-5
SCORE_DECIMALS = 12
RESCORE_ROWS = 4096
MOST_ANSWERED = 4 * MAX_PAIRS  # by a shard at once
SENT_ROWS = 1 << 16  # to a shard at once, when it is built again
HERE = Local(1)


class Search(Protocol):
    """An exact incremental search over features (vectors, sets)."""

    def add(self, features: Any) -> None:  # noqa: ANN401 - whatever its measure's features are
        """Append the features of some rows; they get the next numbers, from 0."""

    def pairs(self, queries: Any, score: float) -> Iterator[tuple[Rows, Rows, NDArray[Any]]]:  # noqa: ANN401 - the same
        """Yield all (query i, added j, score) above `score`, sorted by i and j, in chunks that end between queries."""


NewSearch = Callable[[int], Search]
"""Function that creates an empty search for vectors of a dimension."""


@dataclass(frozen=True)
class Sharding:
    """How a measure's rows are divided between searches in other processes.

    Attributes:
        search: creates an empty search there.
        features: returns what that search takes for some rows.
        owner: a number for every row; those with the same one get the same shard. None: the rows by turns.
        queries: how many rows are asked together.
    """

    search: Callable[[], Search]
    features: Callable[[Rows], Any]
    owner: NDArray[Any] | None = None
    queries: Queries = field(default_factory=Queries)


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

    def sharding(self) -> Sharding | None:
        """Return how its search is divided between processes; None: it runs in this one only."""

    def settled(self, a: Rows, b: Rows, scores: NDArray[Any]) -> Scores:
        """Return the exact scores of row a[k] with row b[k], given the search's scores."""


@dataclass(frozen=True)
class Cosine:
    """Rows are near-duplicates if their cosine is at least `threshold`; a row of zeros matches nothing.

    Attributes:
        vectors: (N, d) float32, every row of length 1, or all zero.
        threshold: in (0, 1].
        new_search: creates an empty search; a class may be used in other processes too.

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

    def sharding(self) -> Sharding | None:
        """Rows by turns; a search on a GPU is not divided."""
        if not isinstance(self.new_search, type):
            return None
        return Sharding(partial(self.new_search, self.vectors.shape[1]), self.features)

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


class Index:
    """A measure's search over row numbers, in this process or in shards: stateful workers that hold some rows each.

    All shards are asked the same, and their pairs are put in order, so the result does not depend on their number. A
    shard that was lost with its process is filled again.
    """

    def __init__(self, measure: Measure, engine: Engine, rows: int) -> None:
        """An empty search for about `rows` rows."""
        self._measure, sharding = measure, measure.sharding()
        self._search: Search | None = measure.search()
        if sharding is None:
            return
        self._sharding, self._shards = sharding, engine.workers(partial(_Shard, sharding.search), rows)
        if len(self._shards) > 1:
            self._search = None
        self._rows = np.empty(0, np.int64)
        self._held = [np.empty(0, np.int64) for _ in range(len(self._shards))]  # places in `_rows`

    def add(self, rows: Rows) -> None:
        """Append `rows` (n,); they get the next places."""
        if self._search is not None:
            self._search.add(self._measure.features(rows))
            return
        places = np.arange(len(self._rows), len(self._rows) + len(rows))
        owner = places if self._sharding.owner is None else self._sharding.owner[rows]
        before = [len(held) for held in self._held]
        self._rows = np.concatenate([self._rows, rows])
        self._held = [np.r_[held, places[owner % len(before) == k]] for k, held in enumerate(self._held)]
        self._fill(before)

    def pairs(self, rows: Rows, score: float) -> Iterator[tuple[Rows, Rows, NDArray[Any]]]:
        """Yield (place i in `rows`, place j, score) as `Search.pairs` does."""
        if self._search is not None:
            yield from self._search.pairs(self._measure.features(rows), score)
            return
        queries, start = self._sharding.queries, 0
        while start < len(rows):
            block = rows[start : start + queries.rows]
            most = MOST_ANSWERED if len(block) > queries.least else None
            found = self._answers((self._sharding.features(block), score, most))
            if () in found and queries.shrink():
                continue
            i, j, scores = sorted_pairs([(i, held[j], s) for (i, j, s), held in zip(found, self._held, strict=True)])
            queries.report(len(block), len(i))
            yield i + start, j, scores
            start += len(block)

    def _answers(self, asked: tuple[Any, float, int | None]) -> list[Any]:
        """Return the pairs of every shard; an empty tuple if there are too many."""
        found: list[Any] = [0] * len(self._held)
        while any(lost := [isinstance(answer, int) for answer in found]):
            each = [len(held) if again else None for held, again in zip(self._held, lost, strict=True)]
            answers = self._shards.call("pairs", each, asked)
            found = [new if again else old for old, new, again in zip(found, answers, lost, strict=True)]
            self._fill([a if isinstance(a, int) else len(h) for a, h in zip(found, self._held, strict=True)])
        return found

    def _fill(self, counts: list[int]) -> None:
        """Send every shard the rows that it lacks, given how many it has."""
        while any(count < len(held) for count, held in zip(counts, self._held, strict=True)):
            each = []
            for k, held in enumerate(self._held):
                rows = self._rows[held[counts[k] : counts[k] + SENT_ROWS]]
                each.append((counts[k], len(rows), self._sharding.features(rows)) if len(rows) else None)
                counts[k] += len(rows)
            self._shards.call("add", each)


class _Shard:
    """A search that knows how many rows it should have: one that was lost with its process has none."""

    def __init__(self, search: Callable[[], Search]) -> None:
        self._search, self._count = search(), 0

    def add(self, own: tuple[int, int, Any], shared: None) -> None:
        """Append rows behind the first `start`; no effect if these are not there, or if the call is a repeated one."""
        start, count, features = own
        if start == self._count:
            self._search.add(features)
            self._count += count

    def pairs(self, count: int, asked: tuple[Any, float, int | None]) -> tuple[NDArray[Any], ...] | int:
        """Return all pairs; () if there are more than `most`; how many rows it has if these are not `count`."""
        if count != self._count:
            return self._count
        queries, score, most = asked
        chunks, total = [], 0
        for chunk in self._search.pairs(queries, score) if count else ():
            chunks.append(chunk)
            total += len(chunk[0])
            if most is not None and total > most:
                return ()
        return sorted_pairs(chunks)


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
