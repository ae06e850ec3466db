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
MAX_PAIRS = 8_000_000  # pairs one chunk may hold in the worst case (12 bytes each inside FAISS)
MIN_QUERIES = 128  # below this BLAS loses its speed; above 62,500 indexed rows the worst case grows with the rows
GPU_COLUMNS = 65_536
GPU_FROM_ROWS = 20_000  # fewer are compared in seconds; starting torch and a GPU takes as long


def exact_search(device: str, rows: int) -> Callable[[int], FlatIndex | TorchIndex]:
    """What makes an empty index for vectors of a dimension: on the GPU where there is one and `rows` are many.

    `device` is a context's: `auto`, `cpu` or `cuda`. Raises InputError where it asks for a GPU that is not there.
    """
    if device == "cpu" or rows < GPU_FROM_ROWS:
        return FlatIndex
    from finetune.backends.models import pick_device

    found = pick_device(device)
    return FlatIndex if found == "cpu" else lambda dimension: TorchIndex(dimension, found)


class FlatIndex:
    """All pairs above a score, with no limit on neighbours; holds the vectors it was given once.

    FAISS's `range_search` compares tiles and never builds the whole score matrix, so a search costs rows × dimension
    of memory plus the pairs it found. A `Search` of `finetune.data.measures`.
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
        step = _queries_a_chunk(len(self))
        for start in range(0, len(queries), step):
            block = np.ascontiguousarray(queries[start : start + step], dtype=np.float32)
            limits, scores, found = self._index.range_search(block, score)
            counts = limits[1:].astype(np.int64) - limits[:-1].astype(np.int64)
            i = np.repeat(np.arange(start, start + len(block)), counts)
            yield _in_order([(i, found, scores)])


class TorchIndex:
    """`FlatIndex` on a torch device: the same pairs, but for the last digits of their products."""

    def __init__(self, dimension: int, device: str) -> None:
        """An empty index for vectors of `dimension` numbers."""
        import torch

        self._device = device
        self._parts = [torch.empty((0, dimension), device=device)]
        self._count = 0

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
        if not len(self) or not len(queries):
            return
        step = _queries_a_chunk(len(self))
        for start in range(0, len(queries), step):
            block = self._there(queries[start : start + step])
            found: list[Pairs] = []
            first = 0
            for part in self._parts:
                for low in range(0, len(part), GPU_COLUMNS):
                    found += self._above(block, part[low : low + GPU_COLUMNS], score, start, first + low)
                first += len(part)
            yield _in_order(found)

    def _above(self, block: torch.Tensor, part: torch.Tensor, score: float, start: int, first: int) -> list[Pairs]:
        import torch

        # TF32 would be off by 1e-3, more than the band within which scores are looked at again.
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


def _queries_a_chunk(indexed: int) -> int:
    return max(MIN_QUERIES, MAX_PAIRS // indexed)


def _in_order(found: list[Pairs]) -> Pairs:
    """The pairs of one chunk as one, sorted by query and then by row."""
    if not found:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)
    i, j, scores = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((j, i))
    return i[order], j[order], scores[order]
