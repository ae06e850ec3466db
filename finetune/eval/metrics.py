"""Agreement, perplexity, stop rate, and their bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


def agreement(first: NDArray[np.int64], second: NDArray[np.int64]) -> float:
    """Return the share of equal greedy tokens; both (positions,). Raises ValueError if empty or of unequal shapes."""
    if first.shape != second.shape or not first.size:
        raise ValueError(f"need two equal arrays with positions, found {first.shape} and {second.shape}")
    return float(np.mean(first == second))


Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and the bounds of its percentile bootstrap interval."""

    value: float
    low: float
    high: float


def ratio_interval(
    numerators: Floats, denominators: Floats, seed: int = 0, samples: int = 4000, level: float = 0.95
) -> Interval:
    """Return the bootstrap interval of sum(numerators) / sum(denominators), resampling rows.

    Both are (rows,) float64, denominators at least 0 with a positive sum: NLL and supervised tokens of each row give
    the mean NLL per token. Percentile bootstrap (Efron & Tibshirani, An Introduction to the Bootstrap, chapter 13).
    Raises ValueError on no rows, unequal shapes, or a sum of denominators that is not positive.
    """
    if numerators.shape != denominators.shape or numerators.ndim != 1 or not len(numerators):
        raise ValueError(f"need two equal 1-D arrays with rows, found {numerators.shape} and {denominators.shape}")
    if not denominators.sum() > 0 or denominators.min() < 0:
        raise ValueError("the denominators must not be negative and their sum must be positive")
    rows = len(numerators)
    # Draws of each row, (samples, rows): one matrix product instead of a loop over samples.
    counts = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=samples).astype(np.float64)
    below = counts @ denominators
    drawn = (counts @ numerators)[below > 0] / below[below > 0]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(numerators.sum() / denominators.sum()), float(low), float(high))


def paired_interval(
    first: Floats, second: Floats, denominators: Floats, seed: int = 0, samples: int = 4000, level: float = 0.95
) -> Interval:
    """Return the interval of (sum(first) - sum(second)) / sum(denominators), paired over rows.

    All are (rows,) float64. Negative if `first` is smaller.
    """
    return ratio_interval(first - second, denominators, seed, samples, level)


def perplexity(nll_sums: NDArray[np.float64], tokens: NDArray[np.float64]) -> float:
    """Return exp(sum of NLL / supervised tokens), terminators included, independent of batching.

    `nll_sums` (rows,) in nats, `tokens` (rows,) supervised tokens of each row. Raises ValueError if there are none.
    """
    count = float(tokens.sum())
    if not count > 0:
        raise ValueError("no supervised token: perplexity is undefined")
    return float(np.exp(nll_sums.sum() / count))


def perplexity_interval(nll_sums: NDArray[np.float64], tokens: NDArray[np.float64], seed: int = 0) -> Interval:
    """Return the perplexity and its 95 % bootstrap interval over rows."""
    mean = ratio_interval(nll_sums, tokens, seed)
    return Interval(float(np.exp(mean.value)), float(np.exp(mean.low)), float(np.exp(mean.high)))


def perplexity_ratio_interval(
    first: NDArray[np.float64], second: NDArray[np.float64], tokens: NDArray[np.float64], seed: int = 0
) -> Interval:
    """Return perplexity under `first` / perplexity under `second` and its 95 % bootstrap interval, paired over rows.

    All are (rows,): summed NLL of the same rows in nats for two models, and supervised tokens.
    """
    apart = paired_interval(first, second, tokens, seed)
    return Interval(float(np.exp(apart.value)), float(np.exp(apart.low)), float(np.exp(apart.high)))


TRAIN_LONGER = (
    "Read its answers in the report. That the end of an answer carries a label is proved before training, so train "
    "longer (train.epochs, train.max_steps) or at a higher train.learning_rate; until then, give a limit of new tokens "
    "wherever it is used."
)


def never_stops(figures: Mapping[str, Any], to_do: str = TRAIN_LONGER) -> str:
    """Return a warning with advice if no answer of an evaluation ended by itself, else an empty string."""
    if figures.get("stop_rate") != 0 or "generations" not in figures:  # align counts them otherwise
        return ""
    return (
        f"NO ANSWER ENDED BY ITSELF (0 of {figures['generations']}, each with room for twice its reference and 64 "
        f"tokens more): the model does not stop by itself. {to_do}"
    )
