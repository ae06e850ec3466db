"""Preference training on a tiny quantised base: the reference, the invariants, checkpoints."""

import contextlib
import json
import math
import shutil
from dataclasses import replace
from typing import get_args

import pytest
import torch

from finetune.errors import GateRefused
from finetune.preference import align as preference_align
from finetune.preference import batches, reference
from finetune.preference.follower import AlignFollower
from finetune.preference.reference import Objective, expected_loss
from finetune.recipe import Runtime
from finetune.recipe.preference import SMOOTHED, DpoLoss
from finetune.train import recipe_trainer
from tests.helpers.preferences import DPO, KTO, aligned, job, judged_rows, pair_rows, start_adapter, write_pairs
from tests.helpers.trainings import assert_close
from tests.train.test_divergence import full


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


def on(ctx, **runtime):
    return replace(ctx, runtime=Runtime(**{"save_steps": 100, **runtime}))


@pytest.mark.parametrize("count", [11, pytest.param(12, marks=pytest.mark.slow)])  # 11: the last step has three pairs
def test_a_batch_of_four_pairs_is_four_of_one(count, load, base, adapter, ctx, tmp_path):
    rows = write_pairs(tmp_path / "pairs" / "train.parquet", pair_rows(count))
    found = [
        aligned(job(tmp_path, f"m{n}", max_steps=4), load(), base, rows, adapter, on(ctx, micro_batch_rows=n))[1]
        for n in (4, 2, 1)
    ]
    assert_close(found[0], found[1])
    assert_close(found[0], found[2])


def test_a_batch_of_four_answers_is_two_of_two_in_kto(load, base, adapter, judged, ctx, tmp_path):
    found = [
        aligned(job(tmp_path, f"m{n}", max_steps=4), load(), base, judged, adapter, on(ctx, micro_batch_rows=n), KTO)
        for n in (4, 2)
    ]
    assert_close(found[0][1], found[1][1])
    logs = [lines(job(tmp_path, f"m{n}")) for n in (4, 2)]
    assert [e["kl"] for e in logs[0]] == pytest.approx([e["kl"] for e in logs[1]], abs=1e-4)


@pytest.mark.parametrize("objective", [DPO, KTO], ids=["dpo", "kto"])
def test_the_logits_of_supervised_positions_train_as_trls_head_does(
    objective, load, base, adapter, pairs, judged, ctx, tmp_path, monkeypatch
):
    rows, kept = judged if objective is KTO else pairs, []
    score = recipe_trainer.score_supervised
    monkeypatch.setattr(
        recipe_trainer, "score_supervised", lambda model, pieces: kept.append(model) or score(model, pieces)
    )
    own = aligned(job(tmp_path, "own"), load(), base, rows, adapter, ctx, objective)[1]
    assert len(kept) == 1
    monkeypatch.setattr(recipe_trainer, "keeps_logits", lambda *_: False)
    theirs = aligned(job(tmp_path, "theirs"), load(), base, rows, adapter, ctx, objective)[1]
    assert len(kept) == 1
    assert_close(own, theirs)
    for name in ("loss", "accuracy", "reward_chosen", "logp_rejected"):
        found, expected = ([line.get(name, 0.0) for line in lines(job(tmp_path, n))] for n in ("own", "theirs"))
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5), name


SLOW = pytest.mark.slow


@pytest.mark.parametrize("policy", ["full", pytest.param("every_2", marks=SLOW), pytest.param("selective", marks=SLOW)])
def test_checkpointing_changes_nothing(policy, load, base, adapter, pairs, ctx, tmp_path):
    off, without = aligned(job(tmp_path, "off"), load(), base, pairs, adapter, ctx)
    on, recomputed = aligned(replace(job(tmp_path, "on"), checkpointing=policy), load(), base, pairs, adapter, ctx)
    assert on.loss == off.loss
    assert_close(without, recomputed, 1e-6)


@pytest.mark.parametrize("objective", [DPO, KTO], ids=["dpo", "kto"])
def test_a_killed_alignment_goes_on_to_the_same_bits(objective, load, base, adapter, pairs, judged, ctx, tmp_path):
    rows = judged if objective is KTO else pairs
    often = on(ctx, save_steps=2)
    _, whole = aligned(job(tmp_path, "whole", max_steps=6), load(), base, rows, adapter, often, objective)
    aligned(job(tmp_path, "cut", max_steps=6), load(), base, rows, adapter, often, objective)
    cut = tmp_path / "cut" / "checkpoints"
    assert not list(cut.glob("*/ref"))  # only `default` is saved
    for folder in cut.glob("checkpoint-*"):
        if folder.name != "checkpoint-4":  # as if it had been killed before the next one
            shutil.rmtree(folder)
    result, resumed = aligned(job(tmp_path, "cut", max_steps=6), load(), base, rows, adapter, often, objective)
    assert result.resumed_from == 4
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)


def test_the_reference_log_probabilities_are_those_of_a_second_model(load, base, adapter, pairs, ctx, tmp_path):
    """After the training: what TRL precomputes once for `ref`, and a second base with the start adapter."""
    from finetune.models import loading

    own = job(tmp_path, max_steps=6, learning_rate=2e-2)
    kept = []
    build = preference_align._trainer
    with pytest.MonkeyPatch().context() as patch:
        patch.setattr(preference_align, "_trainer", lambda *a: kept.append(build(*a)) or kept[-1])
        aligned(own, load(), base, pairs, adapter, ctx)
    rows = batches.read_pairs(pairs, "dpo", 4, 0).to_pylist()
    batch = batches.collate_pairs(rows, 0)
    second = loading.attach_adapter(load(), adapter)
    with torch.no_grad():
        theirs = torch.cat(kept[0].compute_ref_log_probs(kept[0].model, batch))
        expected = reference.log_probabilities(second, batch)
        policy = reference.log_probabilities(kept[0].model, batch)
    assert torch.allclose(theirs, expected, atol=2e-4)
    assert (policy - expected).abs().max() > 0.1


