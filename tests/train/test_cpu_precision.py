"""Precision of a training on a CPU: one decision a training, by a trial."""

import json
import threading
from dataclasses import replace

import pytest

from finetune.errors import InputError
from finetune.train import cpu_precision
from finetune.train.cpu_precision import FILE, decide


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A base of 135 M parameters, on a CPU with bf16 instructions."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "base.json").write_text(json.dumps({"parameters": 135_000_000}))
    (base / "config.json").write_text(json.dumps({"hidden_size": 576, "intermediate_size": 1536}))
    monkeypatch.setattr(cpu_precision, "has_bf16", lambda: True)
    return base


def tried(monkeypatch, ratio):
    sizes = []
    monkeypatch.setattr(cpu_precision, "measure", lambda *size: sizes.append(size) or ratio)
    return sizes


def test_the_trial_decides_and_a_resumed_training_keeps_what_it_said(large, ctx, tmp_path, monkeypatch):
    sizes = tried(monkeypatch, 3.0)
    assert decide("auto", "cpu", large, tmp_path / "c", ctx)[0] == "bf16"
    tried(monkeypatch, 0.1)
    chosen, why = decide("auto", "cpu", large, tmp_path / "c", ctx)
    assert chosen == "bf16" and "3.0 times" in why and sizes == [(576, 1536)]
    assert decide("auto", "cpu", large, tmp_path / "other", ctx)[0] == "fp32"


def test_without_instructions_or_for_a_small_base_there_is_no_trial(large, ctx, tmp_path, monkeypatch):
    sizes = tried(monkeypatch, 9.0)
    monkeypatch.setattr(cpu_precision, "has_bf16", lambda: False)
    assert decide("auto", "cpu", large, tmp_path / "a", ctx)[0] == "fp32"
    monkeypatch.setattr(cpu_precision, "has_bf16", lambda: True)
    (large / "base.json").write_text(json.dumps({"parameters": 1_300_000}))
    assert decide("auto", "cpu", large, tmp_path / "b", ctx)[0] == "fp32"
    assert not sizes


def test_a_training_of_an_earlier_version_goes_on_in_fp32(large, ctx, tmp_path, monkeypatch):
    tried(monkeypatch, 9.0)
    (tmp_path / "c" / "checkpoint-4").mkdir(parents=True)
    assert decide("auto", "cpu", large, tmp_path / "c", ctx)[0] == "fp32"


def test_a_precision_of_the_recipe_is_taken_without_a_trial(large, ctx, tmp_path, monkeypatch):
    sizes = tried(monkeypatch, 9.0)
    assert decide("fp32", "cpu", large, tmp_path / "c", ctx)[0] == "fp32"
    with pytest.raises(InputError, match="needs a GPU"):
        decide("fp16", "cpu", large, tmp_path / "c", ctx)
    assert not sizes and not (tmp_path / "c").exists()


def test_other_processes_wait_for_the_first_ones_decision(large, ctx, tmp_path, monkeypatch):
    tried(monkeypatch, 3.0)
    found = []
    other = threading.Thread(
        target=lambda: found.append(decide("auto", "cpu", large, tmp_path / "c", replace(ctx, rank=1, world=2)))
    )
    other.start()
    first = decide("auto", "cpu", large, tmp_path / "c", replace(ctx, world=2))
    other.join(30)
    assert found == [first] and (tmp_path / "c" / FILE).exists()


def test_the_measurement_is_a_ratio_of_times(ctx):
    assert 0 < cpu_precision.measure(64, 128) < 1000


def test_a_record_cut_off_by_a_kill_is_made_again(large, ctx, tmp_path, monkeypatch):
    tried(monkeypatch, 3.0)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / FILE).write_bytes(b"")
    assert decide("auto", "cpu", large, tmp_path / "c", ctx)[0] == "bf16"
    monkeypatch.setattr(cpu_precision, "has_bf16", lambda: False)
    assert "WARNING" in decide("auto", "cpu", large, tmp_path / "c", ctx)[1]


def test_layers_of_many_widths_are_tried_at_the_widest(large, ctx, tmp_path, monkeypatch):
    sizes = tried(monkeypatch, 3.0)
    (large / "config.json").write_text(json.dumps({"hidden_size": 576, "intermediate_size": [512, 1536]}))
    decide("auto", "cpu", large, tmp_path / "c", ctx)
    assert sizes == [(576, 1536)]
