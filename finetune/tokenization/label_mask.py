"""From character ranges to a mask over tokens: which token carries a label.

Everywhere: `offsets` is int64 (n, 2), the half-open character range each token was made from; a mask is uint8 (n,),
1 = supervised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from finetune.tokenization.chat import Span

Offsets = NDArray[np.int64]
Mask = NDArray[np.uint8]
Supervise = Literal["assistant", "last", "all"]


def token_mask(offsets: Offsets, spans: Sequence[Span]) -> Mask:
    """Supervise every token that holds a character of a span, but never the first one.

    A token over the left edge counts (SentencePiece fuses a template's space with the answer's first word), and one
    made from no character (SentencePiece's added space) goes with the character it stands before. Nothing predicts a
    row's first token, and in a packed row its label would be predicted from another document.
    """
    first, last = _overlapping(offsets, spans)
    mask = (last > first).astype(np.uint8)
    mask[:1] = 0
    return mask


def last_tokens(offsets: Offsets, spans: Sequence[Span]) -> list[int | None]:
    """For each span the index of its last token, or None if no token of it is left."""
    order = sorted(range(len(spans)), key=lambda i: spans[i])
    ends = np.full(len(spans), -1, np.int64)
    first, last = _overlapping(offsets, [spans[i] for i in order])
    for more in range(int((last - first).max(initial=0))):  # nearly always one: few tokens reach into two spans
        tokens = np.flatnonzero(last - first > more)
        np.maximum.at(ends, first[tokens] + more, tokens)
    place = np.empty(len(spans), np.int64)
    place[order] = np.arange(len(spans))
    return [int(token) if token >= 0 else None for token in ends[place]]


def fuses_with_prompt(offsets: Offsets, borders: Sequence[int]) -> bool:
    """Whether a token reaches over a border, a character position where a generation prompt ends.

    When generating, the prompt is tokenised alone, so the model would be trained on a token it can never be asked for.
    """
    at = np.sort(np.asarray(borders, np.int64))
    return bool((np.searchsorted(at, offsets[:, 1], "left") > np.searchsorted(at, offsets[:, 0], "right")).any())


def _overlapping(offsets: Offsets, spans: Sequence[Span]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each token, the half-open range of those spans (in order of position) of which it holds a character.

    By bisection, for a row may have 100,000 turns: spans that end at or before the token's start are behind it, those
    that begin before its end are reached.
    """
    edges = np.asarray(spans, np.int64).reshape(-1, 2)
    start = offsets[:, 0]
    first = np.searchsorted(np.sort(edges[:, 1]), start, "right")
    last = np.searchsorted(np.sort(edges[:, 0]), np.maximum(offsets[:, 1], start + 1), "left")
    return first, last
