"""Every proof before step 1 fires on the failure it is there for, and is silent on a training that is right."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from finetune.errors import GateRefused
from finetune.models import loading
from finetune.recipe import Lora
from finetune.train import sanity_checks
from finetune.utils.runtime import RandomState
from tests.helpers.trainings import build_trainer, documents, job, packed, trained, unpacked

DROPOUT = Lora(r=4, dropout=0.1)


@pytest.fixture
def trainer(load, base, tmp_path):
    return build_trainer(load(), base, pq.read_table(packed(documents(), tmp_path)), tmp_path, DROPOUT)


def batch_of(trainer):
    return trainer.data_collator(
        sanity_checks.together(sanity_checks.two_documents(trainer.train_dataset), packed=True)
    )


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_training_that_is_right_is_proved_and_left_as_it_was(load, base, tmp_path, layout):
    is_packed = layout == "packed"
    rows = pq.read_table(packed(documents(), tmp_path)) if is_packed else unpacked(documents())
    trainer = build_trainer(load(), base, rows, tmp_path, DROPOUT)
    before, mode = RandomState.now(), trainer.model.training
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    sanity_checks.prove(trainer, trainer.data_collator, trainer.train_dataset, DROPOUT, "fp32", packed=is_packed)
    after = RandomState.now()
    assert torch.equal(before.cpu, after.cpu) and before.python == after.python
    assert trainer.model.training == mode
    assert all(p.grad is None for p in trainer.model.parameters())
    assert all(torch.equal(p, weights[n]) for n, p in trainer.model.named_parameters())


def test_another_loss_than_the_mean_over_the_supervised_tokens_is_refused(load, base, tmp_path):
    rows = pq.read_table(packed(documents(), tmp_path))
    trainer = build_trainer(load(), base, rows, tmp_path, DROPOUT, label_smoothing_factor=0.1)
    trainer.model.eval()
    with pytest.raises(GateRefused, match="train on other tokens"):
        sanity_checks.prove_loss(trainer, batch_of(trainer), 1e-4)


def test_a_collator_that_adds_a_mask_lets_documents_see_each_other(trainer):
    def masked(examples):
        batch = trainer.data_collator(examples)
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}

    two = sanity_checks.two_documents(trainer.train_dataset)
    trainer.model.eval()
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight.mul_(4)
    sanity_checks.prove_isolation(trainer.model, trainer.data_collator, two, 1e-3, packed=True)
    with pytest.raises(GateRefused, match="two packed documents see each other"):
        sanity_checks.prove_isolation(trainer.model, masked, two, 1e-3, packed=True)


@pytest.mark.parametrize(
    "lora",
    [
        Lora(r=4),
        Lora(r=4, targets=["q_proj", "mlp.up_proj"], rank_pattern={"q_proj": 8, "layers.0.*": 2}),
        Lora(r=4, targets=r".*\.(q|v)_proj", dora=True),
    ],
    ids=["all", "patterns", "dora"],
)
def test_what_is_trained_is_what_was_planned(load, base, tmp_path, lora):
    trainer = build_trainer(load(), base, unpacked(documents()), tmp_path, lora)
    planned = sanity_checks.planned_parameters(trainer.model, lora)
    assert planned
    sanity_checks.prove_planned(trainer.model, planned)


@pytest.mark.parametrize("other", [Lora(r=8), Lora(r=4, targets=["q_proj"]), Lora(r=4, dora=True)])
def test_other_parameters_than_the_planned_ones_are_refused(trainer, other):
    with pytest.raises(GateRefused, match="not those of the recipe's lora section"):
        sanity_checks.prove_planned(trainer.model, sanity_checks.planned_parameters(trainer.model, other))


def test_a_base_that_an_evaluation_changes_is_refused(trainer):
    norm = trainer.model.get_base_model().model.layers[0].input_layernorm

    def spoil(module, inputs):
        if not module.training:
            module.weight.data.mul_(1.5)

    sanity_checks.prove_gradients(trainer.model, batch_of(trainer), 1e-3)
    norm.register_forward_pre_hook(spoil)
    with pytest.raises(GateRefused, match="one evaluation changed the gradients"):
        sanity_checks.prove_gradients(trainer.model, batch_of(trainer), 1e-3)


def test_the_repacking_of_bitsandbytes_is_refused(load, base, tmp_path, monkeypatch):
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("only CPUs with AVX512-BF16 repack")
    monkeypatch.setattr(loading, "available_memory", lambda *_: None)  # with dequantised weights nothing is repacked
    trainer = build_trainer(load(), base, pq.read_table(packed(documents(), tmp_path)), tmp_path, DROPOUT)
    for module in trainer.model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            module.support_avx512bf16_for_cpu = True
    with pytest.raises(GateRefused, match="one evaluation changed the gradients"):
        sanity_checks.prove_gradients(trainer.model, batch_of(trainer), 1e-3)


def updated(model, batch, movement, rate, times, optimizer=None):
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    for _ in range(times):
        sanity_checks.manual_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        movement.updated(model, rate, skipped=False)


def test_adapters_in_bf16_hardly_move_and_are_refused(trainer):
    movement = sanity_checks.Movement(trainer.model)
    updated(trainer.model, batch_of(trainer), movement, 2e-5, 3)  # fp32: silent
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    movement = sanity_checks.Movement(trainer.model)
    with pytest.raises(GateRefused, match="has moved"):
        updated(trainer.model, batch_of(trainer), movement, 2e-5, 3)


def test_skipped_updates_and_those_at_rate_zero_do_not_count(trainer):
    movement = sanity_checks.Movement(trainer.model)
    for _ in range(5):
        movement.updated(trainer.model, 0.0, skipped=False)
        movement.updated(trainer.model, 1e-3, skipped=True)
    for _ in range(2):
        movement.updated(trainer.model, 1e-3, skipped=False)
    with pytest.raises(GateRefused, match="has moved"):
        movement.updated(trainer.model, 1e-3, skipped=False)


def test_a_matrix_without_a_gradient_stops_the_training_at_its_third_update(load, base, ctx, tmp_path):
    from dataclasses import replace

    model = load(None)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    values = replace(job(tmp_path, max_steps=4), lora=Lora(r=4, dropout=0, targets=["v_proj"]))
    with pytest.raises(GateRefused, match=r"only 0% of .*layers\.1\.self_attn\.v_proj"):
        trained(values, model, base, unpacked(documents()), ctx)


def test_no_row_is_no_training(load, base, ctx, tmp_path):
    empty = pa.table({n: pa.array([], pa.list_(pa.int32())) for n in ("input_ids", "labels")})
    with pytest.raises(GateRefused, match="no row is left"):
        trained(job(tmp_path), load(), base, empty, ctx)


def test_only_documents_with_something_to_learn_are_looked_at():
    rows = [
        {"input_ids": [1, 2, 3], "labels": [-100] * 3},
        {"input_ids": list(range(900)), "labels": [-100] * 800 + list(range(800, 900))},
    ]
    (found,) = sanity_checks.two_documents(rows)
    assert len(found["input_ids"]) <= sanity_checks.DOCUMENT_TOKENS
    assert any(label != -100 for label in found["labels"])
    with pytest.raises(GateRefused, match="nothing to learn"):
        sanity_checks.two_documents(rows[:1])
