"""Make any number of rows by recombining real sentences, with the near-duplicate pairs per row of the real data.

The real rows are grouped by cosine (split's groups, 0.9). Every copy of the data replaces, group by group, each
sentence that at least half of a group's rows share by a random real sentence of like length, the same one in all rows
of the group: rows that were near-duplicates still are, and rows of different groups share no more than random
rows do. Sentences that few rows of a group share stay as they are: they make the difference between its rows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

SENTENCE = re.compile(r"(?<=[.!?:])\s+|\n+")


def sentences(text: str) -> list[str]:
    """The sentences of a text."""
    return [s for s in SENTENCE.split(text) if s.strip()]


def recombined(
    texts: Sequence[str], group: Sequence[int], count: int, seed: int = 0
) -> Iterator[tuple[int, list[str]]]:
    """Yield `count` pairs (number of the real row, its sentences recombined), given the group of every real row."""
    parts = [sentences(text) for text in texts]
    pool: dict[int, list[str]] = {}
    for sentence in sorted({s for row in parts for s in row}):
        pool.setdefault(_length(sentence), []).append(sentence)
    members: dict[int, list[int]] = {}
    for row, g in enumerate(group):
        members.setdefault(int(g), []).append(row)
    rng = np.random.default_rng(seed)
    made = 0
    while made < count:
        order = list(members.values())
        for k in rng.permutation(len(order)).tolist():
            rows = order[k]
            held = Counter(s for row in rows for s in set(parts[row]))
            shared = {s for s, n in held.items() if 2 * n >= len(rows)}
            new = {s: _other(pool[_length(s)], rng) for s in sorted(shared)}
            for row in rows:
                yield row, [new.get(s, s) for s in parts[row]]
                made += 1
                if made == count:
                    return


def _length(sentence: str) -> int:
    return min(len(sentence.split()), 40) // 2


def _other(pool: Sequence[str], rng: np.random.Generator) -> str:
    return pool[int(rng.integers(len(pool)))]
