"""Estimate the tokens of rows from their characters, before any tokenizer or stage has run.

CHARACTERS per token for Latin text, one token for any other character: within about 30 % for the tokenizers of 7B
models. `finetune plan` counts exactly after `render` has run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from finetune.data.files import data_files
from finetune.data.records import ROLES, Example, Reject
from finetune.filters.conditions import check_of
from finetune.filters.private_text import count_private
from finetune.recipe import LocalSource, Recipe

CHARACTERS, CHARACTERS_TINY = 3.5, 2.4  # per token of a 7B's tokenizer, and of the builtin base's
TEMPLATE_TOKENS = 12  # template tokens per row
MOST_ROWS = 20_000  # rows read; a larger file is estimated from its first ones
FILLED = 0.95  # average filled share of a packed row


@dataclass(frozen=True)
class Measured:
    """Counts of the first rows of a source (read, kept, refused) and tokens of each kept one."""

    rows: int
    refused: int
    lengths: tuple[int, ...]  # estimated tokens of the kept rows, in order
    whole: bool  # False: the file has more than MOST_ROWS rows
    first: Example | None
    first_reject: str
    private: dict[str, int]
    characters: int = 0  # of all rows read

    @property
    def kept(self) -> int:
        """Return the number of kept rows."""
        return len(self.lengths)


def measure(rows: Iterable[Example | Reject], keep: Sequence[str], *, tiny: bool = False) -> Measured:
    """Read the first MOST_ROWS rows; `keep` are conditions as in filter.keep_where."""
    check = check_of(keep)
    kept: list[Example] = []
    read = refused = 0
    why, characters = "", 0
    for row in islice(iter(rows), MOST_ROWS):
        read += 1
        if isinstance(row, Reject):
            refused += 1
            why = why or row.detail
            continue
        characters += len(row.joined(*ROLES)) + len(row.extra or "")
        if check(row) is None:
            kept.append(row)
    lengths = tuple(tokens_of(row, tiny=tiny) for row in kept)
    private = count_private(kept)
    first = kept[0] if kept else None
    return Measured(read, refused, lengths, read < MOST_ROWS, first, why, private, characters)


def tokens_of(row: Example, *, tiny: bool = False) -> int:
    """Return the estimated tokens of a row with a chat template."""
    text = row.joined(*ROLES)
    latin = sum(c < "\u0250" for c in text)
    return TEMPLATE_TOKENS + math.ceil(latin / (CHARACTERS_TINY if tiny else CHARACTERS)) + len(text) - latin


@dataclass(frozen=True)
class Expected:
    """Estimated output of a recipe's files: documents, their tokens, and training rows (packed if pack is on)."""

    documents: int
    tokens: int
    rows: int


def expect(recipe: Recipe) -> Expected | None:
    """Estimate the training rows from the local files of a recipe.

    Returns None if a source is not a local file, or is generated. The first MOST_ROWS rows of each file are read; the
    rest is extrapolated by the file's size. Duplicates are not detected. Raises InputError for a file that cannot be
    read.
    """
    from finetune.data.sources import read_source

    tiny, keep = recipe.model.kind == "builtin", recipe.filter.keep_where if recipe.filter else []
    longest = recipe.render.max_length_tokens
    documents = tokens = 0.0
    if recipe.generate is not None:
        return None
    for source in recipe.data:
        if not isinstance(source, LocalSource):
            return None
        _, rows = read_source(source, source.label, Path())
        measured = measure(rows, keep, tiny=tiny)
        share = source.weight * (1.0 if measured.whole else _more(source, measured))
        share *= min(1.0, source.rows / max(1.0, measured.kept * share)) if source.rows else 1.0
        documents += share * measured.kept
        tokens += share * sum(min(length, longest) for length in measured.lengths)
    trained = 1 - (recipe.split.eval_fraction if recipe.split else 0.0)
    documents, tokens = trained * documents, trained * tokens
    if recipe.sample and (wanted := recipe.sample.top_k or recipe.sample.random or recipe.sample.diverse):
        tokens *= min(1.0, wanted / max(1.0, documents))
        documents = min(documents, wanted)
    bins = tokens / (FILLED * (recipe.pack.length_tokens or longest)) if recipe.pack else documents
    return Expected(math.ceil(documents), math.ceil(tokens), max(1, math.ceil(min(bins, documents))))


def _more(source: LocalSource, measured: Measured) -> float:
    """Return total rows / rows read of a file, by its bytes (compressed files hold about four times more)."""
    files = [f.path for f in data_files(source.paths)]
    size = sum(path.stat().st_size * (4 if path.suffix in (".gz", ".zst", ".parquet") else 1) for path in files)
    return max(1.0, size / max(1, measured.characters))