def test_a_full_device_halves_the_pairs_and_keeps_the_batch(load, base, adapter, pairs, ctx, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe_trainer, "in_pieces", lambda _: False)  # as on a GPU
    own = on(ctx, micro_batch_rows=4, save_steps=1)
    result, weights = aligned(job(tmp_path, "full"), full(load(), 2, after=10), base, pairs, adapter, own)
    _, expected = aligned(job(tmp_path, "roomy"), load(), base, pairs, adapter, on(ctx, micro_batch_rows=4))
    assert result.micro_batch_rows < 4
    assert_close(weights, expected)


def test_a_model_without_a_frozen_copy_of_its_adapter_is_refused(load, adapter):
    """What TRL builds from peft_config=: the base would be the reference."""
    from finetune.models import loading

    model = loading.attach_adapter(load(), adapter, trainable=True)
    with pytest.raises(GateRefused, match="the reference would be the base"):
        reference.restore(model, reference.start_values(model))


def test_a_margin_before_the_first_step_is_refused(load, base, adapter, pairs, ctx, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "as_reference", lambda model: model.disable_adapter())
    with pytest.raises(GateRefused, match="every margin must be 0"):
        aligned(job(tmp_path), load(), base, pairs, adapter, ctx)


@pytest.mark.parametrize(
    ("logs", "refused"),
    [({"rewards/margins": 0.0, "loss": math.log(2)}, False), ({"rewards/margins": 1e-6, "loss": math.log(2)}, True),
     ({"rewards/rejected": -1e-6, "loss": math.log(2)}, True), ({"rewards/margins": 0.0, "loss": 0.6932}, True)],
)  # fmt: skip
def test_the_first_step_must_begin_at_the_start_too(logs, refused, ctx, tmp_path):
    follower = AlignFollower(ctx, tmp_path / "m", tmp_path / "c", 1, fp16=False, objective=DPO, start={})
    with pytest.raises(GateRefused) if refused else contextlib.nullcontext():
        follower._first_step(logs, "cpu")


@pytest.mark.parametrize("part", [".default.", ".ref."])
def test_one_element_beside_the_start_is_refused(part, load, base, adapter, pairs, ctx, tmp_path, monkeypatch):
    """What TRL's rounding to bf16 does, to one element."""
    restore = reference.restore

    def rounded(model, start):
        restore(model, start)
        name = next(n for n, _ in model.named_parameters() if part in n)
        with torch.no_grad():
            model.get_parameter(name).view(-1)[0].add_(1e-6)

    monkeypatch.setattr(reference, "restore", rounded)
    with pytest.raises(GateRefused, match="is not equal to the start adapter"):
        aligned(job(tmp_path), load(), base, pairs, adapter, ctx)


def test_trl_still_rounds_the_policy_of_a_quantised_model(load, base, adapter, pairs, ctx, tmp_path, monkeypatch):
    """When this fails, reference.restore can go."""
    monkeypatch.setattr(reference, "restore", lambda model, start: None)
    with pytest.raises(GateRefused, match="not fp32"):
        aligned(job(tmp_path), load(), base, pairs, adapter, ctx)


def test_labels_of_other_tokens_are_refused(load, base, adapter, pairs, ctx, tmp_path, monkeypatch):
    collate = batches.collate_pairs

    def whole_answers(examples, pad_id):  # TRL's own collator supervises every token of an answer
        return collate([{**e, "chosen_mask": [1] * len(e["chosen_mask"])} for e in examples], pad_id)

    monkeypatch.setattr(batches, "collate_pairs", whole_answers)
    with pytest.raises(GateRefused, match="other tokens or labels"):
        aligned(job(tmp_path), load(), base, pairs, adapter, ctx)


def test_every_loss_begins_where_equal_policies_put_it(load, base, adapter, pairs, ctx, tmp_path):
    """TRL's own formulas beside those of objective.py, on one trainer whose policy is its reference."""
    kept, build = [], preference_align._trainer
    with pytest.MonkeyPatch().context() as patch:
        patch.setattr(preference_align, "_trainer", lambda *a: kept.append(build(*a)) or kept[-1])
        aligned(job(tmp_path, max_steps=1, learning_rate=1e-30), load(), base, pairs, adapter, ctx)
    trainer = kept[0]
    trainer.model.eval()
    batch = batches.collate_pairs(batches.read_pairs(pairs, "dpo", 4, 0).to_pylist(), 0)
    trainer.beta, trainer.share = 0.2, 1.0
    for loss in (n for n in get_args(DpoLoss) if n != "sft"):
        trainer.loss_types, trainer.label_smoothing = [loss], 0.1 if loss in SMOOTHED else 0.0
        with torch.no_grad():
            found = float(trainer.compute_loss(trainer.model, dict(batch)))
        assert found == pytest.approx(
            expected_loss(Objective(method="dpo", loss=loss, beta=0.2, label_smoothing=trainer.label_smoothing), None)
        ), loss
