"""Exact and near-duplicates: which rows go, why, and which rows must stay together.

Similarity is the cosine. A search works in float32 and may be off in the last digits by library, threads and tile size,
so every pair it finds within BAND of a threshold is scored again in float64 and the threshold is applied to that
figure, rounded to 12 decimals. What is kept does not depend on who searched or in which order sums were taken.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from finetune.records import Example

Vectors = NDArray[np.float32]
Rows = NDArray[np.int64]
BAND = 1e-4  # far above the error of a float32 inner product of unit vectors (about 1e-6 at 1,024 dimensions)
NORM_TOLERANCE = 2e-5
SCORE_DECIMALS = 12
RESCORE_ROWS = 4096
COPY = re.compile(r"~\d+$")
FIELD_ROLES = {"instruction": ("user",), "output": ("assistant",), "both": ("user", "assistant")}


class Search(Protocol):
    """An exact search over vectors that are added bit by bit."""

    def add(self, vectors: Vectors) -> None:
        """Append `vectors` (N, d); they get the next row numbers, from 0."""

    def pairs(self, queries: Vectors, score: float) -> Iterator[tuple[Rows, Rows, Vectors]]:
        """All (query row i, added row j, inner product) above `score`, in chunks that never divide a query."""


NewSearch = Callable[[int], Search]
"""Makes an empty search for vectors of that dimension."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A dropped row, the kept row it repeats (both as row numbers), and their cosine."""

    dropped: int
    kept: int
    score: float


