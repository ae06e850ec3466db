"""Search above a score in the cells nearest to a query: sub-quadratic, every pair it yields is a true one.

An inverted file (Sivic and Zisserman 2003; FAISS): k-means divides the vectors, projected on their 64 main directions,
into cells; a vector is compared with those in the PROBES cells nearest to it. On real LSA vectors the projection finds
more pairs than k-means over all dimensions, and costs a sixth (docs/lab-notes.md, 2026-11-30).
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from finetune.dedup.index import FlatIndex, Pairs, Queries, sorted_pairs
from finetune.utils.runtime import usable_cpus

DIRECTIONS = 64
ROWS_PER_CELL = 128
MOST_CELLS = 16_384  # k-means and the choice of cells cost rows × cells
TRAINED_ON = 24  # rows per cell
ROUNDS = 5  # of k-means
PROBES = 16
FIRST_QUERIES, MOST_QUERIES = 1024, 8192  # compared together
FLAT_ROWS = 4096  # fewer are compared exactly: no slower, and nothing is missed within a block
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

    def nearest(self, vectors: NDArray[np.float32], count: int) -> NDArray[np.int64]:
        """Return the `count` nearest cells of each of `vectors` (n, d), nearest first: (n, count)."""
        import faiss
        from threadpoolctl import threadpool_limits

        index = faiss.IndexFlatIP(self.centres.shape[1])
        index.add(self.centres)
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        try:
            with threadpool_limits(1):
                cells: NDArray[np.int64] = index.search(_unit(vectors @ self.directions), count)[1]
        finally:
            faiss.omp_set_num_threads(threads)
        return cells


class CellIndex:
    """Pairs above a score within the probed cells; a `Search` of `finetune.dedup.measures` that may miss pairs.

    Up to FLAT_ROWS rows it misses none. Queries are grouped by cell, so that a cell's vectors stay in the processor's
    cache: FAISS's inverted file, which takes one query after another, waited for memory (a fifth of the speed).
    """

    def __init__(self, dimension: int, cells: Cells) -> None:
        """An empty index for vectors of `dimension` numbers."""
        self._cells = cells
        self._flat = FlatIndex(dimension)
        self._dimension = dimension
        self._members: dict[int, _Members] = {}
        self._count = 0

    def __len__(self) -> int:
        """How many vectors it holds."""
        return self._count or len(self._flat)

    def add(self, vectors: NDArray[np.float32]) -> None:
        """Append `vectors` (N, d) float32; they get the next row numbers."""
        if not self._count and len(self._flat) + len(vectors) <= FLAT_ROWS:
            self._flat.add(vectors)
            return
        rows = np.concatenate([self._flat.vectors(), vectors]) if len(self._flat) else vectors
        self._flat = FlatIndex(self._dimension)
        for cell, places in _by_cell(self._cells.nearest(rows, 1)):
            self._members.setdefault(cell, _Members(self._dimension)).add(rows[places], places + self._count)
        self._count += len(rows)

    def pairs(self, queries: NDArray[np.float32], score: float) -> Iterator[Pairs]:
        """Yield (query row i, indexed row j, inner product) above `score`, in chunks, sorted by i and then j."""
        if not self._count:
            yield from self._flat.pairs(queries, score)
            return
        from threadpoolctl import threadpool_limits

        probes, threads = min(self._cells.probes, len(self._cells.centres)), usable_cpus()
        size = Queries(FIRST_QUERIES, MOST_QUERIES)
        with threadpool_limits(1), ThreadPoolExecutor(threads) as pool:
            for start, stop in size.parts(len(queries)):
                block = np.ascontiguousarray(queries[start:stop], np.float32)
                groups = [
                    (block, places, self._members[cell], score)
                    for cell, places in _by_cell(self._cells.nearest(block, probes))
                    if cell in self._members
                ]
                parts = [groups[k::threads] for k in range(threads)]
                chunks = [pairs for part in pool.map(_compared, parts) for pairs in part]
                size.report(stop - start, sum(len(i) for i, _, _ in chunks))
                i, j, scores = sorted_pairs(chunks)
                yield i + start, j, scores


def _compared(groups: list[tuple[NDArray[np.float32], NDArray[np.int64], _Members, float]]) -> list[Pairs]:
    """Return the pairs above the score of each (block, places of queries in it, members of a cell, score)."""
    chunks = []
    for block, places, members, score in groups:
        scores = block[places] @ members.vectors.T
        i, j = np.nonzero(scores > score)
        if len(i):
            chunks.append((places[i], members.rows[j], scores[i, j]))
    return chunks


class _Members:
    """The vectors and row numbers of a cell, in buffers that grow by a quarter."""

    def __init__(self, dimension: int) -> None:
        self._vectors = np.empty((0, dimension), np.float32)
        self._rows = np.empty(0, np.int64)
        self._count = 0

    @property
    def vectors(self) -> NDArray[np.float32]:
        return self._vectors[: self._count]

    @property
    def rows(self) -> NDArray[np.int64]:
        return self._rows[: self._count]

    def add(self, vectors: NDArray[np.float32], rows: NDArray[np.int64]) -> None:
        stop = self._count + len(rows)
        if stop > len(self._rows):
            more = stop + stop // 4 - self._count
            self._vectors = np.concatenate([self.vectors, np.empty((more, vectors.shape[1]), np.float32)])
            self._rows = np.concatenate([self.rows, np.empty(more, np.int64)])
        self._vectors[self._count : stop], self._rows[self._count : stop] = vectors, rows
        self._count = stop


def _by_cell(cells: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield each cell of `cells` (n, p) with the rows that have it, ascending."""
    flat = cells.ravel()
    order = np.argsort(flat, kind="stable")
    edges = np.flatnonzero(np.r_[True, flat[order][1:] != flat[order][:-1], True])
    for start, stop in pairwise(edges.tolist()):
        places = order[start:stop]
        yield int(flat[places[0]]), places // cells.shape[1]


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale rows to length 1; a row of zeros is unchanged."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.ascontiguousarray(rows / np.where(lengths > 0, lengths, 1), np.float32)
