"""Training through TRL's SFTTrainer: settings, proofs on the first batch, checkpoints that can be trusted."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from finetune.context import Context
from finetune.errors import FinetuneError, GateRefused, InputError
from finetune.recipe import Lora, Train
from finetune.records import write_json

if TYPE_CHECKING:
    import pyarrow as pa
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import SFTConfig, SFTTrainer

COMPLETE = "COMPLETE"
OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw_32bit": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


@dataclass(frozen=True)
class Job:
    """One training, as far as the recipe and the device decide it."""

    seed: int
    lora: Lora
    train: Train
    precision: str  # fp32, bf16 or fp16
    device: str
    checkpointing: bool
    checkpoints: Path
    metrics_file: Path


@dataclass(frozen=True)
class Result:
    """What came of it. `loss` is the mean over the last tenth of the steps, `first_loss` over the first."""

    model: PeftModel
    loss: float
    first_loss: float
    steps: int
    epochs: float
    tokens: int
    tokens_per_second: float
    peak_memory_bytes: int
    trainable_parameters: int
    device_name: str
    micro_batch_rows: int
    resumed_from: int


def train(
    job: Job, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Path | pa.Table, ctx: Context
) -> Result:
    """Train an adapter on `rows`: a packed file (input_ids, labels, seq_lengths) or a table (input_ids, labels).

    Raises GateRefused when the first batch or the adapters are not what they must be, FinetuneError when the loss
    stops being a number, Stopped after a signal (with a checkpoint written).
    """
    from trl import SFTTrainer

    from finetune.backends import trainer_callbacks, trainer_output

    packed = isinstance(rows, Path)
    dataset = _dataset(rows)
    micro, accumulate = batch_shape(job.train.batch_rows, ctx.runtime.micro_batch_rows, ctx.world, packed)
    steps = total_steps(len(dataset), job.train)
    resume = last_checkpoint(job.checkpoints, remove_incomplete=ctx.rank == 0)
    arguments = _arguments(job, ctx, packed, micro, accumulate, steps)
    follower = trainer_callbacks.Follower(ctx, job.metrics_file, job.checkpoints, steps, fp16=job.precision == "fp16")
    with trainer_output.quiet():
        trainer = SFTTrainer(
            model=base,
            args=arguments,
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=lora_config(job.lora),
        )
        model = cast("torch.nn.Module", trainer.model)
        recast_adapters(model)
        trainer_callbacks.replace_printers(trainer, follower)
        prove_adapters(model)
        first = dataset[0]
        check_batch(trainer.data_collator([first]), first.get("seq_lengths"), packed)
        if resume:
            ctx.say(f"train: goes on from {resume.name} of {steps} steps")
        follower.resumed_from = int(resume.name.rpartition("-")[2]) if resume else 0
        ctx.say(
            f"train: {steps} steps of {job.train.batch_rows} rows "
            f"({micro} a micro-batch x {accumulate} x {ctx.world} process{'es' if ctx.world > 1 else ''})"
        )
        try:
            if resume and follower.resumed_from >= steps:
                _take_over(trainer, follower, resume)
            else:
                trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        finally:
            follower.close()
    ctx.stop.check()
    return _result(trainer, follower, micro, job.device)


def _take_over(trainer: SFTTrainer, follower: Any, checkpoint: Path) -> None:  # noqa: ANN401 - Follower
    """The last step's checkpoint is the result. `Trainer` would take one step more: it looks at `max_steps` only at
    the end of a step.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import TrainerControl, TrainerState

    set_peft_model_state_dict(trainer.model, load_file(str(checkpoint / "adapter_model.safetensors")))
    recast_adapters(cast("torch.nn.Module", trainer.model))
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    follower.on_train_begin(trainer.args, trainer.state, TrainerControl())


