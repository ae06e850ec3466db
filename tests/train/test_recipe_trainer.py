"""The loss on a CPU is TRL's, from the logits of the supervised positions alone."""

import json
from dataclasses import replace

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutput

from finetune.recipe import Runtime
from finetune.train import recipe_trainer
from tests.helpers.trainings import assert_close, documents, job, packed, trained, unpacked


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("items", [None, 31])
def test_loss_and_gradients_are_trls(layout, items, load, base, ctx, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(recipe_trainer.RecipeTrainer, "train", lambda trainer, **_: made.append(trainer))
    rows = documents(4)
    table = packed(rows, tmp_path) if layout == "packed" else unpacked(rows)
    with pytest.raises(Exception, match="logged no loss"):
        trained(job(tmp_path, max_steps=1), load(), base, table, ctx)
    trainer = made[0]
    base_model = trainer.model.get_base_model()
    own_forward = vars(base_model)["forward"]
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])
    found = []
    for own in (True, False):
        base_model.forward = own_forward if own else own_forward.__wrapped__
        trainer.model.train()
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)
        loss.backward()
        found.append((loss.item(), {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert_close(found[0][1], found[1][1], 1e-5)


def test_a_training_by_either_loss_ends_with_the_same_adapter_and_figures(load, base, ctx, tmp_path, monkeypatch):
    rows = packed(documents(), tmp_path)
    ends = []
    for name in ("own", "trl"):
        if name == "trl":
            monkeypatch.setattr(recipe_trainer, "keeps_logits", lambda model, tokens: False)
        _, weights = trained(job(tmp_path, name), load(), base, rows, ctx)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        ends.append((weights, lines))
    assert_close(ends[0][0], ends[1][0])
    for own, theirs in zip(ends[0][1], ends[1][1], strict=True):
        assert own.keys() == theirs.keys() and own["tokens"] == theirs["tokens"]
        assert own["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


def test_large_logits_and_models_that_cannot_choose_positions_are_left_to_trl(load):
    model = load()
    most = recipe_trainer.LOGIT_BYTES // (12 * model.config.vocab_size)
    assert recipe_trainer.keeps_logits(model, most)
    assert not recipe_trainer.keeps_logits(model, most + 1)

    original = type(model).forward

    class Whole(type(model)):
        def forward(self, input_ids=None, use_cache=None):
            return original(self, input_ids)

    class Last(type(model)):
        def forward(self, input_ids=None, use_cache=None, logits_to_keep=0):
            return original(
                self, input_ids, logits_to_keep=len(logits_to_keep) if torch.is_tensor(logits_to_keep) else 0
            )

    class Slice(type(model)):
        def forward(self, input_ids=None, use_cache=None, logits_to_keep=0):
            logits = original(self, input_ids).logits
            return CausalLMOutput(logits=logits[:, -logits_to_keep:] if torch.is_tensor(logits_to_keep) else logits)

    for kind in (Whole, Last, Slice):
        model.__class__ = kind
        assert not recipe_trainer.keeps_logits(model, 1)


def test_a_row_without_a_supervised_token_adds_nothing_to_the_loss(load, base, ctx, tmp_path):
    ids = list(range(5, 15))
    rows = [*documents(3), (ids, [-100] * len(ids))]
    losses = []
    for name, table in (("all", rows), ("supervised", rows[:3])):
        one = replace(ctx, runtime=Runtime(micro_batch_rows=1, save_steps=100))
        settings = job(tmp_path, name, max_steps=1, batch_rows=len(table))
        losses.append(trained(settings, load(), base, unpacked(table), one)[0].loss)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def taken_from(trainer, batch):
    """Loss and gradients of one micro-batch."""
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=31)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_pieces_in_threads_are_the_whole(layout, checkpointing, load, base, ctx, tmp_path, monkeypatch):
    made, taken = [], []
    monkeypatch.setattr(recipe_trainer, "PIECE_TOKENS", 8)
    monkeypatch.setattr(recipe_trainer.RecipeTrainer, "train", lambda trainer, **_: made.append(trainer))
    divide = recipe_trainer.divided
    monkeypatch.setattr(recipe_trainer, "divided", lambda named: taken.append(divide(named)) or taken[-1])
    rows = [*documents(4), (list(range(5, 15)), [-100] * 10)]
    table = packed(rows, tmp_path) if layout == "packed" else unpacked(rows)
    with pytest.raises(Exception, match="logged no loss"):
        trained(replace(job(tmp_path, max_steps=1), checkpointing=checkpointing), load(), base, table, ctx)
    trainer = made[0]
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])
    pieces = taken_from(trainer, batch)
    assert len(taken[-1]) > (2 if layout == "packed" else 1)
    again = taken_from(trainer, batch)
    assert again[0] == pieces[0] and all(torch.equal(again[1][n], g) for n, g in pieces[1].items())
    monkeypatch.setattr(recipe_trainer, "divided", lambda named: [named])
    whole = taken_from(trainer, batch)
    assert pieces[0] == pytest.approx(whole[0], rel=1e-6)
    assert pieces[1].keys() == whole[1].keys()
    assert_close(pieces[1], whole[1], 1e-5)


def test_documents_that_are_predicted_from_the_one_before_stay_together():
    ids = torch.arange(1200)[None]
    positions = torch.cat([torch.arange(600), torch.arange(600)])[None]
    named = {"input_ids": ids, "labels": ids.clone(), "position_ids": positions}
    assert len(recipe_trainer.divided(named)) == 1
    named["labels"][positions == 0] = -100
    first, second = recipe_trainer.divided(named)
    assert torch.equal(torch.cat([first["input_ids"], second["input_ids"]], 1), ids)
    assert int(second["position_ids"][0, 0]) == 0


def test_random_numbers_and_large_models_are_not_divided(load, monkeypatch):
    model = load()
    assert recipe_trainer.in_pieces(model)
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    before = torch.get_rng_state()
    assert not recipe_trainer.in_pieces(model)
    assert torch.equal(before, torch.get_rng_state())
    monkeypatch.setattr(recipe_trainer, "SMALL_PARAMETERS", 1)
    assert not recipe_trainer.in_pieces(load())
