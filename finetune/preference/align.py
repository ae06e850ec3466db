"""Align an adapter by DPO or KTO: the loop, checkpoints and watchdogs are those of train/, the loss is TRL's."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig, KTOConfig

from finetune.context import Context
from finetune.errors import GateRefused
from finetune.models import loading
from finetune.models.compile import is_compiled
from finetune.preference import batches, reference
from finetune.preference.follower import AlignFollower
from finetune.preference.records import SIDES
from finetune.preference.reference import Objective, expected_loss
from finetune.preference.trainers import JudgedTrainer, PairTrainer
from finetune.train import oom, recipe_trainer, sanity_checks
from finetune.train.arguments import Job
from finetune.train.trainer import Result, Task, run
from finetune.utils.upstream import use_one_gpu

PROVED_PAIRS = 4  # of the first batch, before step 1


def align(
    job: Job,
    objective: Objective,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Path,
    adapter: Path,
    ctx: Context,
) -> Result:
    """Train the adapter in `adapter` on the rendered pairs in the Parquet file `pairs`; the reference is that adapter.

    `job.train.batch_rows` counts pairs (for kto answers). The result's model holds the adapters `default` (trained) and
    `ref` (the start). Raises GateRefused if the reference is not the start adapter or the first batch has other tokens
    or labels than the pairs, and what `finetune.train.trainer.train` raises.
    """
    dataset = Dataset(batches.read_pairs(pairs, objective.method, job.train.batch_rows, job.seed))
    asked = job.micro_batch_rows or ctx.runtime.micro_batch_rows
    micro, accumulate = batches.batch_of(job.train.batch_rows, asked, ctx.world, objective.method, objective.loss)
    start: dict[str, torch.Tensor] = {}

    def build(shared: dict[str, Any]) -> PairTrainer | JudgedTrainer:
        start.clear()
        return _trainer(objective, base, tokenizer, dataset, adapter, shared, start)

    task = Task(
        build=build,
        prove=lambda trainer: prove(trainer, objective, dataset, start, job.precision),
        follower=partial(AlignFollower, objective=objective, start=start),
        shows_rows=False,
    )

    def attempt(micro: int) -> Result:
        return run(task, job, base, tokenizer, dataset, ctx, micro)

    return oom.halving(
        attempt,
        base,
        micro,
        micro * accumulate,
        ctx,
        checkpointing=job.checkpointing in ("full", "offload"),
        least=batches.least(micro, objective.method, objective.loss),
    )


def _trainer(
    objective: Objective,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    adapter: Path,
    shared: Mapping[str, Any],
    start: dict[str, torch.Tensor],
) -> PairTrainer | JudgedTrainer:
    """The trainer on `base` with the adapter in it; `start` is filled with the values it begins from."""
    rows = int(shared["per_device_train_batch_size"]) * len(SIDES[objective.method])
    own_logits = recipe_trainer.keeps_logits(base, rows * batches.longest(dataset.data.table, objective.method))
    pieces = own_logits and not is_compiled(base) and recipe_trainer.in_pieces(base)
    model: PeftModel = loading.attach_adapter(base, adapter, trainable=True)
    config: Any = model.peft_config["default"]
    start |= reference.start_values(cast("torch.nn.Module", model))
    pad_id = int(cast("int", tokenizer.pad_token_id))
    dpo = objective.method == "dpo"
    collate = batches.collate_pairs if dpo else batches.collate_judged
    kind: Any = PairTrainer if dpo else JudgedTrainer
    trainer = kind(
        model=model,
        args=use_one_gpu(_arguments(objective, shared)),
        train_dataset=dataset,
        processing_class=tokenizer,
        data_collator=partial(collate, pad_id=pad_id),
    )
    if recipe_trainer.agreed(trainer.accelerator, own_logits):
        recipe_trainer.score_supervised(base, pieces and not config.lora_dropout)
    reference.restore(trainer.model, start)
    return trainer


def _arguments(objective: Objective, shared: Mapping[str, Any]) -> DPOConfig | KTOConfig:
    if objective.method == "kto":
        return KTOConfig(
            **shared,
            loss_type=objective.loss,
            beta=objective.beta,
            desirable_weight=objective.desirable_weight,
            undesirable_weight=objective.undesirable_weight,
        )
    return DPOConfig(
        **shared, loss_type=[objective.loss], beta=objective.beta, label_smoothing=objective.label_smoothing
    )


def prove(
    trainer: PairTrainer | JudgedTrainer,
    objective: Objective,
    dataset: Dataset,
    start: Mapping[str, torch.Tensor],
    precision: str,
) -> None:
    """Run the checks that precede step 1, on the first pairs. Raises GateRefused.

    Policy and reference are bitwise the start adapter; the collated tokens and labels are the rendered pairs'; both
    adapters give them bitwise equal log-probabilities, so that every margin is exactly 0; TRL's loss is what equal
    policies give (ln 2 for sigmoid); gradients are the same after an evaluation (train/sanity_checks.py).
    """
    model = cast("PeftModel", trainer.model)
    sanity_checks.prove_adapters(model)
    reference.require_start(model, start, resumed=False)
    count = min(PROVED_PAIRS, int(trainer.args.per_device_train_batch_size), len(dataset))
    rows = [dataset[i] for i in range(count)]
    collated = trainer.data_collator(rows)
    reference.check_labels(collated, rows, SIDES[objective.method])
    with sanity_checks.undisturbed(model), trainer.accelerator.autocast():
        batch = sanity_checks.on_device(collated, trainer.accelerator.device)
        model.eval()
        with torch.no_grad():
            policy = reference.log_probabilities(model, batch)
            with reference.as_reference(model):
                frozen = reference.log_probabilities(model, batch)
            if not torch.equal(policy, frozen):
                raise GateRefused(
                    "align: before the first step policy and reference differ on the first pairs by "
                    f"{float((policy - frozen).abs().max()):.3g} nats: every margin must be 0"
                )
            loss = float(trainer.compute_loss(model, dict(batch)))
        expected = expected_loss(objective, batch)
        reference.require_loss(loss, expected, "of the first pairs")
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        both = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
        tolerance = sanity_checks.TOLERANCES[precision].gradient
        sanity_checks.prove_gradients(model, both, tolerance, scale=1024.0 if precision == "fp16" else 1.0)
    reference.require_start(model, start, resumed=False)