def check_targets(lora: Lora, base: Path, trust_remote_code: bool) -> None:
    """Refuse a target or pattern that names no linear module of the base: peft drops it without a word.

    `base` is a folder with config.json; no weights are read. Raises InputError with the nearest name.
    """
    import difflib
    import re

    from torch import nn

    from finetune.backends.streamed_forward import empty_model

    model = empty_model(base, trust_remote_code=trust_remote_code)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    last = sorted({n.rpartition(".")[2] for n in names})
    for target in lora.targets if isinstance(lora.targets, list) else []:
        if not any(n == target or n.endswith(f".{target}") for n in names):
            near = difflib.get_close_matches(target, last, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"lora.targets: no linear module named {target!r}{hint} (there is {', '.join(last)})")
    if isinstance(lora.targets, str) and lora.targets != "all-linear":
        if not any(re.fullmatch(lora.targets, n) for n in names):
            raise InputError(
                f"lora.targets: the expression {lora.targets!r} matches no linear module, such as {names[0]}"
            )
    for field, patterns in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        for pattern in patterns:
            if not any(re.fullmatch(rf"(.*\.)?({pattern})", n) for n in names):
                raise InputError(f"lora.{field}: {pattern!r} matches no linear module (there is {', '.join(last)})")


def batch_shape(batch_rows: int, micro: int | str, world: int, packed: bool) -> tuple[int, int]:
    """Micro-batch rows and accumulation steps, so that every optimiser step sees `batch_rows` rows on any machine.

    Raises InputError naming the process counts that would divide the batch.
    """
    if batch_rows % world:
        fits = [n for n in range(1, batch_rows + 1) if batch_rows % n == 0]
        raise InputError(
            f"train.batch_rows {batch_rows} cannot be shared by {world} processes; use {', '.join(map(str, fits))} "
            f"processes, or a batch_rows that {world} divides"
        )
    per_process = batch_rows // world
    if micro == "auto":
        # Packed rows are flattened into one sequence; under SDPA that is a dense (B·L)² mask, so one row at a time.
        most = 1 if packed else 4
        micro = max(n for n in range(1, most + 1) if per_process % n == 0)
    micro = int(micro)
    if per_process % micro:
        raise InputError(f"runtime.micro_batch_rows {micro} does not divide the {per_process} rows of each process")
    return micro, per_process // micro


def total_steps(rows: int, train: Train) -> int:
    """Optimiser steps: the last, smaller batch of an epoch counts."""
    if train.max_steps is not None:
        return train.max_steps
    return max(1, math.ceil(train.epochs * math.ceil(rows / train.batch_rows)))


def last_checkpoint(folder: Path, *, remove_incomplete: bool) -> Path | None:
    """The newest checkpoint that carries the COMPLETE marker; one without it was cut off while being written."""
    found: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*"):
        number = path.name.rpartition("-")[2]
        if number.isdigit() and (path / COMPLETE).exists():
            found[int(number)] = path
        elif remove_incomplete:
            shutil.rmtree(path, ignore_errors=True)
    return found[max(found)] if found else None


def lora_config(lora: Lora) -> LoraConfig:
    """The recipe's adapter in peft's words."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora.r,
        lora_alpha=cast("int", int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha),
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        # peft takes the first pattern that matches and sorts them when it saves: sorted here, training agrees
        rank_pattern=dict(sorted(lora.rank_pattern.items())),
        alpha_pattern=dict(sorted(lora.alpha_pattern.items())),
        bias="none",
        task_type="CAUSAL_LM",
    )


def recast_adapters(model: torch.nn.Module) -> int:
    """Make every trainable parameter fp32 again; returns how many were not.

    TRL casts the adapters of a quantised model to bf16 (sft_trainer.py, "When using QLoRA"): at a learning rate of
    2e-5 half of their elements then never move, and under fp16 the GradScaler refuses them. A test tells when TRL
    stops doing so.
    """
    import torch

    count = 0
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
            count += 1
    return count


def save_adapter(model: PeftModel, folder: Path, base_id: str, revision: str | None) -> None:
    """Write the adapter: fp32 safetensors, and a config that names the pinned base and is the same bytes every time."""
    model.save_pretrained(str(folder), safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)  # peft's template of a card; ours is made from measurements
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_id
    config["revision"] = revision
    config["inference_mode"] = True
    if isinstance(config.get("target_modules"), list):
        config["target_modules"] = sorted(config["target_modules"])  # a set in peft: its order changes between runs
    write_json(path, config)


def mark_complete(folder: Path) -> None:
    """Sync every file of a checkpoint, then write its marker."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    with (folder / COMPLETE).open("w") as file:
        file.write("all ranks have written and synced this checkpoint\n")
        file.flush()
        os.fsync(file.fileno())


def _dataset(rows: Path | pa.Table) -> Any:  # noqa: ANN401 - datasets.Dataset, imported late
    import datasets
    import pyarrow.parquet as pq

    return datasets.Dataset(pq.read_table(rows) if isinstance(rows, Path) else rows)


