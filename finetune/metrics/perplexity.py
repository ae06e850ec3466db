"""Perplexity from the summed negative log-likelihoods of rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from finetune.metrics.bootstrap import Interval, paired_interval, ratio_interval


def perplexity(nll_sums: NDArray[np.float64], tokens: NDArray[np.float64]) -> float:
    """exp(sum of NLL / supervised tokens), terminators included: independent of how rows were batched.

    `nll_sums` (rows,) in nats, `tokens` (rows,) supervised tokens of each row. Raises ValueError when there is none.
    """
    count = float(tokens.sum())
    if not count > 0:
        raise ValueError("no supervised token: perplexity is undefined")
    return float(np.exp(nll_sums.sum() / count))


def perplexity_interval(nll_sums: NDArray[np.float64], tokens: NDArray[np.float64], seed: int = 0) -> Interval:
    """Perplexity and its 95 % bootstrap interval over rows."""
    mean = ratio_interval(nll_sums, tokens, seed)
    return Interval(float(np.exp(mean.value)), float(np.exp(mean.low)), float(np.exp(mean.high)))


def perplexity_ratio_interval(
    first: NDArray[np.float64], second: NDArray[np.float64], tokens: NDArray[np.float64], seed: int = 0
) -> Interval:
    """Perplexity under `first` / perplexity under `second` and its 95 % bootstrap interval, paired over rows.

    All are (rows,): two models' summed NLL of the same rows in nats, and the rows' supervised tokens.
    """
    apart = paired_interval(first, second, tokens, seed)
    return Interval(float(np.exp(apart.value)), float(np.exp(apart.low)), float(np.exp(apart.high)))
