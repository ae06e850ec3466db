"""ROUGE-L of word sequences, by which generated instructions and answers are compared."""

from __future__ import annotations

from collections.abc import Sequence


def lcs_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, in words.

    Bit-parallel (Hyyrö 2004, "Bit-parallel LCS-length computation revisited"): one bit a word of `first`, one step a
    word of `second`. rouge-score's table in Python takes 50 times as long, and every candidate meets every kept row.
    """
    places: dict[str, int] = {}
    for position, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << position
    full = (1 << len(first)) - 1
    row = full
    for word in second:
        matched = row & places.get(word, 0)
        row = (row + matched | row - matched) & full
    return len(first) - row.bit_count()


def rouge_l(first: Sequence[str], second: Sequence[str]) -> float:
    """Return the F-measure of ROUGE-L (Lin 2004), 2·LCS / (words of both); 1 if both are empty."""
    both = len(first) + len(second)
    return 2 * lcs_length(first, second) / both if both else 1.0


def nearest(words: Sequence[str], others: Sequence[Sequence[str]], threshold: float) -> tuple[float, int]:
    """Return the largest ROUGE-L with one of `others` and its index; (0, -1) if none reaches `threshold`."""
    best, at = 0.0, -1
    for index, other in enumerate(others):
        both = len(words) + len(other)
        bound = 2 * min(len(words), len(other)) / both if both else 1.0  # no LCS is longer than either
        if bound >= max(threshold, best) and (score := rouge_l(words, other)) >= threshold and score > best:
            best, at = score, index
    return best, at
