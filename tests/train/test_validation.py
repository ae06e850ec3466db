"""The held-out loss on the way: what it is, what it leaves alone, the best adapter, the early stop, the resumed run."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from finetune.errors import FinetuneError, GateRefused
from finetune.eval import scoring
from finetune.recipe import Lora, Runtime, Train
from finetune.tokenization.token_rows import TokenRow
from finetune.train.checkpoint import COMPLETE
from finetune.train.validation import BEST, STATE, HeldOut, batch_nll
from tests.helpers.trainings import documents, job, packed, trained, unpacked


@pytest.fixture(scope="module")
def rows():
    """Of tokens that training makes ever less likely: their loss rises."""
    generator = np.random.default_rng(7)
    found = []
    for i in range(9):
        ids = generator.integers(300, 390, int(generator.integers(6, 30)))
        found.append(TokenRow(str(i), ids, np.arange(len(ids)) >= len(ids) // 2))
    return found


def measured(values):
    lines = [json.loads(line) for line in values.metrics_file.read_text().splitlines()]
    return {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}


def with_held_out(values, rows, **lora):
    return dataclasses.replace(values, held_out=rows, lora=Lora(**{"r": 4, "dropout": 0.1, **lora}))


def test_the_loss_is_the_sum_over_tokens_however_the_rows_are_batched(load, ctx, rows, monkeypatch):
    from contextlib import nullcontext

    model = load()
    nll, counts = scoring.row_nll(model, rows, 64, ctx, "")
    expected = nll.sum() / counts.sum()
    mean_of_means = float(np.mean(nll / counts))
    for size in (1, 64, 4096):
        monkeypatch.setattr("finetune.train.validation.BATCH_TOKENS", size)
        found = HeldOut(rows, Train(eval_steps=1), 4, nullcontext).loss(model)
        assert found == pytest.approx(expected, abs=1e-5)
    assert abs(mean_of_means - expected) > 1e-3  # a mean of rows would be another figure
    assert int(batch_nll(model, rows[:2])[1]) == int(counts[:2].sum())


def test_two_ranks_share_the_rows_and_every_rank_takes_as_many_turns(load, rows, monkeypatch):
    from contextlib import nullcontext

    monkeypatch.setattr("finetune.train.validation.BATCH_TOKENS", 1)
    model, sums, turns = load(), [], []

    def reduced(total):
        sums.append(total.clone())

    monkeypatch.setattr("torch.distributed.all_reduce", reduced)
    counter = model.register_forward_hook(lambda *_: turns.append(1))
    for rank in range(2):
        HeldOut(rows, Train(eval_steps=1), 4, nullcontext, rank, 2).loss(model)
        assert len(turns) == 5 * (rank + 1)  # nine rows, one at a time
    counter.remove()
    nll, tokens = (sums[0] + sums[1]).tolist()
    assert nll / tokens == pytest.approx(HeldOut(rows, Train(eval_steps=1), 4, nullcontext).loss(model), abs=1e-6)


def test_measuring_changes_no_bit_of_the_training(load, base, ctx, tmp_path, rows):
    train = unpacked(documents())
    plain = dataclasses.replace(job(tmp_path, "plain", neftune_alpha=5.0), lora=Lora(r=4, dropout=0.1))
    looked = with_held_out(job(tmp_path, "looked", neftune_alpha=5.0, eval_steps=1), rows)
    a, b = trained(plain, load(), base, train, ctx)[1], trained(looked, load(), base, train, ctx)[1]
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert list(measured(looked)) == [1, 2, 3] and measured(plain) == {}


def test_the_best_adapter_is_what_is_left(load, base, ctx, tmp_path, rows):
    settings = {"learning_rate": 2e-2, "schedule": "constant", "max_steps": 6, "eval_steps": 2, "keep_best": True}
    values = with_held_out(job(tmp_path, **settings), rows)
    result, _ = trained(values, load(), base, unpacked(documents()), ctx)
    losses = measured(values)
    assert list(losses) == [2, 4, 6]
    best = min(losses, key=losses.get)
    assert best != 6 and result.held_out["held_out_best_step"] == best
    assert result.held_out["held_out_loss"] == losses[6] and not result.held_out["stopped_early"]
    again = HeldOut(rows, values.train, 6, lambda: torch.autocast("cpu", enabled=False))
    assert again.loss(result.model) == losses[best]
    assert result.steps == 6


def test_patience_stops_and_the_stopped_run_is_not_gone_on_with(load, base, ctx, tmp_path, rows):
    values = with_held_out(
        job(tmp_path, learning_rate=2e-2, schedule="constant", max_steps=20, eval_steps=1, patience=2), rows
    )
    result, weights = trained(values, load(), base, unpacked(documents()), ctx)
    losses = measured(values)
    assert result.held_out["stopped_early"] and result.steps == len(losses) < 20
    assert min(losses, key=losses.get) == result.steps - 2
    again, same = trained(values, load(), base, unpacked(documents()), ctx)
    assert again.steps == result.steps and again.resumed_from == result.steps
    assert all(torch.equal(weights[n], same[n]) for n in weights)


def test_without_patience_it_goes_to_the_end(load, base, ctx, tmp_path, rows):
    values = with_held_out(job(tmp_path, learning_rate=5e-2, max_steps=5, eval_steps=2), rows)
    result, _ = trained(values, load(), base, unpacked(documents()), ctx)
    assert result.steps == 5 and list(measured(values)) == [2, 4, 5]  # the last step is always measured


@pytest.mark.parametrize("rows_are", ["packed", pytest.param("unpacked", marks=pytest.mark.slow)])
def test_a_resumed_run_is_an_uninterrupted_one_with_everything_on(rows_are, load, base, ctx, tmp_path, rows):
    """Noise, two learning rates, dropout, a trained head, held-out loss, best adapter: bit for bit."""
    settings = {
        "max_steps": 6, "batch_rows": 2, "neftune_alpha": 5.0, "lora_plus_ratio": 8.0, "learning_rate": 1e-2,
        "eval_steps": 2, "keep_best": True, "patience": 5, "schedule": "wsd", "optimizer": "paged_adamw_8bit",
    }  # fmt: skip
    train = packed(documents(), tmp_path) if rows_are == "packed" else unpacked(documents())
    often = dataclasses.replace(ctx, runtime=Runtime(save_steps=3))
    whole = with_held_out(job(tmp_path, "whole", **settings), rows, modules_to_save=["lm_head"])
    cut = with_held_out(job(tmp_path, "cut", **settings), rows, modules_to_save=["lm_head"])
    first, expected = trained(whole, load(), base, train, often)
    trained(cut, load(), base, train, often)
    (cut.checkpoints / "checkpoint-6" / COMPLETE).unlink()  # as after a kill while it was written
    second, found = trained(cut, load(), base, train, often)
    assert second.resumed_from == 3
    assert all(torch.equal(expected[n], found[n]) for n in expected)
    assert measured(whole) == measured(cut) and list(measured(whole)) == [2, 4, 6]
    assert first.held_out == second.held_out


def test_a_checkpoint_carries_what_was_seen(load, base, ctx, tmp_path, rows):
    often = dataclasses.replace(ctx, runtime=Runtime(save_steps=1))
    values = with_held_out(job(tmp_path, max_steps=2, eval_steps=1, keep_best=True), rows)
    trained(values, load(), base, unpacked(documents()), often)
    state = json.loads((values.checkpoints / "checkpoint-1" / STATE).read_text())
    assert state["step"] == state["best_step"] == 1 and state["best_loss"] == measured(values)[1]
    assert (values.checkpoints / "checkpoint-1" / BEST).exists()
    (values.checkpoints / "checkpoint-2" / STATE).unlink()
    with pytest.raises(FinetuneError, match="written without train"):
        trained(values, load(), base, unpacked(documents()), often)


def test_no_held_out_row_and_a_loss_that_is_no_number_are_refused(load, base, ctx, tmp_path, rows):
    with pytest.raises(GateRefused, match="all held-out rows are truncated"):
        trained(job(tmp_path, "none", eval_steps=1), load(), base, unpacked(documents()), ctx)
    held = HeldOut(rows, Train(eval_steps=1), 4, lambda: torch.autocast("cpu", enabled=False))
    model = load()
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] = float("nan")
    with pytest.raises(FinetuneError, match="held-out loss became nan at step 1"):
        held.look(model, 1)
