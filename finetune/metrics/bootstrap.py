"""Bootstrap intervals of a ratio of sums over rows, single or paired."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and the bounds of its percentile bootstrap interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the difference it stands for is told from chance."""
        return self.low > 0 or self.high < 0


def ratio_interval(
    numerators: Floats, denominators: Floats, seed: int = 0, samples: int = 4000, level: float = 0.95
) -> Interval:
    """Interval of sum(numerators) / sum(denominators) when rows are drawn again with replacement.

    Both are (rows,) float64, denominators at least 0 with a positive sum: NLL and supervised tokens of each row give
    the mean NLL of a token. Percentile bootstrap (Efron & Tibshirani, An Introduction to the Bootstrap, chapter 13).
    Raises ValueError on no rows, unequal shapes, or a sum of denominators that is not positive.
    """
    if numerators.shape != denominators.shape or numerators.ndim != 1 or not len(numerators):
        raise ValueError(f"need two equal 1-D arrays with rows, found {numerators.shape} and {denominators.shape}")
    if not denominators.sum() > 0 or denominators.min() < 0:
        raise ValueError("the denominators must not be negative and their sum must be positive")
    rows = len(numerators)
    # How often each row was drawn, (samples, rows): one matrix product instead of a loop over samples.
    counts = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=samples).astype(np.float64)
    below = counts @ denominators
    drawn = (counts @ numerators)[below > 0] / below[below > 0]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(numerators.sum() / denominators.sum()), float(low), float(high))


def paired_interval(
    first: Floats, second: Floats, denominators: Floats, seed: int = 0, samples: int = 4000, level: float = 0.95
) -> Interval:
    """Interval of (sum(first) - sum(second)) / sum(denominators), each draw taking both figures of a row.

    All are (rows,) float64. Below zero: `first` is the smaller.
    """
    return ratio_interval(first - second, denominators, seed, samples, level)