def normalised(text: str) -> str:
    """`text` as exact duplicates compare it: Unicode NFKC, case folded, every run of whitespace one space.

    NFKC comes a second time because folding can bring back characters it would join (Unicode 3.13, D145).
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def cosines(a: Vectors, b: Vectors) -> NDArray[np.float64]:
    """Cosine of row i of `a` (n, d) with row i of `b` (n, d), in float64, rounded to 12 decimals; 0 for a zero row."""
    out = np.zeros(len(a), np.float64)
    for start in range(0, len(a), RESCORE_ROWS):
        x = a[start : start + RESCORE_ROWS].astype(np.float64)
        y = b[start : start + RESCORE_ROWS].astype(np.float64)
        # One square root of the product: the cosine of a row with itself is then exactly 1.
        norms = np.sqrt(np.einsum("ij,ij->i", x, x) * np.einsum("ij,ij->i", y, y))
        dots = np.einsum("ij,ij->i", x, y)
        out[start : start + len(x)] = np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0)
    return np.round(out, SCORE_DECIMALS)


def field_text(row: Example, field: str) -> str:
    """What of a row is compared: all user turns (`instruction`), all assistant turns (`output`) or `both`, in order.

    The text of a raw-text row is its whole text, whatever the field.
    """
    return row.joined(*FIELD_ROLES[field])


def text_key(text: str) -> bytes:
    """16 bytes that are equal for texts that are equal once normalised, and empty for a text that is then empty."""
    plain = normalised(text)
    return hashlib.blake2b(plain.encode(), digest_size=16).digest() if plain else b""


def copy_id(row_id: str, number: int) -> str:
    """The id of the `number`-th copy of a row; the first is the row itself."""
    return row_id if number == 1 else f"{row_id}~{number}"


def original_id(row_id: str) -> str:
    """The id of the row that `row_id` is a copy of, or `row_id`."""
    return COPY.sub("", row_id)


def exact_duplicates(keys: Sequence[Hashable], order: Iterable[int]) -> list[Pair]:
    """Rows whose key repeats that of a row earlier in `order`; an empty key (`""`, None) repeats nothing."""
    first: dict[Hashable, int] = {}
    pairs = []
    for row in order:
        kept = first.setdefault(keys[row], row)
        if kept != row and keys[row]:
            pairs.append(Pair(row, kept, 1.0))
    return pairs


def near_duplicates(
    vectors: Vectors,
    order: Sequence[int] | Rows,
    threshold: float,
    new_search: NewSearch,
    block_rows: int = 1024,
    check: Callable[[], None] = lambda: None,
) -> list[Pair]:
    """Greedy selection: rows are taken in `order`, one is dropped exactly when a kept row reaches `threshold` with it.

    So no two kept rows reach the threshold, and every dropped row is paired with a kept one that does: the best-scoring
    of those taken before it, the earlier in `order` on a tie. The result does not depend on `block_rows`.

    Args:
        vectors: (N, d) float32, every row of length 1, or all zero for a row that is like no other.
        order: the row numbers to look at, each once, those to be preferred first; other rows are left out.
        threshold: cosine in (0, 1] from which two rows count as duplicates.
        new_search: makes an empty exact search.
        block_rows: rows looked at together. Memory is N × d numbers for the kept rows plus a block's pairs.
        check: called between blocks; may raise to stop.

    Returns:
        One Pair per dropped row, in `order`.

    Raises:
        ValueError: rows are neither unit nor zero, or not finite.
    """
    rows = np.asarray(order, dtype=np.int64)
    rows = rows[_nonzero(vectors)[rows]]
    kept_search = new_search(vectors.shape[1])
    kept = np.empty(len(rows), np.int64)  # row numbers in the order they were added to the search
    count = 0
    pairs: list[Pair] = []
    for start in range(0, len(rows), block_rows):
        check()
        block = rows[start : start + block_rows]
        best = _Best(len(block))
        for i, j, scores in kept_search.pairs(vectors[block], threshold - BAND):
            best.take(i, kept[j], scores, vectors, block, threshold)
        fresh = np.flatnonzero(best.score < threshold)
        chosen = fresh[_greedy(vectors[block[fresh]], threshold, new_search)]
        inside = new_search(vectors.shape[1])
        inside.add(vectors[block[chosen]])
        for i, j, scores in inside.pairs(vectors[block], threshold - BAND):
            earlier = chosen[j] < i
            best.take(i[earlier], block[chosen[j[earlier]]], scores[earlier], vectors, block, threshold)
        hits = np.flatnonzero(best.score >= threshold)
        pairs += [Pair(int(block[i]), int(best.row[i]), float(best.score[i])) for i in hits]
        kept_search.add(vectors[block[chosen]])
        kept[count : count + len(chosen)] = block[chosen]
        count += len(chosen)
    return pairs


def groups(
    vectors: Vectors | None,
    keys: Iterable[Sequence[Hashable]],
    threshold: float,
    new_search: NewSearch,
    block_rows: int = 1024,
    check: Callable[[], None] = lambda: None,
) -> Rows:
    """The group of every row: rows are linked by an equal key or by a cosine at or above `threshold`, also in chains.

    Only a table of N parents is held, never the links, so a chain or a clique of any size costs no more memory.

    Args:
        vectors: (N, d) float32 unit or zero rows, or None to link by keys only.
        keys: lists of N keys each (say, texts); an empty key links nothing.
        threshold: cosine in (0, 1] from which two rows belong together.
        new_search: makes an empty exact search.
        block_rows: rows compared together.
        check: called between blocks; may raise to stop.

    Returns:
        (N,) int64, for every row the smallest row number in its group.

    Raises:
        ValueError: as `near_duplicates`, or the lengths differ.
    """
    lists = list(keys)
    sizes = {len(k) for k in lists} | ({len(vectors)} if vectors is not None else set())
    if len(sizes) != 1:
        raise ValueError(f"vectors and keys must be of one length, not {sorted(sizes)}")
    forest = _Forest(sizes.pop())
    for column in lists:
        twins = exact_duplicates(column, range(len(column)))
        forest.join(_numbers(p.dropped for p in twins), _numbers(p.kept for p in twins))
    if vectors is None or not len(vectors):
        return forest.roots()
    alive = np.flatnonzero(_nonzero(vectors))
    # Rows with the very same vector are one node: a group of 50,000 copies would else have 1.25 billion links.
    same = exact_duplicates([vectors[r].tobytes() for r in alive], range(len(alive)))
    copies = _numbers(p.dropped for p in same)
    forest.join(alive[copies], alive[_numbers(p.kept for p in same)])
    nodes = np.delete(alive, copies)
    search = new_search(vectors.shape[1])
    for start in range(0, len(nodes), block_rows):
        check()
        block = nodes[start : start + block_rows]
        search.add(vectors[block])
        for i, j, scores in search.pairs(vectors[block], threshold - BAND):
            forest.join_similar(block[i], nodes[j], scores, vectors, threshold)
    return forest.roots()


def links_between(
    left: Vectors, right: Vectors, threshold: float, new_search: NewSearch
) -> tuple[Rows, Rows, NDArray[np.float64]]:
    """The rows of `left` (N, d) that reach `threshold` with some row of `right` (M, d), that row, and their cosine.

    For each such row of `left` the best row of `right` is named, the first on a tie. Zero rows reach nothing.

    Raises:
        ValueError: as `near_duplicates`.
    """
    a, b = np.flatnonzero(_nonzero(left)), np.flatnonzero(_nonzero(right))
    both = np.concatenate([left[a], right[b]])
    search = new_search(left.shape[1])
    search.add(right[b])
    best = _Best(len(a))
    for i, j, scores in search.pairs(left[a], threshold - BAND):
        best.take(i, len(a) + j, scores, both, np.arange(len(a)), threshold)
    hits = np.flatnonzero(best.score >= threshold)
    return a[hits], b[best.row[hits] - len(a)], best.score[hits]


def _numbers(rows: Iterable[int]) -> Rows:
    return np.fromiter(rows, np.int64)


def _nonzero(vectors: Vectors) -> NDArray[np.bool_]:
    """Which rows are not all zero; refuses rows of any other length than 0 or 1."""
    squares = np.einsum("ij,ij->i", vectors, vectors)
    bad = ~((squares == 0) | (np.abs(squares - 1) <= 2 * NORM_TOLERANCE))  # NaN fails both
    if bad.any():
        row = int(np.argmax(bad))
        raise ValueError(f"row {row} has length {float(np.sqrt(squares[row])):.6g}; vectors must have length 1 or 0")
    nonzero: NDArray[np.bool_] = squares > 0
    return nonzero


class _Best:
    """For each row of a block, the best-scoring partner seen so far (a row number), in float64."""

    def __init__(self, rows: int) -> None:
        self.score = np.full(rows, -np.inf)
        self.row = np.full(rows, -1, np.int64)

    def take(self, i: Rows, partner: Rows, scores: Vectors, vectors: Vectors, block: Rows, threshold: float) -> None:
        """Look at float32 `scores` of block rows `i` (sorted) with rows `partner`, the preferred partner first."""
        if not len(i):
            return
        # Only partners that could be the best in float64 are scored again.
        starts = np.flatnonzero(np.r_[True, i[1:] != i[:-1]])
        top = np.repeat(np.maximum.reduceat(scores, starts), np.diff(np.r_[starts, len(i)]))
        near = scores >= top - 2 * BAND
        i, partner = i[near], partner[near]
        for start in range(0, len(i), RESCORE_ROWS):
            part, other = i[start : start + RESCORE_ROWS], partner[start : start + RESCORE_ROWS]
            exact = cosines(vectors[block[part]], vectors[other])
            order = np.lexsort((np.arange(len(part)), -exact, part))  # per row: best first, then the earlier one
            first = order[np.r_[True, part[order][1:] != part[order][:-1]]]
            better = first[(exact[first] >= threshold) & (exact[first] > self.score[part[first]])]
            self.score[part[better]] = exact[better]
            self.row[part[better]] = other[better]


def _greedy(vectors: Vectors, threshold: float, new_search: NewSearch) -> Rows:
    """Which of a few rows (n, d) the greedy rule keeps among themselves, in their order."""
    search = new_search(vectors.shape[1])
    search.add(vectors)
    dropped_by: list[list[int]] = [[] for _ in range(len(vectors))]
    for i, j, scores in search.pairs(vectors, threshold - BAND):
        later = i > j
        reach = _reaches(vectors, i[later], j[later], scores[later], threshold)
        for row, earlier in zip(i[later][reach].tolist(), j[later][reach].tolist(), strict=True):
            dropped_by[row].append(earlier)
    keep = np.zeros(len(vectors), bool)
    for row, earlier_rows in enumerate(dropped_by):
        keep[row] = not any(keep[e] for e in earlier_rows)
    return np.flatnonzero(keep)


def _reaches(vectors: Vectors, i: Rows, j: Rows, scores: Vectors, threshold: float) -> NDArray[np.bool_]:
    """Which pairs reach the threshold; those within BAND of it are decided in float64."""
    reach = scores >= threshold
    close = np.flatnonzero(np.abs(scores - threshold) <= BAND)
    for start in range(0, len(close), RESCORE_ROWS):
        part = close[start : start + RESCORE_ROWS]
        reach[part] = cosines(vectors[i[part]], vectors[j[part]]) >= threshold
    return reach


class _Forest:
    """Union-find over row numbers, by whole arrays of links; the root is the smallest row of a group."""

    def __init__(self, rows: int) -> None:
        self._parent = np.arange(rows)

    def roots(self) -> Rows:
        """(N,) the root of every row; also shortens every path to one step."""
        while True:
            shorter = self._parent[self._parent]
            if np.array_equal(shorter, self._parent):
                return self._parent.copy()
            self._parent = shorter

    def join(self, a: Rows, b: Rows) -> None:
        """Link row `a[k]` with row `b[k]` for every k.

        Each round hangs every root under the smallest root it has a link to, which at least halves the groups that
        still have links between them: a clique of a million links takes a handful of rounds, and so does a chain.
        """
        while len(a):
            roots = self.roots()
            a, b = roots[a], roots[b]
            a, b = a[a != b], b[a != b]
            np.minimum.at(self._parent, np.maximum(a, b), np.minimum(a, b))

    def join_similar(self, i: Rows, j: Rows, scores: Vectors, vectors: Vectors, threshold: float) -> None:
        """Link the pairs that reach `threshold`; a pair that is in one group already is not scored again."""
        sure = scores > threshold + BAND
        self.join(i[sure], j[sure])
        roots = self.roots()
        unsure = np.flatnonzero(~sure & (roots[i] != roots[j]))
        reach = unsure[_reaches(vectors, i[unsure], j[unsure], scores[unsure], threshold)]
        self.join(i[reach], j[reach])
