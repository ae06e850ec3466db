"""From character ranges to a mask over tokens: which token carries a label.

Everywhere: `offsets` is int64 (n, 2), the half-open character range each token was made from; a mask is uint8 (n,),
1 = supervised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from finetune.data.chat import Span

Offsets = NDArray[np.int64]
Mask = NDArray[np.uint8]
Supervise = Literal["assistant", "last", "all"]


def supervised_spans(spans: Sequence[Span], supervise: Supervise, length: int) -> tuple[Span, ...]:
    """The ranges that carry loss, of an n-character text whose assistant turns are `spans`."""
    if supervise == "all":
        return ((0, length),)
    return tuple(spans[-1:]) if supervise == "last" else tuple(spans)


def token_mask(offsets: Offsets, spans: Sequence[Span]) -> Mask:
    """Supervise every token that holds a character of a span, but never the first one.

    A token over the left edge counts (SentencePiece fuses a template's space with the answer's first word), and one
    made from no character (SentencePiece's added space) goes with the character it stands before. Nothing predicts a
    row's first token, and in a packed row its label would be predicted from another document.
    """
    start, end = _ranges(offsets)
    mask = np.zeros(len(offsets), np.uint8)
    for first, last in spans:
        mask |= ((start < last) & (end > first)).astype(np.uint8)
    mask[:1] = 0
    return mask


def last_tokens(offsets: Offsets, spans: Sequence[Span]) -> list[int | None]:
    """For each span the index of its last token, or None where no token of it is left."""
    start, end = _ranges(offsets)
    found = [np.flatnonzero((start < last) & (end > first)) for first, last in spans]
    return [int(hits[-1]) if len(hits) else None for hits in found]


def fuses_with_prompt(offsets: Offsets, borders: Sequence[int]) -> bool:
    """Whether a token reaches over a border, a character position where a generation prompt ends.

    When generating, the prompt is tokenised alone, so the model would be trained on a token it can never be asked for.
    """
    start, end = offsets[:, 0], offsets[:, 1]
    return any(bool(((start < border) & (end > border)).any()) for border in borders)


def _ranges(offsets: Offsets) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    start = offsets[:, 0]
    return start, np.maximum(offsets[:, 1], start + 1)
