"""The verdict at the head of the report: a memorised run and a run of two steps both say so, and are not green."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.report.made_run import made_run
from tests.report.test_page import page, text_of

EVALUATE: dict[str, Any] = {
    "rows": 100, "tokens": 4000, "perplexity_base": 70.0, "perplexity_adapter": 20.0, "perplexity_ratio": 0.29,
    "perplexity_ratio_interval": [0.25, 0.33], "nll_true": 3.0, "nll_shuffled": 3.8,
    "nll_difference_interval": [0.4, 0.7], "generations": 6, "stop_rate": 1.0, "stop_rate_base": 0.0,
}  # fmt: skip
SAME = {"perplexity_adapter": 69.5, "perplexity_ratio": 0.99, "perplexity_ratio_interval": [0.97, 1.02]}


def head(tmp_path: Path, evaluate: dict[str, Any] = EVALUATE, **train: Any) -> tuple[str, str]:
    run = made_run(tmp_path)
    run.note("decontaminate", "off")
    for name in ("sample", "pairs", "align"):
        run.note(name, "off")
    run.done("evaluate", **evaluate)
    run.done("train", **{"steps": 150, "loss": 2.8, "first_loss": 4.0, "device": "cpu", **train})
    made = page(run)
    return made, text_of(made[: made.index('id="data"')])


def test_a_good_run_is_green_with_five_lines(tmp_path: Path) -> None:
    made, words = head(tmp_path)
    assert 'class="result done"' in made and made.count("<dt>") >= 5
    assert "Better than the base? yes : perplexity on held-out rows 70 → 20" in words
    assert "Perplexity: exp(mean negative log-likelihood" in words


@pytest.mark.parametrize(
    ("evaluate", "train", "sentence"),
    [
        (EVALUATE, {"loss": 0.05}, "Memorised? YES"),
        ({**EVALUATE, **SAME}, {"steps": 2}, "ONLY 2 OPTIMISER STEPS"),
        ({**EVALUATE, **SAME}, {"steps": 2}, "DO NOT PUBLISH"),
        ({**EVALUATE, "stop_rate": 0.0}, {}, "Do its answers end? NO"),
    ],
)
def test_a_bad_run_says_so_and_is_not_green(
    tmp_path: Path, evaluate: dict[str, Any], train: dict[str, Any], sentence: str
) -> None:
    made, words = head(tmp_path, evaluate, **train)
    assert sentence in words and 'class="result done"' not in made
