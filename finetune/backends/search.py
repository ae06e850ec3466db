"""Exact inner-product search with FAISS."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import faiss

Pairs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]
MAX_PAIRS = 8_000_000  # pairs one search call may return in the worst case (12 bytes each inside FAISS)
MIN_QUERIES = 128  # below this BLAS loses its speed; above 62,500 indexed rows the worst case grows with the rows


class FlatIndex:
    """All pairs at or above a score, with no limit on neighbours; holds the vectors it was given once.

    FAISS's `range_search` compares tiles and never builds the whole score matrix, so a search costs rows × dimension
    of memory plus the pairs it found. A `Search` of `finetune.data.near_duplicates`.
    """

    def __init__(self, dimension: int) -> None:
        """An empty index for vectors of `dimension` numbers."""
        import faiss

        self._index: faiss.IndexFlatIP = faiss.IndexFlatIP(dimension)

    def __len__(self) -> int:
        """How many vectors it holds."""
        return int(self._index.ntotal)

    def add(self, vectors: NDArray[np.float32]) -> None:
        """Append `vectors` (N, d) float32; they get the next row numbers."""
        self._index.add(np.ascontiguousarray(vectors, dtype=np.float32))

    def pairs(self, queries: NDArray[np.float32], score: float) -> Iterator[Pairs]:
        """Every (query row i, indexed row j, inner product) above `score`, in chunks, sorted by i and then j.

        `queries` is (Q, d) float32. Chunks end between two queries and are of bounded size.
        """
        if not len(self) or not len(queries):
            return
        step = max(MIN_QUERIES, MAX_PAIRS // len(self))
        for start in range(0, len(queries), step):
            block = np.ascontiguousarray(queries[start : start + step], dtype=np.float32)
            limits, scores, found = self._index.range_search(block, score)
            counts = limits[1:].astype(np.int64) - limits[:-1].astype(np.int64)
            i = np.repeat(np.arange(start, start + len(block)), counts)
            order = np.lexsort((found, i))
            yield i[order], found[order], scores[order]
