"""Limits on showing a user's local rows, and a warning about apparent private text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from pathlib import Path

from finetune.data.records import Example, Message, read_rows
from finetune.filters.private_text import count_private, warning
from finetune.publish.contents import ROW_STAGES
from finetune.recipe import LocalSource, Recipe

SHOWN = 3  # held-out prompts on a card if no source is local
MOST_ROWS = 200_000  # rows scanned
ANSWERS = ("chosen", "rejected", "completion")


def samples_shown(recipe: Recipe) -> int:
    """Return how many held-out prompts a card shows: publish.samples, by default none if a source is local."""
    if recipe.publish.samples is not None:
        return recipe.publish.samples
    return 0 if local_labels(recipe) else SHOWN


def local_labels(recipe: Recipe) -> frozenset[str]:
    """Return the labels of the sources, held-out ones as well, that are files of this machine."""
    pairs, written = recipe.preference, recipe.generate
    sources = [*recipe.data, *(recipe.eval_data or []), *(written.seeds if written else [])]
    sources += [*pairs.data, *(pairs.eval_data or [])] if pairs else []
    return frozenset(source.label for source in sources if isinstance(source, LocalSource))


def private_text(recipe: Recipe, folders: Mapping[str, Path], before: str) -> str:
    """Return a line with counts of local rows and pairs that seem to hold private text, or "".

    `folders` has the finished stages; the rows are those of the last one that has any, and those of stage pairs.
    `before` names what comes next.
    """
    local = local_labels(recipe)
    if not local:
        return ""
    stage = next((stage for stage in ROW_STAGES if stage in folders), None)
    names = ("train", "eval", "rows") if stage else ()
    files = [path for name in names if (path := folders[stage or ""] / f"{name}.parquet").is_file()]
    pairs = _pairs(folders["pairs"]) if "pairs" in folders else ()
    rows = (row for row in chain(*map(read_rows, files), pairs) if row.source.partition("#")[0] in local)
    return warning(count_private(islice(rows, MOST_ROWS)), before)


def _pairs(folder: Path) -> Iterator[Example]:
    """The pairs of a finished stage, prompt and all answers in one row each."""
    import pyarrow.parquet as pq

    sources: dict[str, str] = {}
    for name in ("train", "eval"):
        ids = pq.read_table(folder / f"{name}.parquet", columns=["pair_id", "source"])
        sources |= dict(zip(ids["pair_id"].to_pylist(), ids["source"].to_pylist(), strict=True))
    for batch in pq.ParquetFile(folder / "texts.parquet").iter_batches():
        for row in batch.to_pylist():
            turns = [turn for part in ("prompt", *ANSWERS) for turn in json.loads(row.get(part) or "[]")]
            # A call's arguments and the like are searched as they are: as text.
            messages = (Message("user", f"{turn.pop('content')}\n{json.dumps(turn)}") for turn in turns)
            yield Example(row["pair_id"], sources[row["pair_id"]], tuple(messages), tools=row["tools"])
