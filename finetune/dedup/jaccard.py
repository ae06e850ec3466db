"""Rows as sets of word n-grams; find all pairs whose exact Jaccard similarity reaches a threshold.

Pairs are found by prefix filtering (AllPairs, Bayardo et al. 2007; PPJoin, Xiao et al. 2008). With the n-grams of every
row in one order, rarest first, two sets x and y of Jaccard similarity t or more share one among the first
|x| - ⌈t·|x|⌉ + 1 of x and the first |y| - ⌈t·|y|⌉ + 1 of y, because they share at least t·max(|x|, |y|). Every
candidate is then counted, so the result is exact except that n-grams are compared by a 64-bit hash.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from finetune.data.text import field_text, normalised
from finetune.dedup.measures import HERE, Rows, Scores, Sharding

if TYPE_CHECKING:
    from finetune.data.records import RowRange
    from finetune.engine.interface import Engine

WORD_OR_SIGN = re.compile(r"\w+|[^\w\s]")  # punctuation counts: `a < b` and `a <= b` are two different answers
CHUNK_WORDS = 1 << 20
PART_ROWS = 8192
MAX_CANDIDATES = 4_000_000  # per batch; 16 bytes each
SLACK = 1e-9  # rounding of t·|x| in float64 must not shorten a prefix
Tokens = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Sets:
    """N sets. N-grams are numbered by frequency, rarest first; those of a single set are only counted, not stored.

    Attributes:
        tokens: (M,) the stored n-grams of all sets, concatenated, ascending within a set.
        starts: (N + 1,) offset of each set in `tokens`.
        sizes: (N,) number of n-grams of each set, stored or not.
        kinds: number of different stored n-grams.
    """

    tokens: Tokens
    starts: Rows
    sizes: Rows
    kinds: int

    def __len__(self) -> int:
        """Return the number of sets."""
        return len(self.sizes)

    def take(self, rows: Rows) -> Sets:
        """Return the sets of `rows`, in that order."""
        lengths = self.starts[rows + 1] - self.starts[rows]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        return Sets(self.tokens[ranges(self.starts[rows], lengths)], starts, self.sizes[rows], self.kinds)


def word_sets(texts: Sequence[str], ngram: int, engine: Engine = HERE) -> Sets:
    """Return the set of n-grams of `ngram` words or signs of each text (NFKC, case folded).

       A shorter text is one n-gram.
    A text without words is the empty set, whose similarity with any set is 0.
    """
    parts = [texts[start : start + PART_ROWS] for start in range(0, len(texts), PART_ROWS)]
    return _numbered(engine.map(partial(_hasher, ngram), parts, len(texts)), engine)


def row_sets(parts: Sequence[RowRange], field: str, ngram: int, engine: Engine = HERE) -> Sets:
    """Return the sets of the texts that `field` compares, of all rows of `parts`."""
    rows = sum(part.stop - part.start for part in parts)
    return _numbered(engine.map(partial(_hasher, ngram, field), parts, rows), engine)


def jaccard(left: Sets, i: Rows, right: Sets, j: Rows) -> Scores:
    """Return |x ∩ y| / |x ∪ y| of set i[k] of `left` and set j[k] of `right`, float64; `i` is ascending."""
    common = np.zeros(len(i), np.int64)
    here = np.zeros(max(left.kinds, 1), bool)
    lengths = right.starts[j + 1] - right.starts[j]
    bounds = np.flatnonzero(np.r_[True, i[1:] != i[:-1], True]) if len(i) else np.zeros(0, np.int64)
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        own = left.tokens[left.starts[i[start]] : left.starts[i[start] + 1]]
        here[own] = True
        step = max(1, MAX_CANDIDATES // max(1, int(lengths[start:stop].max())))
        for low in range(start, stop, step):
            part = slice(low, min(low + step, stop))
            shared = here[right.tokens[ranges(right.starts[j[part]], lengths[part])]]
            ends = np.concatenate([[0], np.cumsum(shared)])
            edges = np.concatenate([[0], np.cumsum(lengths[part])])
            common[part] = ends[edges[1:]] - ends[edges[:-1]]
        here[own] = False
    scores: Scores = common / np.maximum(left.sizes[i] + right.sizes[j] - common, 1)
    return scores


class SetSearch:
    """Incremental search for all added sets whose Jaccard similarity with a query reaches a threshold.

    Holds every added set once, and a posting (8 bytes) for each n-gram of its prefix.
    """

    def __init__(self, threshold: float) -> None:
        """An empty search for similarities of at least `threshold`, in (0, 1]."""
        self._threshold = threshold
        self._parts: list[Sets] = []
        self._postings: list[tuple[Tokens, NDArray[np.int32]]] = []  # (n-gram, ascending; set), the longest list first
        self._count = 0

    def add(self, sets: Sets) -> None:
        """Append `sets`; they get the next numbers, from 0."""
        owner, tokens = self._prefixes(sets)
        self._push(tokens, (owner + self._count).astype(np.int32))
        self._parts.append(sets)
        self._count += len(sets)
        while len(self._parts) > 1 and len(self._parts[-2].tokens) <= 2 * len(self._parts[-1].tokens):
            self._parts[-2:] = [_joined(self._parts[-2], self._parts[-1])]

    def pairs(self, queries: Sets, score: float) -> Iterator[tuple[Rows, Rows, Scores]]:
        """Yield every (query i, added set j, similarity) of at least `score`, sorted; chunks end between queries.

        `score` must be at least the threshold of the search.
        """
        owner, tokens = self._prefixes(queries)
        spans = [(np.searchsorted(t, tokens), np.searchsorted(t, tokens, "right"), s) for t, s in self._postings]
        cost = np.zeros(len(queries) + 1, np.int64)
        for low, high, _ in spans:
            cost[1:] += np.bincount(owner, high - low, minlength=len(queries)).astype(np.int64)
        total = np.cumsum(cost)
        start = 0
        while start < len(queries):
            stop = max(start + 1, int(np.searchsorted(total, total[start] + MAX_CANDIDATES, "right")) - 1)
            some = slice(*np.searchsorted(owner, [start, stop]))
            i, j = self._candidates(queries, owner[some], [(low[some], high[some], s) for low, high, s in spans])
            yield from self._verified(queries, i, j, score)
            start = stop

    def _verified(self, queries: Sets, i: Rows, j: Rows, score: float) -> Iterator[tuple[Rows, Rows, Scores]]:
        overlaps = np.zeros(len(i), np.float64)
        base = 0
        for part in self._parts:
            here = np.flatnonzero((j >= base) & (j < base + len(part)))
            overlaps[here] = jaccard(queries, i[here], part, j[here] - base)
            base += len(part)
        reach = overlaps >= score
        if reach.any():
            yield i[reach], j[reach], overlaps[reach]

    def _candidates(
        self, queries: Sets, owner: Rows, spans: list[tuple[Rows, Rows, NDArray[np.int32]]]
    ) -> tuple[Rows, Rows]:
        """Return the pairs that share an n-gram of their prefixes and have compatible sizes, each once."""
        codes = [np.zeros(0, np.int64)]
        for low, high, sets in spans:
            j = sets[ranges(low, high - low)].astype(np.int64)
            i = np.repeat(owner, high - low)
            a, b = queries.sizes[i], self._sizes()[j]
            fits = np.minimum(a, b) >= self._threshold * np.maximum(a, b) - SLACK
            codes.append(i[fits] * self._count + j[fits])
        unique = np.unique(np.concatenate(codes))
        return unique // max(self._count, 1), unique % max(self._count, 1)

    def _sizes(self) -> Rows:
        return np.concatenate([part.sizes for part in self._parts])

    def _prefixes(self, sets: Sets) -> tuple[Rows, Tokens]:
        """Return (set, n-gram) of every prefix without n-grams of a single set, which match nothing."""
        stored = sets.starts[1:] - sets.starts[:-1]
        prefix = sets.sizes - np.ceil(self._threshold * sets.sizes - SLACK).astype(np.int64) + 1
        lengths = np.clip(prefix - (sets.sizes - stored), 0, stored)
        return np.repeat(np.arange(len(sets)), lengths), sets.tokens[ranges(sets.starts[:-1], lengths)]

    def _push(self, tokens: Tokens, sets: NDArray[np.int32]) -> None:
        """Add postings; lists of similar length are merged, so that there are few and numbers are moved few times."""
        while True:
            order = np.argsort(tokens, kind="stable")
            tokens, sets = tokens[order], sets[order]
            if not self._postings or len(self._postings[-1][0]) > 2 * len(tokens):
                break
            before, owners = self._postings.pop()
            tokens, sets = np.concatenate([before, tokens]), np.concatenate([owners, sets])
        self._postings.append((tokens, sets))


@dataclass(frozen=True)
class Jaccard:
    """Measure for `select`: rows are near-duplicates if their Jaccard similarity is at least `threshold`."""

    sets: Sets
    threshold: float
    name: str = "minhash"
    band: float = 0.0  # scores are exact

    def search(self) -> SetSearch:
        """An empty search."""
        return SetSearch(self.threshold)

    def features(self, rows: Rows) -> Sets:
        """Return the sets of `rows`."""
        return self.sets.take(rows)

    def sharding(self) -> Sharding:
        """Rows by turns, each with the postings of its prefix."""
        return Sharding(partial(SetSearch, self.threshold), self.features)

    def settled(self, a: Rows, b: Rows, scores: Scores) -> Scores:
        """Return the scores unchanged: they are exact."""
        return scores


def _code(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele et al. 2014): every bit of the result depends on every bit of `x`."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _hasher(ngram: int, field: str | None = None) -> Callable[[Any], tuple[NDArray[np.uint64], Rows]]:
    """Build the function from texts, or from a range of rows, to their different n-grams and how many each text has."""
    codes: dict[str, int] = {}

    def hashed(part: Any) -> tuple[NDArray[np.uint64], Rows]:  # noqa: ANN401 - texts, or a RowRange
        texts: Iterable[str] = part if field is None else (field_text(row, field) for row in part.read())
        hashes, sizes = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        batch: list[list[int]] = []
        pending = 0
        for text in chain(texts, (None,)):
            if text is None or pending >= CHUNK_WORDS:
                found, row = _runs(batch, ngram)
                hashes.append(found)
                sizes.append(np.bincount(row, minlength=len(batch)))
                batch, pending = [], 0
            words = WORD_OR_SIGN.findall(normalised(text or ""))
            batch.append([codes[w] if w in codes else codes.setdefault(w, _code(w)) for w in words])
            pending += len(words)
        return np.concatenate(hashes), np.concatenate(sizes)

    return hashed


def _runs(batch: list[list[int]], ngram: int) -> tuple[NDArray[np.uint64], Rows]:
    """Return each different n-gram of each text of `batch`, and the text's place."""
    lengths = np.array([len(words) for words in batch], np.int64)
    words = np.fromiter((w for row in batch for w in row), np.uint64, int(lengths.sum()))
    ends = np.cumsum(lengths)
    runs = np.where(lengths > 0, np.maximum(lengths - ngram + 1, 1), 0)
    at = ranges(ends - lengths, runs)
    row = np.repeat(np.arange(len(batch)), runs)
    code = np.zeros(len(at), np.uint64)
    for k in range(ngram):
        inside = at + k < ends[row]  # a text shorter than `ngram` is one n-gram of all its words
        code[inside] = _mixed(code[inside] * np.uint64(0x9E3779B97F4A7C15) + words[at[inside] + k])
    order = np.lexsort((code, row))
    code, row = code[order], row[order]
    new = np.ones(len(code), bool)
    new[1:] = (code[1:] != code[:-1]) | (row[1:] != row[:-1])
    return code[new], row[new]


