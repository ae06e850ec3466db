"""Intervals: seeded, covering, and paired where it matters."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.eval.metrics import paired_interval, ratio_interval


def rows(seed: int, count: int = 200) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 60, count).astype(float)
    return tokens * (2 + rng.normal(0, 0.5, count)), tokens


def test_the_value_is_the_ratio_of_sums_and_the_seed_decides() -> None:
    nll, tokens = rows(0)
    first = ratio_interval(nll, tokens, seed=3)
    assert first.value == pytest.approx(nll.sum() / tokens.sum())
    assert first.low < first.value < first.high
    assert first == ratio_interval(nll, tokens, seed=3)
    assert first != ratio_interval(nll, tokens, seed=4)


def test_it_covers_the_truth_about_as_often_as_it_says() -> None:
    hits = 0
    for seed in range(120):
        nll, tokens = rows(seed, 80)
        interval = ratio_interval(nll, tokens, samples=400)
        hits += interval.low <= 2 <= interval.high
    assert 0.86 <= hits / 120 <= 1


def test_pairing_sees_a_small_steady_difference_that_two_intervals_do_not() -> None:
    nll, tokens = rows(1)
    better = nll - 0.01 * tokens
    paired = paired_interval(better, nll, tokens)
    assert paired.high < 0
    assert ratio_interval(better, tokens).high > ratio_interval(nll, tokens).low
    assert paired_interval(nll, nll, tokens).high == 0


def test_nothing_to_resample_is_an_error() -> None:
    for numerators, denominators in (([], []), ([1.0], [0.0]), ([1.0, 2.0], [1.0]), ([1.0, 1.0], [3.0, -1.0])):
        with pytest.raises(ValueError, match=r"denominators|arrays"):
            ratio_interval(np.array(numerators), np.array(denominators))
