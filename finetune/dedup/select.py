"""Exact and near-duplicates: rows to drop with their reason, and groups of rows that must stay together."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from finetune.dedup.measures import (
    HERE,
    Best,
    Cosine,
    Index,
    Measure,
    NewSearch,
    Rows,
    Scores,
    Search,
    Vectors,
    nonzero,
    reaches,
)

if TYPE_CHECKING:
    from finetune.engine.interface import Engine

MOST_PAIRS = 8_000_000  # within a block of rows; about 40 bytes each
FEW_ROWS = 2048
COPY = re.compile(r"~\d+$")


@dataclass(frozen=True, slots=True)
class Pair:
    """A dropped row, the kept row it repeats (both as row numbers), their score and the method."""

    dropped: int
    kept: int
    score: float
    method: str = "embedding"


def copy_id(row_id: str, number: int) -> str:
    """Return the id of the `number`-th copy of a row; the first is the row itself."""
    return row_id if number == 1 else f"{row_id}~{number}"


def original_id(row_id: str) -> str:
    """Return the id of the row that `row_id` is a copy of, or `row_id`."""
    return COPY.sub("", row_id)


def equal_texts(keys: Sequence[bytes], engine: Engine = HERE) -> list[int]:
    """Return a number for every key (of `text_key`, 16 bytes), the same one for equal keys; 0 for an empty key."""
    halves = np.frombuffer(b"".join(key or bytes(16) for key in keys), np.uint64).reshape(-1, 2)
    number, _ = engine.group(halves[:, 0])
    other = np.zeros(len(keys), np.uint64)
    other[number] = halves[:, 1]
    if (other[number] != halves[:, 1]).any():  # two keys that share their first half
        number = np.unique(halves, axis=0, return_inverse=True)[1].ravel().astype(np.int32)
    return [int(n) + 1 if key else 0 for n, key in zip(number, keys, strict=True)]


def exact_duplicates(keys: Sequence[Hashable], order: Iterable[int]) -> list[Pair]:
    """Return rows whose key equals that of a row earlier in `order`; an empty key (`""`, None) equals nothing."""
    first: dict[Hashable, int] = {}
    pairs = []
    for row in order:
        kept = first.setdefault(keys[row], row)
        if kept != row and keys[row]:
            pairs.append(Pair(row, kept, 1.0, "exact"))
    return pairs


def select(
    order: Sequence[int] | Rows,
    keys: Sequence[Hashable] | None,
    measures: Sequence[Measure],
    block_rows: int = 1024,
    check: Callable[[], None] = lambda: None,
    engine: Engine = HERE,
) -> list[Pair]:
    """Select rows greedily in `order`: a row is dropped exactly if it matches a row kept before it.

    Two rows match if they have the same key or reach the threshold of one of `measures`. So no two kept rows match, and
    every dropped row is paired with a kept one: the one with the same key ("exact"), else the best-scoring one of the
    first measure that has one, the earlier in `order` on a tie. The result does not depend on `block_rows`.

    Args:
        order: the row numbers to compare, each once, preferred rows first; other rows are left out.
        keys: a key for every row number, or None; an empty key (`""`, None) matches nothing.
        measures: the similarity measures.
        block_rows: rows compared together; fewer, if many of them match each other. Memory is the features of the
            kept rows plus a block's pairs.
        check: called between blocks; may raise to stop.
        engine: holds the kept rows.

    Returns:
        One Pair per dropped row, in `order`.
    """
    rows = np.asarray(order, dtype=np.int64)
    known: Sequence[Hashable] = keys if keys is not None else [None] * (int(rows.max(initial=-1)) + 1)
    searches = [Index(m, engine, len(rows)) for m in measures]
    kept = np.empty(len(rows), np.int64)  # row numbers in the order they were added to the searches
    count = 0
    by_key: dict[Hashable, int] = {}  # of the kept rows
    pairs: list[Pair] = []
    start, size = 0, block_rows
    while start < len(rows):
        check()
        block = rows[start : start + size]
        best = [Best(block, m) for m in measures]
        fresh = np.array([p for p, r in enumerate(block.tolist()) if known[r] not in by_key], np.int64)
        for matches, measure, search in zip(best, measures, searches, strict=True):
            for i, j, scores in search.pairs(block[fresh], measure.threshold - measure.band):
                matches.take(fresh[i], kept[j], scores)
            fresh = fresh[matches.row[fresh] < 0]
        among = _greedy(block[fresh], known, measures)
        if among is None:
            size = len(block) // 2
            continue
        chosen = fresh[among]
        twins = _twins_by_key(block, chosen, known, by_key)
        left = np.array([p for p in range(len(block)) if p not in twins], np.int64)
        left = left[~np.isin(left, chosen)]
        for matches, measure, search in zip(best, measures, searches, strict=True):
            _take_earlier(matches, measure, block, chosen, left)
            left = left[matches.row[left] < 0]
            search.add(block[chosen])
        kept[count : count + len(chosen)] = block[chosen]
        count += len(chosen)
        pairs += _named(block, twins, measures, best)
        start, size = start + len(block), min(2 * size, block_rows)
    return pairs


def groups(
    vectors: Vectors | None,
    keys: Iterable[Sequence[Hashable]],
    threshold: float,
    new_search: NewSearch,
    block_rows: int = 1024,
    check: Callable[[], None] = lambda: None,
    measure: Cosine | None = None,
    engine: Engine = HERE,
) -> Rows:
    """Return the group of every row: rows are linked by an equal key or a cosine of at least `threshold`, transitively.

    Only a table of N parents is held, never the links, so chains and cliques of any size need no more memory.

    Args:
        vectors: (N, d) float32 unit or zero rows, or None to link by keys only.
        keys: lists of N keys each (say, texts); an empty key links nothing.
        threshold: cosine in (0, 1] from which two rows belong together.
        new_search: creates an empty exact search.
        block_rows: rows compared together.
        check: called between blocks; may raise to stop.
        measure: the cosine of these vectors and threshold, if its search is not `new_search`.
        engine: holds the vectors.

    Returns:
        (N,) int64, for every row the smallest row number in its group.

    Raises:
        ValueError: rows are neither unit nor zero, or not finite, or the lengths differ.
    """
    lists = list(keys)
    sizes = {len(k) for k in lists} | ({len(vectors)} if vectors is not None else set())
    if len(sizes) != 1:
        raise ValueError(f"vectors and keys must have the same length, found {sorted(sizes)}")
    forest = _Forest(sizes.pop())
    for column in lists:
        twins = exact_duplicates(column, range(len(column)))
        forest.join(_numbers(p.dropped for p in twins), _numbers(p.kept for p in twins))
    if vectors is None or not len(vectors):
        return forest.roots()
    measure = measure or Cosine(vectors, threshold, new_search)
    alive = np.flatnonzero(nonzero(vectors))
    # Rows with identical vectors are one node: otherwise a group of 50,000 copies would have 1.25 billion links.
    digests = [hashlib.blake2b(vectors[r].tobytes(), digest_size=16).digest() for r in alive]
    same = exact_duplicates(digests, range(len(alive)))
    copies = _numbers(p.dropped for p in same)
    forest.join(alive[copies], alive[_numbers(p.kept for p in same)])
    nodes = np.delete(alive, copies)
    search = Index(measure, engine, len(nodes))
    for start in range(0, len(nodes), block_rows):
        check()
        block = nodes[start : start + block_rows]
        search.add(block)
        for i, j, scores in search.pairs(block, threshold - measure.band):
            forest.join_similar(measure, block[i], nodes[j], scores)
    return forest.roots()


def joined(group: Sequence[int], links: Iterable[tuple[int, int]]) -> list[int]:
    """Return the group of every row as `groups` does, after linking further pairs of rows."""
    forest = _Forest(len(group))
    pairs = [*enumerate(group), *links]
    forest.join(_numbers(a for a, _ in pairs), _numbers(b for _, b in pairs))
    return [int(root) for root in forest.roots()]


def links_between(left: Vectors, right: Vectors, threshold: float, new_search: NewSearch) -> tuple[Rows, Rows, Scores]:
    """Return the rows of `left` (N, d) that reach `threshold` with a row of `right` (M, d), that row, and their cosine.

    The best row of `right` is returned for each, the first on a tie. Zero rows match nothing.

    Raises:
        ValueError: rows are neither unit nor zero, or not finite.
    """
    a, b = np.flatnonzero(nonzero(left)), np.flatnonzero(nonzero(right))
    measure = Cosine(np.concatenate([left[a], right[b]]), threshold, new_search)
    rows, partners, scores = _best_partners(measure, np.arange(len(a)), np.arange(len(a), len(a) + len(b)))
    return a[rows], b[partners - len(a)], scores


def repeats_of(
    rows: Rows, others: Rows, keys: Sequence[Hashable] | None, measures: Sequence[Measure], engine: Engine = HERE
) -> list[Pair]:
    """Return the `rows` that match one of `others`, each with the row it repeats, in order; the first measure decides.

    Rows match as in `select`: the same key, or the threshold of one of `measures`. Every pair counts, even if `others`
    match each other.
    """
    pair_of: dict[int, Pair] = {}
    if keys is not None:
        first: dict[Hashable, int] = {}
        for other in others.tolist():
            first.setdefault(keys[other], other)
        pair_of = {r: Pair(r, first[keys[r]], 1.0, "exact") for r in rows.tolist() if keys[r] and keys[r] in first}
    for measure in measures:
        for row, other, score in zip(
            *(part.tolist() for part in _best_partners(measure, rows, others, engine)), strict=True
        ):
            pair_of.setdefault(row, Pair(row, other, score, measure.name))
    return [pair_of[row] for row in sorted(pair_of)]


def _best_partners(measure: Measure, rows: Rows, others: Rows, engine: Engine = HERE) -> tuple[Rows, Rows, Scores]:
    """Return the `rows` that reach the threshold with one of `others`, the best one (the first on a tie), the score."""
    search = Index(measure, engine, len(rows) + len(others))
    search.add(others)
    best = Best(rows, measure)
    for i, j, scores in search.pairs(rows, measure.threshold - measure.band):
        best.take(i, others[j], scores)
    hits = np.flatnonzero(best.row >= 0)
    return rows[hits], best.row[hits], best.score[hits]


def _take_earlier(matches: Best, measure: Measure, block: Rows, chosen: Rows, left: Rows) -> None:
    """Update `found` for the positions `left` of a block from the positions `chosen` before each."""
    if not len(chosen) or not len(left):
        return
    inside = measure.search()
    inside.add(measure.features(block[chosen]))
    for i, j, scores in inside.pairs(measure.features(block[left]), measure.threshold - measure.band):
        earlier = chosen[j] < left[i]
        matches.take(left[i[earlier]], block[chosen[j[earlier]]], scores[earlier])


def _twins_by_key(block: Rows, chosen: Rows, keys: Sequence[Hashable], by_key: dict[Hashable, int]) -> dict[int, int]:
    """Return position in the block → the row with its key kept before it; adds the chosen ones to `by_key`."""
    keeps = set(chosen.tolist())
    twins = {}
    for place, row in enumerate(block.tolist()):
        if place in keeps:
            if keys[row]:
                by_key[keys[row]] = row
        elif keys[row] in by_key:
            twins[place] = by_key[keys[row]]
    return twins


def _named(block: Rows, twins: dict[int, int], measures: Sequence[Measure], best: Sequence[Best]) -> list[Pair]:
    """Return the pair of every dropped row of a block."""
    pairs = []
    for place, row in enumerate(block.tolist()):
        if place in twins:
            pairs.append(Pair(row, twins[place], 1.0, "exact"))
            continue
        for measure, matches in zip(measures, best, strict=True):
            if matches.row[place] >= 0:
                pairs.append(Pair(row, int(matches.row[place]), float(matches.score[place]), measure.name))
                break
    return pairs


def _numbers(rows: Iterable[int]) -> Rows:
    return np.fromiter(rows, np.int64)


def _greedy(rows: Rows, keys: Sequence[Hashable], measures: Sequence[Measure]) -> Rows | None:
    """Return the positions, in order, of the rows (n,) that the greedy rule keeps among themselves.

    None if these are many rows with more than MOST_PAIRS pairs: then fewer are to be asked together.
    """
    found = 0
    dropped_by: list[list[int]] = [[] for _ in range(len(rows))]
    for measure in measures:
        search: Search = measure.search()
        features = measure.features(rows)
        search.add(features)
        for i, j, scores in search.pairs(features, measure.threshold - measure.band):
            later = i > j
            i, j, scores = i[later], j[later], scores[later]
            reach = reaches(measure, rows[i], rows[j], scores)
            found += int(reach.sum())
            if found > MOST_PAIRS and len(rows) > FEW_ROWS:
                return None
            for row, earlier in zip(i[reach].tolist(), j[reach].tolist(), strict=True):
                dropped_by[row].append(earlier)
    keep = np.zeros(len(rows), bool)
    seen: set[Hashable] = set()
    for place, earlier_places in enumerate(dropped_by):
        key = keys[rows[place]]
        keep[place] = key not in seen and not any(keep[e] for e in earlier_places)
        if keep[place] and key:
            seen.add(key)
    return np.flatnonzero(keep)


class _Forest:
    """Union-find over row numbers with vectorised links; the root is the smallest row of a group."""

    def __init__(self, rows: int) -> None:
        self._parent = np.arange(rows)

    def roots(self) -> Rows:
        """Return (N,) the root of every row; compresses all paths."""
        while True:
            shorter = self._parent[self._parent]
            if np.array_equal(shorter, self._parent):
                return self._parent.copy()
            self._parent = shorter

    def join(self, a: Rows, b: Rows) -> None:
        """Link row `a[k]` with row `b[k]` for every k.

        Each round attaches every root to the smallest root it is linked to, which at least halves the number of groups
        that still have links between them: a clique of a million links takes a few rounds, and so does a chain.
        """
        while len(a):
            roots = self.roots()
            a, b = roots[a], roots[b]
            a, b = a[a != b], b[a != b]
            np.minimum.at(self._parent, np.maximum(a, b), np.minimum(a, b))

    def join_similar(self, measure: Measure, i: Rows, j: Rows, scores: Vectors) -> None:
        """Link the pairs that reach the threshold; pairs already in one group are not scored again."""
        sure = scores > measure.threshold + measure.band
        self.join(i[sure], j[sure])
        roots = self.roots()
        unsure = np.flatnonzero(~sure & (roots[i] != roots[j]))
        reach = unsure[reaches(measure, i[unsure], j[unsure], scores[unsure])]
        self.join(i[reach], j[reach])
