"""Hold rows out by whole near-duplicate groups, and prove that no near-duplicate is on both sides."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.context import Context, Metrics
from finetune.data.records import Example, read_rows, write_rows
from finetune.errors import FinetuneError, GateRefused
from finetune.recipe import Recipe, Section, Split

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SHARE_OF_ONE_GROUP = 0.1  # no group fills more of the held-out rows while smaller ones are to be had
ALL_ROLES = ("system", "user", "assistant", "tool")


class Spec(Section):
    """The split section and the seed of the choice, and whether the user has held-out rows of their own."""

    seed: int
    split: Split | None
    eval_data: bool = False


def spec(recipe: Recipe) -> Spec | None:
    """Off when the recipe holds nothing out."""
    if not recipe.holds_out:
        return None
    return Spec(seed=recipe.seed, split=recipe.split, eval_data=bool(recipe.eval_data))


def fingerprint(spec: Spec) -> Mapping[str, object]:
    """Nothing outside the recipe and the inputs."""
    return {}


def also(spec: Spec) -> tuple[str, ...]:
    """With held-out rows of the user's own, the stage that read them."""
    return ("ingest",) if spec.eval_data else ()


def run(spec: Spec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Metrics:
    """Write train.parquet and eval.parquet, both in the original order.

    Rows are one group when their whole texts are equal once normalised, when they are copies of one row, or when their
    vectors (where there are any) reach group_threshold, also in chains. With `eval_data` its rows come first in
    eval.parquet; decontaminate has left out what repeats one of them.
    """
    source = inputs["sample"] / "rows.parquet"
    train: Sequence[int] = range(sum(1 for _ in read_rows(source)))
    held: Sequence[int] = ()
    figures: dict[str, Any] = {"rows_in": len(train)}
    if spec.split is not None:
        train, held, figures = _divided(spec.split, spec.seed, source, inputs["embed"], ctx)
    theirs = inputs["ingest"] / "eval.parquet" if spec.eval_data else None
    write_rows(out / "train.parquet", _picked(source, set(train)))
    write_rows(out / "eval.parquet", chain(read_rows(theirs) if theirs else (), _picked(source, set(held))))
    if theirs is None:
        return figures
    count, leaks = _check_apart(out / "train.parquet", theirs)
    ctx.say(f"split: {count:,} rows of eval_data are held out as they are: not filtered, deduplicated or sampled")
    sizes = {"train_rows": len(train), "eval_rows": count + len(held), "eval_data_rows": count}
    return figures | sizes | {"leaks": figures.get("leaks", 0) + leaks}


def _check_apart(train: Path, theirs: Path) -> tuple[int, int]:
    """Count the user's held-out rows, and the training rows that are one of them: FinetuneError if there is any."""
    from finetune.data.text import text_key

    keys = [text_key(row.joined(*ALL_ROLES)) for row in read_rows(theirs)]
    known = {key for key in keys if key}
    leaks = sum(text_key(row.joined(*ALL_ROLES)) in known for row in read_rows(train))
    if leaks:
        raise FinetuneError(f"split: {leaks} training rows are rows of eval_data; this is a fault of the program")
    return len(keys), leaks


def _divided(
    split: Split, seed: int, source: Path, embedded: Path, ctx: Context
) -> tuple[list[int], list[int], dict[str, Any]]:
    """The numbers of the training and of the held-out rows, by whole groups, and the figures."""
    from finetune.data.text import text_key
    from finetune.dedup.clusters import vectors_of
    from finetune.dedup.index import FlatIndex
    from finetune.dedup.select import groups, original_id

    ids: list[str] = []
    keys: list[bytes] = []
    for row in ctx.track(read_rows(source), "read rows"):
        ids.append(original_id(row.id))
        keys.append(text_key(row.joined(*ALL_ROLES)))
    vectors = vectors_of(embedded, ids)
    threshold = split.group_threshold
    group = groups(vectors, [ids, keys], threshold, FlatIndex, check=ctx.stop.check).tolist()
    names = [k or i.encode() for i, k in zip(ids, keys, strict=True)]
    held_out = choose(group, names, split, seed)

    train = [i for i in range(len(ids)) if group[i] not in held_out]
    held = [i for i in range(len(ids)) if group[i] in held_out]
    leaks = count_leaks(vectors, [ids, keys], train, held, threshold)
    if leaks:
        raise FinetuneError(
            f"split: {leaks} of {len(train)} training rows have a near-duplicate among the held-out rows although "
            "groups were kept whole; this is a fault of the program, please report it with the recipe"
        )
    return train, held, {
        "rows_in": len(ids),
        "train_rows": len(train),
        "eval_rows": len(held),
        "groups": len(set(group)),
        "eval_groups": len(held_out),
        "largest_group": max(Counter(group).values()),
        "leaks": leaks,
        "compared_by": "text" if vectors is None else "text and vectors",
    }  # fmt: skip


def choose(group: Sequence[int], names: Sequence[bytes], split: Split, seed: int) -> set[int]:
    """The groups to hold out, never more rows than the recipe allows.

    Groups come in the order of a hash of seed and text, so few change sides when other rows come or go. Groups over a
    tenth of the allowance wait until all smaller ones were asked: one theme should not be half of the evaluation.

    Args:
        group: each row's group.
        names: each row's normalised text, or a digest of it.
        split: the recipe's section.
        seed: the recipe's seed.

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
        raise GateRefused(_why_empty(rows, allowed, sizes, split))
    return chosen


def _why_empty(rows: int, allowed: int, sizes: Mapping[int, int], split: Split) -> str:
    turn_off = "or write `split: null` to train without held-out rows"
    if rows < 2:
        return f"split: there {'is 1 row' if rows else 'are no rows'}, too few for two sides; add data, {turn_off}"
    smallest = min(sizes.values())
    if len(sizes) == 1:
        return (
            f"split: all {rows} rows are one near-duplicate group at split.group_threshold {split.group_threshold}, so "
            "nothing can be held out that is not also trained on; add other data, raise split.group_threshold, "
            f"{turn_off}"
        )
    least = math.ceil(smallest / rows * 1e4) / 1e4
    advice = f"raise split.eval_fraction to {least:g} or more" if least <= 0.5 else "add other data"
    if split.max_eval_rows < smallest:
        advice = f"raise split.max_eval_rows to {smallest} or more"
    return (
        f"split: {split.eval_fraction:g} of {rows} rows leaves room for {allowed} held-out row{'s' * (allowed != 1)}, "
        f"and the smallest near-duplicate group has {smallest}; {advice}, {turn_off}"
    )


def count_leaks(
    vectors: NDArray[np.float32] | None,
    keys: Sequence[Sequence[object]],
    train: Sequence[int],
    held: Sequence[int],
    threshold: float,
) -> int:
    """How many of the rows `train` share a key with one of `held` or reach `threshold` with it; searched anew."""
    from finetune.dedup.index import FlatIndex
    from finetune.dedup.select import links_between

    leaking: set[int] = set()
    for column in keys:
        known = {column[i] for i in held if column[i]}
        leaking.update(i for i in train if column[i] in known)
    if vectors is not None:
        found, _, _ = links_between(vectors[train], vectors[held], threshold, FlatIndex)
        leaking.update(train[i] for i in found.tolist())
    return len(leaking)


def _picked(source: Path, rows: set[int]) -> Iterator[Example]:
    return (row for i, row in enumerate(read_rows(source)) if i in rows)
