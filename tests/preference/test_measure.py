"""Figures of alignment on numbers that are known, and the gates that they are held to."""

import numpy as np
import pytest

from finetune.errors import GateRefused
from finetune.preference import gates
from finetune.preference.measure import _paired, _unpaired
from finetune.preference.words import figures_of, words_of
from finetune.recipe.load import load_recipe
from finetune.stages import align, evaluate

GOOD = {
    "eval_pairs": 50, "accuracy": 0.8, "accuracy_interval": [0.7, 0.9], "perplexity_ratio": 1.1,
    "perplexity_start": 5.0, "perplexity_aligned": 5.5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, ""),
        ({"accuracy_interval": [0.5, 0.9]}, "preference.min_accuracy"),
        ({"accuracy_interval": [float("nan"), 0.9]}, "preference.min_accuracy"),
        ({"perplexity_ratio": 1.21}, "preference.max_perplexity_ratio"),
        ({"perplexity_ratio": float("nan")}, "preference.max_perplexity_ratio"),
    ],
)
def test_the_gates_fire_on_what_is_out_of_bounds_and_on_nothing_else(changed, words):
    figures = GOOD | changed
    gates.check(figures, None, None)
    if not words:
        return gates.check(figures, 0.5, 1.2)
    with pytest.raises(GateRefused, match=words):
        gates.check(figures, 0.5, 1.2)


def test_a_bound_on_what_cannot_be_measured_is_refused():
    with pytest.raises(GateRefused, match="cannot be measured"):
        gates.check({"eval_pairs": 0}, 0.5, 1.2)
    gates.check({"eval_pairs": 0}, None, 1.2)
    gates.check({}, 0.5, 1.2)


def test_ties_count_half_and_noise_is_not_told_apart():
    found = _paired(np.array([1.0, -1.0, 0.0, 3.0]), 0.1, 0)
    assert found["accuracy"] == 0.625 and found["margin"] == pytest.approx(0.075)
    noise = _paired(np.random.default_rng(0).normal(size=400), 0.1, 0)
    assert noise["accuracy_interval"][0] < 0.5 < noise["accuracy_interval"][1]


def test_single_answers_are_compared_across_labels():
    rng = np.random.default_rng(0)
    same = _unpaired(rng.normal(size=80), rng.normal(size=60), 0.1, 0)
    assert same["accuracy_interval"][0] < 0.5 < same["accuracy_interval"][1]
    apart = _unpaired(rng.normal(2, 1, 80), rng.normal(0, 1, 60), 0.1, 0)
    assert apart["accuracy_interval"][0] > 0.5 and apart["margin"] == pytest.approx(0.2, abs=0.05)


def test_displacement_is_said():
    figures = GOOD | {
        "margin": 0.1, "margin_interval": [0.05, 0.15], "mean_kl_from_start": 0.01, "drift_chosen": -0.2,
        "drift_rejected": -0.4, "displacement": True, "answer_tokens_start": 10.0, "answer_tokens": 12.0,
        "stop_rate_start": 1.0, "stop_rate": 0.9,
    }  # fmt: skip
    assert any(line.startswith("displacement: chosen answers lost 0.2") for line in words_of(figures))
    assert ("tokens of an answer", "10 → 12") in figures_of(figures)
    assert "no pair is held out" in words_of({"eval_pairs": 0})[0]


def test_a_gate_is_in_the_key_of_evaluate_and_not_of_align():
    """Another bound must not train again."""
    loads = [load_recipe("recipes/tiny-preference.yaml", [f"preference.min_accuracy={n}"]).recipe for n in (0.5, 0.6)]
    assert align.spec(loads[0]) == align.spec(loads[1])
    assert evaluate.spec(loads[0]) != evaluate.spec(loads[1])
    off = load_recipe("recipes/tiny-pydoc.yaml").recipe
    assert align.spec(off) is None and evaluate.spec(off).gates is None
