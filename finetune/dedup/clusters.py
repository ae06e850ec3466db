"""Read the embed stage's vectors and select rows by clusters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROUNDS = 20  # of k-means
TRAINING_ROWS = 256  # most per cluster: k-means learns its centres from a sample of larger data


def vectors_of(embedded: Path, ids: Sequence[str]) -> NDArray[np.float32] | None:
    """Return the vectors (N, d) of the rows `ids`, in that order; None if nothing was embedded."""
    if not (embedded / "vectors.npy").exists():
        return None
    import pyarrow.parquet as pq

    listed = pq.read_table(embedded / "ids.parquet").column("id").to_pylist()
    place = {row_id: i for i, row_id in enumerate(listed)}
    rows = np.array([place[row_id] for row_id in ids], np.int64)
    return np.asarray(np.load(embedded / "vectors.npy", mmap_mode="r", allow_pickle=False)[rows], np.float32)


def clustered(
    vectors: NDArray[np.float32], clusters: int, seed: int, check: Callable[[], None] = lambda: None
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return each row's cluster and squared distance to its centre: FAISS k-means from a fixed seed.

    The centres depend on the order of the rows, so pass them in an arbitrary fixed order. One thread computes the sums:
    otherwise the last digits of a centre would depend on the number of threads.

    Args:
        vectors: (N, d) float32, N ≥ 1.
        clusters: number of clusters, at most N.
        seed: selects the initial centres.
        check: called before the work; may raise to stop.
    """
    import faiss

    check()
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        means = faiss.Kmeans(
            vectors.shape[1],
            clusters,
            niter=ROUNDS,
            seed=seed % 2**31,
            min_points_per_centroid=1,  # only silences a warning
            max_points_per_centroid=TRAINING_ROWS,
        )
        rows = np.ascontiguousarray(vectors, np.float32)
        means.train(rows)
        distances, nearest = means.index.search(rows, 1)
    finally:
        faiss.omp_set_num_threads(threads)
    return nearest[:, 0], distances[:, 0]


def cluster_count(rows: int, wanted: int) -> int:
    """Return the default number of clusters: the square root of the rows, at most the rows wanted."""
    return max(1, min(wanted, rows, math.isqrt(rows)))


def by_turns(cluster: Sequence[int], distance: Sequence[float], names: Sequence[bytes]) -> list[int]:
    """Return row numbers in round-robin order over the clusters, nearest to the centre first.

    In a round the larger clusters come first. `names` are unique and break ties.
    """
    members: dict[int, list[int]] = {}
    for i in sorted(range(len(cluster)), key=lambda i: (distance[i], names[i])):
        members.setdefault(cluster[i], []).append(i)
    queues = sorted(members.values(), key=lambda rows: (-len(rows), names[rows[0]]))
    rounds = max(map(len, queues), default=0)
    return [rows[turn] for turn in range(rounds) for rows in queues if turn < len(rows)]
