"""Size a recipe to its rows: row length, batch, epochs, held-out share, from an estimate of tokens.

Tokens are estimated from characters (CHARACTERS a token for Latin text, one token for any other character): within
about 30 % for the tokenizers of 7B models; `finetune plan` counts exactly once `render` has run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from finetune.data.records import ROLES, Example, Reject
from finetune.filters.conditions import check_of
from finetune.filters.private_text import count_private
from finetune.train.batch import Sizing, size_to_rows

CHARACTERS, CHARACTERS_TINY = 3.5, 2.4  # a token of a 7B's tokenizer, and of the builtin base's
TEMPLATE_TOKENS = 12  # of a row's turns
MOST_ROWS = 20_000  # that are read; a larger file is measured by its first ones
WANTED_HELD_OUT = 50
MARGIN = 1.3  # over the longest row that was estimated


@dataclass(frozen=True)
class Measured:
    """The first rows of a source: how many there are, are kept and are refused; tokens of each kept one."""

    rows: int
    refused: int
    lengths: tuple[int, ...]  # estimated tokens of the rows that are kept, in order
    whole: bool  # False: the file has more than MOST_ROWS rows
    first: Example | None
    first_reject: str
    private: dict[str, int]

    @property
    def kept(self) -> int:
        """Rows that are left."""
        return len(self.lengths)


def measure(rows: Iterable[Example | Reject], keep: Sequence[str], *, tiny: bool = False) -> Measured:
    """Read the first MOST_ROWS rows; `keep` are conditions as in filter.keep_where."""
    check = check_of(keep)
    kept: list[Example] = []
    read = refused = 0
    why = ""
    for row in islice(iter(rows), MOST_ROWS):
        read += 1
        if isinstance(row, Reject):
            refused += 1
            why = why or row.detail
        elif check(row) is None:
            kept.append(row)
    lengths = tuple(tokens_of(row, tiny=tiny) for row in kept)
    private = count_private(kept)
    return Measured(read, refused, lengths, read < MOST_ROWS, kept[0] if kept else None, why, private)


def tokens_of(row: Example, *, tiny: bool = False) -> int:
    """Estimated tokens of a row under a chat template."""
    text = row.joined(*ROLES)
    latin = sum(c < "\u0250" for c in text)
    return TEMPLATE_TOKENS + math.ceil(latin / (CHARACTERS_TINY if tiny else CHARACTERS)) + len(text) - latin


def length_for(found: Measured, lengths: Sequence[int]) -> int:
    """The shortest of `lengths` that holds all but 1 in 200 rows with a margin, else the longest."""
    if not found.lengths:
        return max(lengths)
    longest = sorted(found.lengths)[math.ceil(0.995 * found.kept) - 1]
    return min((n for n in lengths if n >= MARGIN * longest), default=max(lengths))


def held_out_fraction(found: Measured) -> float:
    """Share that holds out WANTED_HELD_OUT rows, from 5 to 20 %."""
    return min(0.2, max(0.05, round(WANTED_HELD_OUT / max(1, found.kept), 2)))


def batch_for(found: Measured, length: int) -> Sizing:
    """Batch, epochs and packing for the rows that are trained on, of at most `length` tokens each."""
    share = 1 - held_out_fraction(found)
    tokens = share * sum(min(n, length) for n in found.lengths)
    rows = max(1, math.floor(share * found.kept))
    sizing = size_to_rows(rows, math.ceil(tokens / (0.95 * length)))
    return sizing if found.whole else size_to_rows(100 * rows, math.ceil(100 * tokens / length))
