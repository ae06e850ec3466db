"""Limits on showing a user's local rows, and a warning about apparent private text."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from finetune.filters.private_text import count_private, warning
from finetune.publish.contents import ROW_STAGES
from finetune.recipe import LocalSource, Recipe

SHOWN = 3  # held-out prompts on a card if no source is local
MOST_ROWS = 200_000  # rows scanned


def samples_shown(recipe: Recipe) -> int:
    """Return how many held-out prompts a card shows: publish.samples, by default none if a source is local."""
    if recipe.publish.samples is not None:
        return recipe.publish.samples
    return 0 if local_labels(recipe) else SHOWN


def local_labels(recipe: Recipe) -> frozenset[str]:
    """Return the labels of the sources, held-out ones as well, that are files of this machine."""
    pairs = getattr(recipe, "preference", None)
    written = getattr(recipe, "generate", None)
    sources = [*recipe.data, *(getattr(recipe, "eval_data", None) or []), *(pairs.data if pairs else [])]
    sources += written.seeds if written else []
    return frozenset(source.label for source in sources if isinstance(source, LocalSource))


def private_text(recipe: Recipe, folders: Mapping[str, Path], before: str) -> str:
    """Return a line with counts of local rows that seem to hold private text, or "".

    `folders` has the finished stages; the rows are those of the last one that has any. `before` names what comes next.
    """
    from finetune.data.records import read_rows

    local = local_labels(recipe)
    stage = next((stage for stage in ROW_STAGES if stage in folders), None)
    if not local or stage is None:
        return ""
    files = [path for name in ("train", "eval", "rows") if (path := folders[stage] / f"{name}.parquet").is_file()]
    rows = (row for path in files for row in read_rows(path) if row.source.partition("#")[0] in local)
    return warning(count_private(islice(rows, MOST_ROWS)), before)
