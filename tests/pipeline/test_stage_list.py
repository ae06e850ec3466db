"""The headline of each stage, from its metrics and from those of a version that lacked a figure."""

import pytest

from finetune.metrics import Headline
from finetune.pipeline.stage_list import STAGES, headline_of

CERTIFIED = {"base": "original", "agreement": 0.9, "mean_kl": 0.01}


@pytest.mark.parametrize(
    ("stage", "metrics", "figure", "rows"),
    [
        ("ingest", {"rows_out": 8, "refused": {"type": 2}}, "2 refused", "8"),
        ("dedup", {"rows_in": 9, "rows_out": 6, "exact": 1, "minhash": 2, "embedding": 0},
         "1 exact, 2 near-duplicates dropped", "9 → 6"),
        ("split", {"rows_in": 9, "train_rows": 7, "eval_rows": 2, "groups": 9, "leaks": 0},
         "9 groups, 0 leaks", "9 → 7 + 2 held out"),
        ("certify", {**CERTIFIED, "tokens": 812}, "original: agreement 90.0%, KL 0.01, on 812 tokens only", ""),
        ("certify", {**CERTIFIED, "tokens": 4096}, "original: agreement 90.0%, KL 0.01", ""),
        ("export", {"perplexity": {"merged": 4.0, "q2_k": 5.5}}, "perplexity merged 4, q2_k 5.5", ""),
    ],
)  # fmt: skip
def test_a_stage_gives_its_figure_and_rows(stage, metrics, figure, rows):
    headline = headline_of(stage, metrics)
    assert (headline.figure, headline.rows) == (figure, rows)


@pytest.mark.parametrize("stage", [stage.name for stage in STAGES])
def test_metrics_of_another_version_give_an_empty_headline(stage):
    assert headline_of(stage, {}) == headline_of(stage, {"rows_in": None, "refused": 3}) == Headline()
