"""Agreement and divergence of two models' next tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from finetune.eval.metrics import agreement, kl_divergence

LOGITS = arrays(np.float64, (3, 5), elements=st.floats(-30, 30))


def test_agreement() -> None:
    assert agreement(np.array([1, 2, 3, 4]), np.array([1, 2, 0, 4])) == 0.75
    with pytest.raises(ValueError, match="positions"):
        agreement(np.array([], dtype=np.int64), np.array([], dtype=np.int64))


def test_kl_of_two_coins() -> None:
    first, second = np.log([[0.5, 0.5]]), np.log([[0.9, 0.1]])
    assert kl_divergence(first, second)[0] == pytest.approx(0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1))


@given(LOGITS, LOGITS, st.floats(-100, 100))
def test_kl_is_not_negative_zero_on_itself_and_blind_to_a_shift(a: np.ndarray, b: np.ndarray, shift: float) -> None:
    assert (kl_divergence(a, b) >= -1e-9).all()
    np.testing.assert_allclose(kl_divergence(a, a + shift), 0, atol=1e-9)


def test_a_token_without_a_chance_costs_nothing() -> None:
    assert kl_divergence(np.array([[0.0, -np.inf]]), np.array([[0.0, 0.0]]))[0] == pytest.approx(np.log(2))
