"""Hold rows out by whole near-duplicate groups, and prove that no near-duplicate is on both sides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from finetune.context import Context
from finetune.data.records import Example, RowRange, read_rows, row_ranges, write_rows
from finetune.dedup.holdout import choose, count_leaks, near_links
from finetune.errors import FinetuneError
from finetune.metrics import Headline, SplitMetrics
from finetune.recipe import Recipe, Section, Split

PART_ROWS = 10_000
ALL_ROLES = ("system", "user", "assistant", "tool")


class Spec(Section):
    """The split section and the seed of the choice, and whether the user has held-out rows of their own."""

    seed: int
    split: Split | None
    eval_data: bool = False
    exhaustive: bool = False


def spec(recipe: Recipe) -> Spec | None:
    """Off when the recipe holds nothing out."""
    if not recipe.holds_out:
        return None
    exhaustive = recipe.dedup is not None and recipe.dedup.exhaustive and recipe.split is not None
    return Spec(seed=recipe.seed, split=recipe.split, eval_data=bool(recipe.eval_data), exhaustive=exhaustive)


def fingerprint(spec: Spec) -> Mapping[str, object]:
    """Nothing outside the recipe and the inputs."""
    return {}


def also(spec: Spec) -> tuple[str, ...]:
    """With held-out rows of the user's own, the stage that read them."""
    return ("ingest",) if spec.eval_data else ()


def run(spec: Spec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> SplitMetrics:
    """Write train.parquet and eval.parquet, both in the original order.

    Rows are one group when their whole texts are equal once normalised, when they are copies of one row, or when their
    vectors (if there are any) reach group_threshold, also in chains. With `eval_data` its rows come first in
    eval.parquet; decontaminate has left out what repeats one of them.
    """
    source = inputs["sample"] / "rows.parquet"
    train: Sequence[int] = range(sum(1 for _ in read_rows(source)))
    held: Sequence[int] = ()
    figures: SplitMetrics = {"rows_in": len(train)}
    if spec.split is not None:
        train, held, figures = _divided(spec.split, spec, source, inputs["embed"], ctx)
    theirs = inputs["ingest"] / "eval.parquet" if spec.eval_data else None
    write_rows(out / "train.parquet", _picked(source, set(train)))
    write_rows(out / "eval.parquet", chain(read_rows(theirs) if theirs else (), _picked(source, set(held))))
    if theirs is None:
        return figures
    count, leaks = _check_apart(out / "train.parquet", theirs)
    ctx.say(f"split: {count:,} rows of eval_data are held out as they are: not filtered, deduplicated or sampled")
    sizes: SplitMetrics = {"train_rows": len(train), "eval_rows": count + len(held), "eval_data_rows": count}
    return {**figures, **sizes, "leaks": figures.get("leaks", 0) + leaks}


def headline(m: SplitMetrics) -> Headline:
    """Return the row of this stage in a table of stages."""
    groups = f"{m['groups']:,} groups, " if "groups" in m else ""
    return Headline(f"{groups}{m['leaks']:,} leaks", m["rows_in"], m["train_rows"], m["eval_rows"])


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
    split: Split, spec: Spec, source: Path, embedded: Path, ctx: Context
) -> tuple[list[int], list[int], SplitMetrics]:
    """The numbers of the training and of the held-out rows, by whole groups, and the figures."""
    from finetune.dedup.clusters import vectors_of
    from finetune.dedup.index import FlatIndex
    from finetune.dedup.large import BLOCK_ROWS, cell_measure, searched_by_cells
    from finetune.dedup.select import equal_texts, groups, joined

    ids: list[str] = []
    keys: list[bytes] = []
    parts = row_ranges(source, PART_ROWS)
    for some_ids, some_keys in ctx.track(ctx.engine.map(_facts, parts, parts[-1].stop if parts else 0), "read rows"):
        ids += some_ids
        keys += some_keys
    vectors = vectors_of(embedded, ids)
    threshold = split.group_threshold
    measure, rows = None, 1024
    if vectors is not None and searched_by_cells(len(ids), ctx.device, spec.exhaustive):
        measure, rows = cell_measure(vectors, threshold), BLOCK_ROWS
    texts = equal_texts(keys, ctx.engine)
    group = groups(vectors, [ids, texts], threshold, FlatIndex, rows, ctx.stop.check, measure, ctx.engine).tolist()
    names = [k or i.encode() for i, k in zip(ids, keys, strict=True)]
    while True:
        held_out = choose(group, names, split, spec.seed)
        train = [i for i in range(len(ids)) if group[i] not in held_out]
        held = [i for i in range(len(ids)) if group[i] in held_out]
        missed = near_links(vectors, train, held, threshold) if measure else []
        if not missed:
            break
        group = joined(group, missed)  # every held-out row is compared with all others, so no missed pair is left
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


def _facts() -> Callable[[RowRange], tuple[list[str], list[bytes]]]:
    """Build the function from a range of rows to the ids without the numbers of copies, and the text keys."""
    from finetune.data.text import text_key
    from finetune.dedup.select import original_id

    def facts(part: RowRange) -> tuple[list[str], list[bytes]]:
        rows = part.read()
        return [original_id(row.id) for row in rows], [text_key(row.joined(*ALL_ROLES)) for row in rows]

    return facts


def _picked(source: Path, rows: set[int]) -> Iterator[Example]:
    return (row for i, row in enumerate(read_rows(source)) if i in rows)