def _arguments(job: Job, ctx: Context, packed: bool, micro: int, accumulate: int, steps: int) -> SFTConfig:
    from trl import SFTConfig

    checkpoint = job.checkpointing
    arguments = SFTConfig(
        output_dir=str(job.checkpoints),
        seed=job.seed,
        data_seed=job.seed,
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulate,
        learning_rate=job.train.learning_rate,
        lr_scheduler_type=SCHEDULES[job.train.schedule],
        warmup_steps=math.ceil(job.train.warmup_fraction * steps),
        optim=OPTIMIZERS[job.train.optimizer],
        weight_decay=job.train.weight_decay,
        max_grad_norm=job.train.max_grad_norm,
        adam_beta2=job.train.adam_beta2,
        bf16=job.precision == "bf16",
        fp16=job.precision == "fp16",
        use_cpu=job.device == "cpu",
        activation_checkpointing=checkpoint,
        activation_checkpointing_kwargs={"use_reentrant": False} if checkpoint else None,
        packing=packed,
        packing_strategy="bfd",
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},  # the rows are rendered, packed and proved already
        save_strategy="steps",
        save_steps=max(1, min(ctx.runtime.save_steps, steps)),
        save_total_limit=ctx.runtime.keep_checkpoints,
        logging_strategy="steps",
        logging_steps=1,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a NaN loss logged as 0.0 hides the moment a run died (trl#6668)
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=job.device == "cuda",
        ddp_find_unused_parameters=False,
    )
    # Without a launcher Trainer takes every visible GPU for itself: twice the rows a step, and the loss scaled for it.
    # The recipe's batch is the recipe's; several GPUs are used through `accelerate launch` (GPUS=N).
    _ = arguments.n_gpu  # sets _n_gpu
    arguments._n_gpu = min(arguments._n_gpu, 1)
    return arguments


def prove_adapters(model: torch.nn.Module) -> None:
    """Refuse a model that would train anything but LoRA parameters in fp32, or nothing."""
    import torch

    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    wrong = [n for n, p in trainable.items() if p.dtype != torch.float32]
    if wrong:
        raise GateRefused(f"{len(wrong)} trainable parameters are not fp32 ({wrong[0]} is {trainable[wrong[0]].dtype})")
    other = [n for n in trainable if "lora_" not in n]
    if other or not trainable:
        raise GateRefused(f"only LoRA parameters should train, found {other[0] if other else 'none'}")


def check_batch(batch: dict[str, torch.Tensor], lengths: list[int] | None, packed: bool) -> None:
    """Refuse a batch whose documents could see each other, or that trains nothing.

    `batch` holds input_ids, labels (1, T) int64, and position_ids when packed; `lengths` are the documents' lengths.
    """
    import torch

    if not bool((batch["labels"] != -100).any()):
        raise GateRefused("the first batch has no supervised token: its labels are all -100")
    supervised = batch["labels"] != -100
    if not torch.equal(batch["labels"][supervised], batch["input_ids"][supervised]):
        raise GateRefused("the labels of the first batch are not its own tokens")
    if not packed:
        return
    if "attention_mask" in batch:
        raise GateRefused("the packed batch carries a dense attention mask: its documents would see each other")
    expected = torch.cat([torch.arange(n) for n in lengths or []])
    if "position_ids" not in batch or not torch.equal(batch["position_ids"][0], expected):
        raise GateRefused(
            "the positions of the packed batch do not restart at each document: they would see each other"
        )


def _result(trainer: SFTTrainer, follower: Any, micro: int, device: str) -> Result:  # noqa: ANN401 - Follower
    import torch

    history = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    tenth = max(1, len(history) // 10)
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    trainable = sum(int(p.numel()) for p in model.parameters() if p.requires_grad)
    if not history:
        raise FinetuneError("training logged no loss: no step was taken")
    return Result(
        model=model,
        loss=sum(history[-tenth:]) / tenth,
        first_loss=sum(history[:tenth]) / tenth,
        steps=int(trainer.state.global_step),
        epochs=round(float(trainer.state.epoch or 0), 4),
        tokens=follower.tokens,
        tokens_per_second=follower.tokens_per_second(),
        peak_memory_bytes=follower.peak_memory(device),
        trainable_parameters=trainable,
        device_name=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        micro_batch_rows=micro,
        resumed_from=follower.resumed_from,
    )
