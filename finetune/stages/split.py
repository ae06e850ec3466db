"""Hold rows out by whole near-duplicate groups, and prove that no near-duplicate is on both sides."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from finetune.context import Context, Metrics
from finetune.data.records import Example, read_rows, write_rows, write_table
from finetune.dedup.embedding_names import model_fingerprint
from finetune.errors import FinetuneError, GateRefused
from finetune.recipe import Dedup, Recipe, Section, Split
from finetune.recipe import Jaccard as JaccardSection

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from finetune.dedup.measures import Measure

SHARE_OF_ONE_GROUP = 0.1  # no group fills more of the held-out rows while smaller ones are to be had
ALL_ROLES = ("system", "user", "assistant", "tool")


class Repeats(Section):
    """By what a training row repeats a held-out one: the dedup section's measures, or equal texts without them."""

    exact: bool = True
    minhash: JaccardSection | None = None
    field: Literal["instruction", "output", "both"] = "both"
    threshold: float = 1.0
    embedding: str | None = None
    folder: Annotated[Path | None, Field(exclude=True)] = None


class Spec(Section):
    """The split section and the seed of the choice; with held-out rows of the user's own, what counts as a repeat."""

    seed: int
    split: Split | None
    repeats: Repeats | None = None


def spec(recipe: Recipe) -> Spec | None:
    """Off when the recipe holds nothing out."""
    if not recipe.holds_out:
        return None
    return Spec(seed=recipe.seed, split=recipe.split, repeats=_repeats(recipe.dedup) if recipe.eval_data else None)


def _repeats(dedup: Dedup | None) -> Repeats:
    if dedup is None:
        return Repeats()
    return Repeats(
        exact=dedup.exact,
        minhash=dedup.jaccard,
        field=dedup.field,
        threshold=dedup.threshold,
        embedding=dedup.embedding,
        folder=dedup.embedding_folder,
    )


def fingerprint(spec: Spec) -> Mapping[str, object]:
    """The model whose vectors are compared with those of the user's held-out rows; else nothing outside the recipe."""
    if spec.repeats is None or spec.repeats.embedding is None:
        return {}
    return model_fingerprint(spec.repeats.embedding, spec.repeats.folder)


def also(spec: Spec) -> tuple[str, ...]:
    """With held-out rows of the user's own, the stage that read them."""
    return ("ingest",) if spec.repeats is not None else ()


