"""Search above a score in the cells nearest to a query: sub-quadratic, every pair it yields is a true one.

An inverted file (Sivic and Zisserman 2003; FAISS): k-means divides the vectors, projected on their 64 main directions,
into cells; a vector is compared with those in the PROBES cells nearest to it. On real LSA vectors the projection finds
more pairs than k-means over all dimensions, and costs a sixth (docs/lab-notes.md, 2026-11-30).
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.dedup.index import MAX_PAIRS, FlatIndex, Pairs, Queries, sorted_pairs
from finetune.dedup.measures import Cosine, Rows, Sharding
from finetune.utils.runtime import usable_cpus

DIRECTIONS = 64
ROWS_PER_CELL = 128
MOST_CELLS = 16_384  # k-means and the choice of cells cost rows × cells
TRAINED_ON = 24  # rows per cell
ROUNDS = 5  # of k-means
PROBES = 16
PLACED_TOGETHER = 8192  # rows
FIRST_QUERIES, MOST_QUERIES, LEAST_QUERIES = 1024, 1 << 17, 8  # compared together
MOST_PAIRS = 4 * MAX_PAIRS  # of them; a chunk with more is asked again in quarters
SIDE = 4096  # most queries and most rows of a cell in one product: 64 MB, however many rows a cell has
SEED = 0  # of the algorithm, not of the recipe


@dataclass(frozen=True)
class Cells:
    """A division of vectors into cells.

    Attributes:
        directions: (d, k) float32, orthonormal columns.
        centres: (m, k) float32, rows of length 1.
        probes: cells that a query is compared with.
    """

    directions: NDArray[np.float32]
    centres: NDArray[np.float32]
    probes: int

    @classmethod
    def of(cls, vectors: NDArray[np.float32]) -> Cells:
        """Learn the cells from evenly spread rows of `vectors` (N, d), which may be memory-mapped.

        One thread computes the sums, so that the cells do not depend on the number of threads.
        """
        import faiss
        from threadpoolctl import threadpool_limits

        count = max(1, min(MOST_CELLS, len(vectors) // ROWS_PER_CELL))
        places = np.unique(np.linspace(0, len(vectors) - 1, min(len(vectors), count * TRAINED_ON)).astype(np.int64))
        some = np.asarray(vectors[places], np.float32)
        with threadpool_limits(1):
            wide = some[:: max(1, len(some) // 20_000)].astype(np.float64)
            _, axes = np.linalg.eigh(wide.T @ wide)
            directions = np.ascontiguousarray(axes[:, ::-1][:, :DIRECTIONS], np.float32)
            threads = faiss.omp_get_max_threads()
            faiss.omp_set_num_threads(1)
            try:
                means = faiss.Kmeans(
                    directions.shape[1],
                    min(count, len(some)),
                    niter=ROUNDS,
                    spherical=True,
                    seed=SEED,
                    min_points_per_centroid=1,  # only silences a warning
                    max_points_per_centroid=TRAINED_ON,
                )
                means.train(_unit(some @ directions))
            finally:
                faiss.omp_set_num_threads(threads)
        return cls(directions, np.ascontiguousarray(means.centroids), PROBES)

    def wider(self) -> Cells:
        """Return the same cells with four times as many probes, at most all cells."""
        return replace(self, probes=min(4 * self.probes, len(self.centres)))

    def nearest(self, vectors: NDArray[np.float32]) -> NDArray[np.int16]:
        """Return the `probes` nearest cells of each of `vectors` (N, d), nearest first: (N, probes).

        Blocks of a fixed size with one thread each, so that the result does not depend on the number of threads.
        """
        import faiss
        from threadpoolctl import threadpool_limits

        index = faiss.IndexFlatIP(self.centres.shape[1])
        index.add(self.centres)
        cells = np.empty((len(vectors), min(self.probes, len(self.centres))), np.int16)

        def place(start: int) -> None:
            faiss.omp_set_num_threads(1)  # of this thread
            part = _unit(vectors[start : start + PLACED_TOGETHER] @ self.directions)
            cells[start : start + PLACED_TOGETHER] = index.search(part, cells.shape[1])[1]

        with threadpool_limits(1), ThreadPoolExecutor(usable_cpus()) as pool:
            list(pool.map(place, range(0, len(vectors), PLACED_TOGETHER)))
        return cells


@dataclass(frozen=True, kw_only=True)
class CellCosine(Cosine):
    """`Cosine` with a search by cells, in which a row's feature is its number.

    A pair is found if the one that was added is in one of the cells nearest to the other.

    Attributes:
        near: (N, probes) int16, the cells nearest to each row, nearest first: the first one holds it.
    """

    near: NDArray[np.int16]
    size: Queries = field(default_factory=lambda: Queries(FIRST_QUERIES, MOST_QUERIES, LEAST_QUERIES), compare=False)

    @classmethod
    def of(cls, vectors: NDArray[np.float32], threshold: float, cells: Cells) -> CellCosine:
        """Place all of `vectors` (N, d), which may be memory-mapped."""
        whole = np.asarray(vectors)  # a view without the overhead of numpy.memmap
        return cls(whole, threshold, FlatIndex, near=cells.nearest(whole))

    def search(self) -> CellIndex:
        """An empty search."""
        return CellIndex(self.vectors, self.near, self.size)

    def features(self, rows: Rows) -> Any:  # noqa: ANN401 - what its search takes
        """Return `rows`."""
        return rows

    def sharding(self) -> Sharding:
        """Whole cells: a query finds each of its cells in one shard."""

        def sent(rows: Rows) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
            return self.vectors.take(rows, axis=0), self.near[rows]

        return Sharding(CellShard, sent, self.near[:, 0], Queries(FIRST_QUERIES, MOST_QUERIES, LEAST_QUERIES))


class CellIndex:
    """Pairs above a score within the probed cells; a `Search` of `finetune.dedup.measures` that may miss pairs.

    Queries are grouped by cell: one matrix product for a cell's queries and its rows. FAISS's inverted file, which
    takes one query after another, waited for memory (a fifth of the speed).
    """

    def __init__(self, vectors: NDArray[np.float32], near: NDArray[np.int16], size: Queries) -> None:
        """An empty index of rows of `vectors` (N, d) with the cells `near` (N, probes)."""
        self._vectors, self._near, self._size = vectors, near, size
        self._rows = np.empty(0, np.int64)
        self._cells: dict[int, NDArray[np.int64]] | None = None  # cell -> places in `rows`

    def __len__(self) -> int:
        """How many rows it holds."""
        return len(self._rows)

    def add(self, rows: Rows) -> None:
        """Append `rows` (n,); they get the next numbers."""
        self._rows, self._cells = np.concatenate([self._rows, rows]), None

    def pairs(self, queries: Rows, score: float) -> Iterator[Pairs]:
        """Yield (query i, indexed row j, inner product) above `score`, in chunks, sorted by i and then j."""
        if self._cells is None:
            self._cells = dict(_by_cell(self._near[self._rows, :1]))
        start = 0
        while start < len(queries):
            block = queries[start : start + self._size.rows]
            chunks = self._above(block, score)
            if sum(len(i) for i, _, _ in chunks) > MOST_PAIRS and self._size.shrink():
                continue
            self._size.report(len(block), sum(len(i) for i, _, _ in chunks))
            i, j, scores = sorted_pairs(chunks)
            yield i + start, j, scores
            start += len(block)

    def _above(self, block: Rows, score: float) -> list[Pairs]:
        """Return the pairs of one chunk of queries; not all, if there are more than MOST_PAIRS and it can shrink."""
        from threadpoolctl import threadpool_limits

        there, threads, shrinks = self._cells or {}, usable_cpus(), len(block) > self._size.least
        groups = [(cell, places) for cell, places in _by_cell(self._near[block]) if cell in there]
        total = 0

        def compared(part: list[tuple[int, NDArray[np.int64]]]) -> list[Pairs]:
            nonlocal total
            found = []
            for asked, held in ((q, h) for cell, places in part for h in _slices(there[cell]) for q in _slices(places)):
                if shrinks and total > MOST_PAIRS:
                    break
                scores = self._of(block[asked]) @ self._of(self._rows[held]).T
                i, j = np.nonzero(scores > score)
                if len(i):
                    found.append((asked[i], held[j], scores[i, j]))
                    total += len(i)
            return found

        with threadpool_limits(1), ThreadPoolExecutor(threads) as pool:
            return [one for part in pool.map(compared, [groups[k::threads] for k in range(threads)]) for one in part]

    def _of(self, rows: Rows) -> NDArray[np.float32]:
        return self._vectors.take(rows, axis=0)


class CellShard(CellIndex):
    """A `CellIndex` that holds its rows itself; it takes (vectors, nearest cells) instead of row numbers."""

    def __init__(self) -> None:
        """An empty index."""
        queries = Queries(FIRST_QUERIES, MOST_QUERIES, LEAST_QUERIES)
        super().__init__(np.empty((0, 0), np.float32), np.empty((0, 0), np.int16), queries)

    def add(self, features: Any) -> None:  # noqa: ANN401 - the pair
        """Append rows; they get the next numbers."""
        super().add(self._placed(features))

    def pairs(self, queries: Any, score: float) -> Iterator[Pairs]:  # noqa: ANN401 - the pair
        """As `CellIndex.pairs`."""
        yield from super().pairs(self._placed(queries), score)

    def _placed(self, features: tuple[NDArray[np.float32], NDArray[np.int16]]) -> Rows:
        """Write rows behind those that are held, over the last queries; returns their numbers."""
        vectors, near = features
        stop = len(self) + len(vectors)
        if stop > len(self._vectors):
            room = max(stop, 2 * len(self))
            kept = self._vectors[: len(self)], self._near[: len(self)]
            self._vectors = np.empty((room, vectors.shape[1]), np.float32)
            self._near = np.empty((room, near.shape[1]), np.int16)
            if len(self):
                self._vectors[: len(self)], self._near[: len(self)] = kept
        self._vectors[len(self) : stop], self._near[len(self) : stop] = vectors, near
        return np.arange(len(self), stop)


def _slices(places: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    return [places[start : start + SIDE] for start in range(0, len(places), SIDE)]


def _by_cell(cells: NDArray[np.int16]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield each cell of `cells` (n, p) with the rows that have it, ascending."""
    flat = cells.ravel()
    if not len(flat):
        return
    order = np.argsort(flat, kind="stable")
    edges = np.flatnonzero(np.r_[True, flat[order][1:] != flat[order][:-1], True])
    for start, stop in pairwise(edges.tolist()):
        places = order[start:stop]
        yield int(flat[places[0]]), places // cells.shape[1]


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale rows to length 1; a row of zeros is unchanged."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.ascontiguousarray(rows / np.where(lengths > 0, lengths, 1), np.float32)
