"""How alike two models' next-token distributions are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def agreement(first: NDArray[np.int64], second: NDArray[np.int64]) -> float:
    """Share of positions with the same greedy token; both (positions,). Raises ValueError on none or unequal shapes."""
    if first.shape != second.shape or not first.size:
        raise ValueError(f"need two equal arrays with positions, found {first.shape} and {second.shape}")
    return float(np.mean(first == second))


def kl_divergence(first: NDArray[np.floating], second: NDArray[np.floating]) -> NDArray[np.float64]:
    """KL(first ‖ second) in nats at each position, from logits or log-probabilities.

    Both (positions, vocabulary); returns (positions,) float64, never below zero but for rounding.
    """
    a, b = _log_softmax(first), _log_softmax(second)
    with np.errstate(invalid="ignore"):  # -inf - -inf where both give a token no chance
        terms = np.where(np.isneginf(a), 0.0, np.exp(a) * (a - b))
    return np.asarray(terms.sum(axis=-1), dtype=np.float64)


def _log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    values = np.asarray(logits, dtype=np.float64)
    values = values - values.max(axis=-1, keepdims=True)
    return np.asarray(values - np.log(np.exp(values).sum(axis=-1, keepdims=True)), dtype=np.float64)