def run(spec: Spec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Metrics:
    """Write train.parquet and eval.parquet, both in the original order.

    Rows are one group when their whole texts are equal once normalised, when they are copies of one row, or when their
    vectors (where there are any) reach group_threshold, also in chains. With `eval_data` its rows come first in
    eval.parquet, and the rows that repeat one of them are left out of both and listed in pairs.parquet: dropped_id,
    kept_id (of the held-out row), method, score.
    """
    source = inputs["sample"] / "rows.parquet"
    if spec.repeats is None:
        assert spec.split is not None  # noqa: S101 - the stage would be off
        train, held, figures = _divided(spec.split, spec.seed, source, inputs["embed"], ctx)
        write_rows(out / "train.parquet", _picked(source, set(train)))
        write_rows(out / "eval.parquet", _picked(source, set(held)))
        return figures
    theirs = inputs["ingest"] / "eval.parquet"
    dropped, repeated = _without_repeats(spec.repeats, source, theirs, out / "pairs.parquet", ctx)
    figures = {"rows_in": sum(1 for _ in read_rows(source)), **repeated}
    remaining = [i for i in range(figures["rows_in"]) if i not in dropped]
    train, held = remaining, []
    if spec.split is not None:
        write_rows(out / "remaining.parquet", _picked(source, set(remaining)))
        try:
            chosen, kept, divided = _divided(spec.split, spec.seed, out / "remaining.parquet", inputs["embed"], ctx)
        finally:
            (out / "remaining.parquet").unlink()
        train, held = [remaining[i] for i in chosen], [remaining[i] for i in kept]
        figures |= divided | {"rows_in": figures["rows_in"], "leaks": figures["leaks"] + divided["leaks"]}
    write_rows(out / "train.parquet", _picked(source, set(train)))
    write_rows(out / "eval.parquet", chain(read_rows(theirs), _picked(source, set(held))))
    return figures | {"train_rows": len(train), "eval_rows": figures["eval_data_rows"] + len(held)}


def _without_repeats(
    repeats: Repeats, source: Path, theirs: Path, pairs_file: Path, ctx: Context
) -> tuple[set[int], dict[str, Any]]:
    """The numbers of the rows that repeat a held-out row of the user's; they are listed in `pairs_file`."""
    import numpy as np
    import pyarrow as pa

    from finetune.data.text import field_text, text_key
    from finetune.dedup.embed import embed
    from finetune.dedup.index import exact_search
    from finetune.dedup.jaccard import Jaccard, word_sets
    from finetune.dedup.measures import Cosine
    from finetune.dedup.select import original_id, repeats_of

    ids: list[str] = []
    texts: list[str] = []
    wholes: list[bytes] = []  # a row that is a held-out row is never trained on, whatever the measures are
    for row in chain(read_rows(source), read_rows(theirs)):
        ids.append(row.id)
        texts.append(field_text(row, repeats.field))
        wholes.append(text_key(row.joined(*ALL_ROLES)))
    held_out = sum(1 for _ in read_rows(theirs))
    ours = np.arange(len(ids) - held_out, dtype=np.int64)
    others = np.arange(len(ids) - held_out, len(ids), dtype=np.int64)
    measures: list[Measure] = []
    if repeats.minhash is not None:
        measures.append(Jaccard(word_sets(texts, repeats.minhash.ngram), repeats.minhash.threshold))
    if repeats.embedding is not None:
        # Together, since LSA makes its vectors of the texts it is given.
        made_by = model_fingerprint(repeats.embedding, repeats.folder)
        vectors = embed(texts, repeats.embedding, ctx, repeats.folder, made_by)
        measures.append(Cosine(vectors, repeats.threshold, exact_search(ctx.device, len(ids))))
    keys = [text_key(text) for text in texts] if repeats.exact else wholes
    found = {pair.dropped: pair for pair in repeats_of(ours, others, wholes, [])}
    found |= {pair.dropped: pair for pair in repeats_of(ours, others, keys, measures)}
    if len(ours) and len(found) == len(ours):
        raise GateRefused(
            f"split: every one of {len(ours):,} training rows repeats the {repeats.field} of a row of eval_data (the "
            f"first, {ids[0]}, that of {ids[found[0].kept]}); is eval_data the training data itself, or do only the "
            "answers repeat (labels, yes and no)? Name other rows, or compare both: dedup.field=both"
        )
    listed = [found[i] for i in sorted(found)]
    columns: dict[str, list[object]] = {
        "dropped_id": [ids[pair.dropped] for pair in listed],
        "kept_id": [ids[pair.kept] for pair in listed],
        "method": [pair.method for pair in listed],
        "score": [pair.score for pair in listed],
    }
    write_table(pairs_file, columns, dict.fromkeys(columns, pa.string()) | {"score": pa.float64()})
    held_texts = {whole for whole in wholes[len(ours) :] if whole}
    leaks = sum(1 for i in ours.tolist() if i not in found and wholes[i] in held_texts)
    if leaks:
        raise FinetuneError(f"split: {leaks} training rows are rows of eval_data; this is a fault of the program")
    if listed:
        ctx.say(f"split: {len(listed):,} training rows repeat a row of eval_data and are left out (pairs.parquet)")
    by = {name: sum(pair.method == name for pair in listed) for name in ("exact", "minhash", "embedding")}
    rows_repeated = len({original_id(ids[pair.dropped]) for pair in listed})
    return set(found), {
        "eval_data_rows": held_out, "dropped": len(listed), "rows_repeated": rows_repeated, **by, "leaks": leaks
    }  # fmt: skip


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
    """How many of the rows `train` share a key with one of `held` or reach `threshold` with it, by a new search."""
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
