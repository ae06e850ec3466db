"""Perplexity over tokens, not over rows."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.eval.metrics import perplexity, perplexity_interval


def test_a_uniform_guess_costs_the_vocabulary() -> None:
    tokens = np.array([3.0, 9.0])
    assert perplexity(tokens * np.log(50), tokens) == pytest.approx(50)


def test_long_rows_weigh_more() -> None:
    assert perplexity(np.array([1.0, 0.0]), np.array([1.0, 99.0])) == pytest.approx(np.exp(0.01))


def test_the_interval_is_in_perplexity() -> None:
    tokens = np.full(50, 10.0)
    found = perplexity_interval(tokens * np.linspace(1, 2, 50), tokens)
    assert found.value == pytest.approx(np.exp(1.5))
    assert np.e < found.low < found.value < found.high < np.e**2


def test_no_token_is_an_error() -> None:
    with pytest.raises(ValueError, match="no supervised token"):
        perplexity(np.array([0.0]), np.array([0.0]))
