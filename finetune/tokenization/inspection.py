"""A rendered row as coloured text: what is supervised, and which tokens are control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Protocol

from finetune.tokenization.audit import shared_length
from finetune.utils.format import visible


class Tokenizer(Protocol):
    """The part of a tokenizer needed to show tokens."""

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the special tokens."""

    def decode(self, token_ids: list[int], **kwargs: bool) -> str | list[str]:
        """The text of the tokens."""

    def convert_ids_to_tokens(self, ids: list[int]) -> str | list[str]:
        """Return the name of each token."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring tokens of one kind."""

    text: str
    supervised: bool
    special: bool


def segments(tokenizer: Tokenizer, ids: list[int], mask: Sequence[int]) -> list[Segment]:
    """The row as runs of equal (supervised, special); their texts joined are the decoded row.

    A run is shown as what it adds to the text before it, since SentencePiece drops the space of a first token. Raises
    ValueError if `ids` and `mask` differ in length.
    """
    special = frozenset(tokenizer.all_special_ids)
    kinds = [(bool(m), i in special) for i, m in zip(ids, mask, strict=True)]
    parts: list[Segment] = []
    end, before = 0, ""
    for (supervised, control), run in groupby(kinds):
        end += len(list(run))
        text = str(tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        same = shared_length(before, text)
        if same < len(before) and parts:  # a character was cut in two: the run before showed a replacement for it
            last = parts[-1]
            parts[-1] = Segment(last.text[: len(last.text) - (len(before) - same)], last.supervised, last.special)
        parts.append(Segment(text[same:], supervised, control))
        before = text
    return parts


def marked(tokenizer: Tokenizer, ids: list[int], mask: Sequence[int]) -> str:
    """Return the decoded row with each supervised part between » and «."""
    runs = groupby(segments(tokenizer, ids, mask), lambda s: s.supervised)
    texts = ((supervised, "".join(s.text for s in run)) for supervised, run in runs)
    return "".join(f"»{text}«" if supervised else text for supervised, text in texts)


def first_row_text(tokenizer: Tokenizer, rendered: Path, most: int = 1200) -> str:
    """The first row of a rendered file for a person: its supervised parts between » and «, and its outer ids.

    No more than `most` characters of the row are shown.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(rendered) as file:
        table = next(file.iter_batches(batch_size=1, columns=["id", "input_ids", "mask"]), None)
    if table is None or not table.num_rows:
        return "render: no row"
    row = table.to_pylist()[0]
    ids = row["input_ids"]
    text = marked(tokenizer, ids, row["mask"])
    if len(text) > most:
        text = f"{text[: most // 2]} … {text[-most // 2 :]}"
    names = tokenizer.convert_ids_to_tokens(ids)
    named = [f"{i} {name!r}" for i, name in zip(ids, names, strict=True)]
    ends = ", ".join(named) if len(named) <= 8 else f"{', '.join(named[:4])} … {', '.join(named[-4:])}"
    return visible(
        f"render: row {row['id']} as the model sees it, {sum(row['mask'])} of {len(ids)} ids supervised (»…«):\n"
        f"{text}\n  ids {ends}"
    )
