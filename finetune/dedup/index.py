"""Exact inner-product search: FAISS on a CPU, blocked torch products on a GPU (faiss-cpu has none there)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import faiss
    import torch

Pairs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]
MAX_PAIRS = 8_000_000  # target size of a chunk (12 bytes per pair inside FAISS)
MIN_QUERIES = 128  # below this BLAS loses its speed
MAX_QUERIES = 4096  # FAISS's block; with 145 at a time it took ten times the CPU time over 55 k rows
GPU_COLUMNS = 65_536
GPU_FROM_ROWS = 20_000  # fewer are compared in seconds, which is the time to start torch and a GPU


def exact_search(device: str, rows: int) -> Callable[[int], FlatIndex | TorchIndex]:
    """Return a function that makes an empty search index; its argument is the dimension of the vectors.

    The index is on the GPU if `device` allows it, there is one, and `rows` is at least GPU_FROM_ROWS. `device` is
    `auto`, `cpu` or `cuda`. Raises InputError if it is `cuda` and there is no GPU.
    """
    if device == "cpu" or rows < GPU_FROM_ROWS:
        return FlatIndex
    from finetune.models.device import pick_device

    device_name = pick_device(device)
    return FlatIndex if device_name == "cpu" else lambda dimension: TorchIndex(dimension, device_name)


class Queries:
    """Adaptive number of queries per chunk: few at first, more after few hits, fewer after many hits.

    A chunk of 128 queries with 60,000 hits each is as large as one of 4,096 with 2,000 each.
    """

    def __init__(self, first: int = MIN_QUERIES, most: int = MAX_QUERIES, least: int = MIN_QUERIES) -> None:
        self._size, self._most, self.least = first, most, least

    @property
    def rows(self) -> int:
        """The size of the next chunk."""
        return self._size

    def shrink(self) -> bool:
        """Quarter the size after a chunk with too many pairs; return whether that is possible."""
        before, self._size = self._size, max(self.least, self._size // 4)
        return self._size < before

    def parts(self, count: int) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of one chunk after another; call `report` after each."""
        start = 0
        while start < count:
            stop = min(start + self._size, count)
            yield start, stop
            start = stop

    def report(self, queries: int, pairs: int) -> None:
        """Set the size of the next chunk from the pairs of the last one."""
        room = MAX_PAIRS * queries // (2 * max(1, pairs))  # the next may be twice as full
        self._size = max(self.least, min(4 * self._size, room, self._most))


class FlatIndex:
    """All pairs above a score, with no limit on neighbours; holds each vector once.

    FAISS's `range_search` compares tiles and never builds the whole score matrix, so a search needs rows × dimension
    of memory plus the pairs found. A `Search` of `finetune.dedup.measures`.
    """

    def __init__(self, dimension: int) -> None:
        """An empty index for vectors of `dimension` numbers."""
        import faiss

        self._index: faiss.IndexFlatIP = faiss.IndexFlatIP(dimension)
        self._queries = Queries()

    def __len__(self) -> int:
        """How many vectors it holds."""
        return int(self._index.ntotal)

    def add(self, vectors: NDArray[np.float32]) -> None:
        """Append `vectors` (N, d) float32; they get the next row numbers."""
        self._index.add(np.ascontiguousarray(vectors, dtype=np.float32))

    def pairs(self, queries: NDArray[np.float32], score: float) -> Iterator[Pairs]:
        """Every (query row i, indexed row j, inner product) above `score`, in chunks, sorted by i and then j.

        `queries` is (Q, d) float32. Chunks end between two queries.
        """
        if not len(self):
            return
        for start, stop in self._queries.parts(len(queries)):
            block = np.ascontiguousarray(queries[start:stop], dtype=np.float32)
            limits, scores, neighbours = self._index.range_search(block, score)
            counts = limits[1:].astype(np.int64) - limits[:-1].astype(np.int64)
            self._queries.report(stop - start, len(neighbours))
            yield sorted_pairs([(np.repeat(np.arange(start, stop), counts), neighbours, scores)])

    def vectors(self) -> NDArray[np.float32]:
        """Return a copy of the vectors (N, d)."""
        stored: NDArray[np.float32] = self._index.reconstruct_n(0, len(self))
        return stored


class TorchIndex:
    """`FlatIndex` on a torch device: the same pairs except for the last digits of their products."""

    def __init__(self, dimension: int, device: str) -> None:
        """An empty index for vectors of `dimension` numbers."""
        import torch

        self._device = device
        self._parts = [torch.empty((0, dimension), device=device)]
        self._count = 0
        self._queries = Queries()

    def __len__(self) -> int:
        """How many vectors it holds."""
        return self._count

    def add(self, vectors: NDArray[np.float32]) -> None:
        """Append `vectors` (N, d) float32; they get the next row numbers."""
        self._parts.append(self._there(vectors))
        self._count += len(vectors)
        while len(self._parts) > 1 and len(self._parts[-2]) <= 2 * len(self._parts[-1]):
            self._parts[-2:] = [_stacked(self._parts[-2:])]

    def pairs(self, queries: NDArray[np.float32], score: float) -> Iterator[Pairs]:
        """Every (query row i, indexed row j, inner product) above `score`, in chunks, sorted by i and then j."""
        if not len(self):
            return
        for start, stop in self._queries.parts(len(queries)):
            block = self._there(queries[start:stop])
            chunks: list[Pairs] = []
            first = 0
            for part in self._parts:
                for low in range(0, len(part), GPU_COLUMNS):
                    chunks += self._above(block, part[low : low + GPU_COLUMNS], score, start, first + low)
                first += len(part)
            self._queries.report(stop - start, sum(len(i) for i, _, _ in chunks))
            yield sorted_pairs(chunks)

    def _above(self, block: torch.Tensor, part: torch.Tensor, score: float, start: int, first: int) -> list[Pairs]:
        import torch

        # TF32 has an error of 1e-3, more than the band within which scores are computed again.
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            products = block @ part.T
        finally:
            torch.set_float32_matmul_precision(precision)
        i, j = torch.nonzero(products > score, as_tuple=True)
        if not len(i):
            return []
        return [((i + start).cpu().numpy(), (j + first).cpu().numpy(), products[i, j].cpu().numpy())]

    def _there(self, vectors: NDArray[np.float32]) -> torch.Tensor:
        import torch

        return torch.from_numpy(np.ascontiguousarray(vectors, dtype=np.float32)).to(self._device)


def _stacked(parts: list[torch.Tensor]) -> torch.Tensor:
    import torch

    return torch.cat(parts)


def sorted_pairs(chunks: list[Pairs]) -> Pairs:
    """Return the pairs of one chunk, sorted by query and then by row."""
    if not chunks:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)
    i, j, scores = (np.concatenate(column) for column in zip(*chunks, strict=True))
    order = np.lexsort((j, i))
    return i[order], j[order], scores[order]
