"""Preference training on a tiny quantised base: the reference, the invariants, checkpoints."""

import json

import pytest
import torch

from tests.helpers.preferences import aligned, job, judged_rows, pair_rows, start_adapter, write_pairs


@pytest.fixture
def adapter(load, tmp_path):
    return start_adapter(load(), tmp_path / "start")


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "pairs" / "train.parquet", pair_rows())


@pytest.fixture
def judged(tmp_path):
    return write_pairs(tmp_path / "judged" / "train.parquet", judged_rows())


def lines(job):
    return [json.loads(line) for line in job.metrics_file.read_text().splitlines()]


def test_dpo_begins_at_ln_2_with_a_margin_of_0_and_learns_the_pairs(load, base, adapter, pairs, ctx, tmp_path):
    own = job(tmp_path, max_steps=12, learning_rate=2e-2)
    _, weights = aligned(own, load(), base, pairs, adapter, ctx)
    log = lines(own)
    assert log[0]["loss"] == pytest.approx(0.6931472, abs=1e-6) and log[0]["margin"] == 0
    assert log[-1]["loss"] < 0.6 and log[-1]["margin"] > 0.1
    assert {p.dtype for p in weights.values()} == {torch.float32}
    assert all(".default." in name for name in weights)
