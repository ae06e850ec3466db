"""Which near-duplicate groups are held out, and the proof that no near-duplicate is on both sides."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.errors import GateRefused
from finetune.recipe import Split

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Names:
    """How messages name the fields that decide the held-out share, and what to do instead of holding rows out."""

    stage: str = "split"
    fraction: str = "split.eval_fraction"
    most: str = "split.max_eval_rows"
    instead: str = "or write `split: null` to train without held-out rows"


PART_ROWS = 65_536  # compared together, so that their vectors are not copied whole
SHARE_OF_ONE_GROUP = 0.1  # no group fills more of the held-out rows while smaller ones are to be had


def choose(group: Sequence[int], names: Sequence[bytes], split: Split, seed: int, words: Names = Names()) -> set[int]:
    """The groups to hold out, never more rows than the recipe allows.

    Groups come in the order of a hash of seed and text, so few change sides when other rows come or go. Groups over a
    tenth of the allowance wait until all smaller ones were asked: one theme should not be half of the evaluation.

    Args:
        group: each row's group.
        names: each row's normalised text, or a digest of it.
        split: the recipe's section.
        seed: the recipe's seed.
        words: how a refusal names the fields.

    Raises:
        GateRefused: one side would be empty.
    """
    rows = len(group)
    sizes = Counter(group)
    # The small term undoes 0.29 * 100 = 28.999…
    allowed = min(math.floor(split.eval_fraction * rows + 1e-9), split.max_eval_rows, rows - 1)
    order: dict[int, bytes] = {}
    for g, name in zip(group, names, strict=True):
        rank = hashlib.blake2b(b"%d\n%s" % (seed, name), digest_size=16).digest()
        order[g] = min(order.get(g, rank), rank)
    small = max(1, math.floor(SHARE_OF_ONE_GROUP * allowed))
    ranked = sorted(order, key=lambda g: (sizes[g] > small and sizes[g], order[g], g))
    chosen: set[int] = set()
    left = allowed
    for g in ranked:
        if sizes[g] <= left:
            chosen.add(g)
            left -= sizes[g]
    if not chosen:
        raise GateRefused(_why_empty(rows, allowed, sizes, split, words))
    return chosen


def _why_empty(rows: int, allowed: int, sizes: Mapping[int, int], split: Split, words: Names) -> str:
    stage, turn_off = words.stage, words.instead
    if rows < 2:
        return f"{stage}: there {'is 1 row' if rows else 'are no rows'}, too few for two sides; add data, {turn_off}"
    smallest = min(sizes.values())
    if len(sizes) == 1:
        return (
            f"{stage}: all {rows} rows are one near-duplicate group at split.group_threshold {split.group_threshold}, "
            "so nothing can be held out that is not also trained on; add other data, raise split.group_threshold, "
            f"{turn_off}"
        )
    least = math.ceil(smallest / rows * 1e4) / 1e4
    advice = f"raise {words.fraction} to {least:g} or more" if least <= 0.5 else "add other data"
    if split.max_eval_rows < smallest:
        advice = f"raise {words.most} to {smallest} or more"
    return (
        f"{stage}: {split.eval_fraction:g} of {rows} rows leaves room for {allowed} held-out "
        f"row{'' if allowed == 1 else 's'}, and the smallest near-duplicate group has {smallest}; {advice}, {turn_off}"
    )


def count_leaks(
    vectors: NDArray[np.float32] | None,
    keys: Sequence[Sequence[object]],
    train: Sequence[int],
    held: Sequence[int],
    threshold: float,
) -> int:
    """How many of the rows `train` share a key with one of `held` or reach `threshold` with it; searched again."""
    leaking = {i for i, _ in near_links(vectors, train, held, threshold)}
    for column in keys:
        known = {column[i] for i in held if column[i]}
        leaking.update(i for i in train if column[i] in known)
    return len(leaking)


def near_links(
    vectors: NDArray[np.float32] | None, train: Sequence[int], held: Sequence[int], threshold: float
) -> list[tuple[int, int]]:
    """Each of the rows `train` that reaches `threshold` with one of `held`, and the nearest of these: every pair is
    compared, PART_ROWS rows of `train` at a time.
    """
    import numpy as np

    from finetune.dedup.index import FlatIndex
    from finetune.dedup.select import links_between

    links: list[tuple[int, int]] = []
    if vectors is None:
        return links
    there = vectors[np.asarray(held, np.int64)]
    for start in range(0, len(train), PART_ROWS):
        part = train[start : start + PART_ROWS]
        rows, partners, _ = links_between(vectors[np.asarray(part, np.int64)], there, threshold, FlatIndex)
        links += [(part[i], held[j]) for i, j in zip(rows.tolist(), partners.tolist(), strict=True)]
    return links
