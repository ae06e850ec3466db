"""Settings of a training, translated from the recipe to TRL's configurations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.context import Context
from finetune.recipe import Lora, Train
from finetune.tokenization.token_rows import TokenRow

if TYPE_CHECKING:
    from finetune.models.new_tokens import NewTokens

    pass

OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw_32bit": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}
SCHEDULES = {
    "constant": "constant_with_warmup",
    "linear": "linear",
    "cosine": "cosine",
    "wsd": "warmup_stable_decay",
}
DECAY_FRACTION = 0.1


@dataclass(frozen=True)
class Job:
    """One training, as far as the recipe and the device decide it."""

    seed: int
    lora: Lora
    train: Train
    precision: str  # fp32, bf16 or fp16
    device: str
    checkpointing: str  # as runtime.checkpointing, not auto
    checkpoints: Path
    metrics_file: Path
    documents: Path | None = None  # Parquet with `row_ids` or `id`, a row for each of the data set's
    held_out: Sequence[TokenRow] = ()  # measured every train.eval_steps
    start: Path | None = None  # a folder with the adapter to go on from
    micro_batch_rows: int | None = None  # what auto has come to
    fused_adapters: bool = False  # lora/fused_linear.py
    stage: str = "train"  # prefix of its messages
    tokens: NewTokens | None = None  # that were added to the base


def shared_arguments(job: Job, ctx: Context, micro: int, accumulate: int, steps: int) -> dict[str, Any]:
    """Return the arguments of TRL's configuration that every kind of training shares."""
    from finetune.train import activation_checkpointing as checkpointing

    recompute, settings = checkpointing.settings(job.checkpointing, job.device)
    return {
        "output_dir": str(job.checkpoints),
        "seed": job.seed,
        "data_seed": job.seed,
        "max_steps": steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulate,
        "learning_rate": job.train.learning_rate,
        "lr_scheduler_type": SCHEDULES[job.train.schedule],
        "lr_scheduler_kwargs": _decay(job.train, steps),
        "warmup_steps": math.ceil(job.train.warmup_fraction * steps),
        "optim": OPTIMIZERS[job.train.optimizer],
        "weight_decay": job.train.weight_decay,
        "max_grad_norm": job.train.max_grad_norm,
        "adam_beta2": job.train.adam_beta2,
        "bf16": job.precision == "bf16",
        "fp16": job.precision == "fp16",
        "use_cpu": job.device == "cpu",
        "activation_checkpointing": recompute,
        "activation_checkpointing_kwargs": settings,
        "activation_offloading": job.checkpointing == "offload",
        "max_length": None,
        "remove_unused_columns": False,  # the collator takes the rows' numbers off
        "save_strategy": "steps",
        "save_steps": max(1, min(ctx.runtime.save_steps, steps)),
        "save_total_limit": ctx.runtime.keep_checkpoints,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # a NaN loss logged as 0.0 hides the moment a run died (trl#6668)
        "disable_tqdm": True,
        "report_to": "none",
        "dataloader_pin_memory": job.device == "cuda",
        "ddp_find_unused_parameters": False,
        "router_aux_loss_coef": 0.0,  # routers and experts are frozen: their balance is not ours to train
    }


def _decay(train: Train, steps: int) -> dict[str, Any] | None:
    if train.schedule != "wsd":
        return None
    return {"num_decay_steps": math.ceil((train.decay_fraction or DECAY_FRACTION) * steps), "decay_type": "linear"}