def _numbered(hashed: Iterable[tuple[NDArray[np.uint64], Rows]], engine: Engine) -> Sets:
    parts = [(np.empty(0, np.uint64), np.empty(0, np.int64)), *hashed]
    sizes = np.concatenate([size for _, size in parts])
    owners = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    kind, frequency = engine.group(np.concatenate([found for found, _ in parts]))
    rank = np.empty(len(frequency), np.int32)
    rank[np.argsort(frequency, kind="stable")] = np.arange(len(frequency), dtype=np.int32)
    alone = int((frequency == 1).sum())
    shared = frequency[kind] > 1
    tokens, owners = rank[kind[shared]] - np.int32(alone), owners[shared]
    tokens = tokens[np.lexsort((tokens, owners))]
    starts = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=len(sizes)))]).astype(np.int64)
    return Sets(tokens, starts, sizes, len(frequency) - alone)


def ranges(starts: Rows, lengths: Rows) -> Rows:
    """Return the concatenated ranges of lengths[k] numbers from starts[k]."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))


def _joined(a: Sets, b: Sets) -> Sets:
    starts = np.concatenate([a.starts, b.starts[1:] + a.starts[-1]])
    return Sets(np.concatenate([a.tokens, b.tokens]), starts, np.concatenate([a.sizes, b.sizes]), a.kinds)
