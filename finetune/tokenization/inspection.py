"""A rendered row as coloured text: what is supervised, and which tokens are control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

from finetune.tokenization.audit import shared_length


class Decoder(Protocol):
    """What of a tokenizer is needed to show tokens."""

    all_special_ids: list[int]

    def decode(self, token_ids: Sequence[int], **kwargs: bool) -> str:
        """The text of the tokens."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring tokens of one kind."""

    text: str
    supervised: bool
    special: bool


def segments(tokenizer: Decoder, ids: Sequence[int], mask: Sequence[int]) -> list[Segment]:
    """The row as runs of equal (supervised, special); their texts joined are the decoded row.

    A run is shown as what it adds to the text before it, since SentencePiece drops the space of a first token. Raises
    ValueError where `ids` and `mask` differ in length.
    """
    special = frozenset(tokenizer.all_special_ids)
    kinds = [(bool(m), i in special) for i, m in zip(ids, mask, strict=True)]
    found: list[Segment] = []
    end, shown = 0, ""
    for (supervised, control), run in groupby(kinds):
        end += len(list(run))
        text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        same = shared_length(shown, text)
        if same < len(shown) and found:  # a character was cut in two: the run before showed a replacement for it
            last = found[-1]
            found[-1] = Segment(last.text[: len(last.text) - (len(shown) - same)], last.supervised, last.special)
        found.append(Segment(text[same:], supervised, control))
        shown = text
    return found
