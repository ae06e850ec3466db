"""Training with TRL's SFTTrainer: arguments, checks on the first batch, verified checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from finetune.context import Context
from finetune.errors import FinetuneError, GateRefused
from finetune.metrics import TrainMetrics
from finetune.train.arguments import Job, shared_arguments
from finetune.train.batch import batch_shape, longest_row, total_steps
from finetune.train.checkpoint import COMPLETE, last_checkpoint
from finetune.utils.files import write_json
from finetune.utils.upstream import use_one_gpu

if TYPE_CHECKING:
    import pyarrow as pa
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import SFTConfig, SFTTrainer

    from finetune.train.callbacks import Follower
    from finetune.train.validation import HeldOut


@dataclass(frozen=True)
class Task:
    """In what one kind of training differs from another: its trainer, its proofs before step 1, its callback."""

    build: Callable[[dict[str, Any]], Any]  # TRL's trainer, from `shared_arguments`
    prove: Callable[[Any], None]  # raises GateRefused
    follower: Callable[..., Follower]
    shows_rows: bool = True  # the recipe's tracking.wandb_rows and wandb_data


@dataclass(frozen=True)
class Result:
    """Result of a training. `loss` is the mean over the last tenth of the steps, `first_loss` over the first."""

    model: PeftModel
    sharded: dict[str, torch.Tensor] | None  # the adapter by parameter name, if FSDP had sharded it
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
    held_out: TrainMetrics = field(default_factory=lambda: TrainMetrics())  # of the held-out loss
    before: Sequence[Mapping[str, object]] = ()  # earlier, different splits of the batch


def train(
    job: Job, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Path | pa.Table, ctx: Context
) -> Result:
    """Train an adapter on `rows`: a packed file (input_ids, labels, seq_lengths) or a table (input_ids, labels).

    Raises GateRefused if the first batch or the adapters fail a check, FinetuneError if the training diverges
    (train/divergence.py) or does not fit the device, Stopped after a signal (with a checkpoint written).
    """
    from finetune.train import callbacks, oom, sanity_checks
    from finetune.train.recipe_trainer import TOKENS_AT_ONCE

    packed = isinstance(rows, Path)
    dataset = _dataset(rows)
    rows_at_once = job.micro_batch_rows or ctx.runtime.micro_batch_rows
    micro, accumulate = batch_shape(job.train.batch_rows, rows_at_once, ctx.world, packed)
    if rows_at_once == "auto" and _in_pieces(job, base):
        share, longest = micro * accumulate, longest_row(dataset.data.table)
        micro = max(n for n in range(1, share + 1) if share % n == 0 and (n == 1 or n * longest <= TOKENS_AT_ONCE))
        accumulate = share // micro
    task = Task(
        build=lambda shared: _fused(_trainer(job, base, tokenizer, dataset, _arguments(shared, packed)), job, ctx),
        prove=lambda trainer: sanity_checks.prove(
            trainer, trainer.data_collator, dataset, job.lora, job.precision, packed=packed, tokens=job.tokens
        ),
        follower=callbacks.Follower,
    )

    def attempt(micro: int) -> Result:
        return run(task, job, base, tokenizer, dataset, ctx, micro)

    return oom.halving(
        attempt, base, micro, micro * accumulate, ctx, checkpointing=job.checkpointing in ("full", "offload")
    )


def run(
    task: Task,
    job: Job,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    ctx: Context,
    micro: int,
) -> Result:
    """Train with `micro` rows a micro-batch, from the last complete checkpoint on."""
    from finetune.train import activation_checkpointing, distributed, divergence, neftune, sanity_checks, tracking
    from finetune.train.callbacks import replace_printers
    from finetune.utils import quiet

    accumulate = job.train.batch_rows // ctx.world // micro
    steps = total_steps(len(dataset), job.train)
    resume = last_checkpoint(job.checkpoints, remove_incomplete=ctx.rank == 0)
    follower = task.follower(ctx, job.metrics_file, job.checkpoints, steps, fp16=job.precision == "fp16")
    follower.documents = job.documents
    if task.shows_rows:
        follower.show_data = partial(
            tracking.show_data, ctx=ctx, dataset=dataset, tokenizer=tokenizer, documents=job.documents
        )
    with quiet.quiet():
        trainer = task.build(shared_arguments(job, ctx, micro, accumulate, steps))
        activation_checkpointing.buffer_twice(trainer)
        state = trainer.accelerator.state
        distributed.verify(state.distributed_type.value, state.num_processes, ctx.world, os.environ)
        replace_printers(trainer, follower)
        with sanity_checks.as_in_training(trainer):
            task.prove(trainer)
        trainer.data_collator = follower.recorder = divergence.Recorder(trainer.data_collator)
        shape = {"batch_rows": job.train.batch_rows, "micro_batch_rows": micro, "processes": ctx.world}
        follower.made_by = {**shape, "device": _device_name(job.device), "fused_adapters": job.fused_adapters}
        if resume:
            changes = distributed.changes(resume / COMPLETE, follower.made_by)
            ctx.say(f"{job.stage}: goes on from {resume.name} of {steps} steps{changes}")
            until = int(resume.name.rpartition("-")[2])
            follower.made_by["before"] = distributed.before(resume / COMPLETE, follower.made_by, until)
        follower.resumed_from = int(resume.name.rpartition("-")[2]) if resume else 0
        held_out = follower.held_out = _held_out(job, trainer, ctx, steps, resume)
        ctx.say(
            f"{job.stage}: {steps} steps of {job.train.batch_rows} rows "
            f"({micro} a micro-batch x {accumulate} x {ctx.world} process{'es' if ctx.world > 1 else ''})"
        )
        try:
            if resume and (follower.resumed_from >= steps or (held_out and held_out.seen.stopped)):
                _take_over(trainer, follower, resume)
            else:
                # a signal waits for the end of the step, because a checkpoint must be saved
                noise = neftune.noise(base, job.train.neftune_alpha)
                with ctx.stop.at_checks_only(), distributed.explained(ctx.world), noise:
                    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        finally:
            follower.close()
    ctx.stop.check()
    ctx.stop.require_own()
    result = _result(trainer, follower, micro, job.device)
    distributed.part()
    return result


def _trainer(
    job: Job,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    arguments: SFTConfig,
) -> SFTTrainer:
    """Return the trainer on `base` with the recipe's adapter, new or continued from an earlier one."""
    from finetune.lora import config as lora_config
    from finetune.lora import fused_linear as fused_adapters
    from finetune.lora import resume as lora_resume
    from finetune.train.recipe_trainer import RecipeTrainer, agreed, keeps_logits, score_supervised

    longest = longest_row(dataset.data.table)
    own_logits = keeps_logits(base, arguments.per_device_train_batch_size * longest)
    pieces = own_logits and _in_pieces(job, base)
    adapter = lora_config.lora_config(job.lora, base, job.tokens)
    if job.fused_adapters:
        fused_adapters.use(adapter)
    trainer = RecipeTrainer(
        model=base,
        args=arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    trainer.lora_plus_ratio = job.train.lora_plus_ratio
    if agreed(trainer.accelerator, own_logits):
        score_supervised(base, pieces)
    recast_adapters(cast("torch.nn.Module", trainer.model))
    lora_config.restore_saved(cast("torch.nn.Module", trainer.model))
    if job.start is not None:
        lora_resume.load(cast("PeftModel", trainer.model), job.start)
    return trainer


def _fused(trainer: SFTTrainer, job: Job, ctx: Context) -> SFTTrainer:
    """Fuse layers that receive the same tensor, if adapters are fused, without dropout, and nothing is sharded."""
    from finetune.lora import shared_inputs

    shared_out = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if job.fused_adapters and not job.lora.dropout and not shared_out:
        _, why = shared_inputs.share_inputs(trainer.model, trainer.accelerator.autocast())
        if why is not None:
            ctx.say(f"{job.stage}: layers that read the same tensor are not fused: {why}")
    return trainer


def _in_pieces(job: Job, base: PreTrainedModel) -> bool:
    """Return whether a micro-batch is computed by several threads (`recipe_trainer.in_pieces`).

    Noise would be drawn in no fixed order. Layers of a fused group keep results for each other, and compiled ones are
    compiled in their first call: these are for one thread.
    """
    from finetune.models.compile import is_compiled
    from finetune.train.recipe_trainer import TOKENS_AT_ONCE, in_pieces, keeps_logits

    if job.train.neftune_alpha or job.lora.dropout or job.fused_adapters or is_compiled(base):
        return False
    return in_pieces(base) and keeps_logits(base, TOKENS_AT_ONCE)


def _held_out(job: Job, trainer: SFTTrainer, ctx: Context, steps: int, resume: Path | None) -> HeldOut | None:
    """Return the evaluator of the held-out loss, with the state of checkpoint `resume`; None if it is off."""
    from finetune.train.validation import HeldOut

    if job.train.eval_steps is None:
        return None
    if not job.held_out:
        raise GateRefused(
            "train.eval_steps: all held-out rows are truncated; raise render.max_length_tokens or remove this field"
        )
    autocast = trainer.accelerator.autocast
    held_out = HeldOut(job.held_out, job.train, steps, autocast, ctx.rank, ctx.world)
    if resume:
        held_out.resume(resume)
    return held_out


def _take_over(trainer: SFTTrainer, follower: Follower, checkpoint: Path) -> None:
    """Load the last step's checkpoint as the result. `Trainer` would train one more step: it checks `max_steps` only at
    the end of a step.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import TrainerControl, TrainerState

    set_peft_model_state_dict(trainer.model, load_file(str(checkpoint / "adapter_model.safetensors")))
    recast_adapters(cast("torch.nn.Module", trainer.model))
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    follower.on_train_begin(trainer.args, trainer.state, TrainerControl())


def _device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def recast_adapters(model: torch.nn.Module) -> int:
    """Make every trainable parameter fp32 again; returns how many were not.

    TRL casts the adapters of a quantised model to bf16 (sft_trainer.py, "When using QLoRA"): at a learning rate of
    2e-5 half of their elements then never move, and under fp16 the GradScaler refuses them. A test fails when TRL
    no longer does so.
    """
    import torch

    count = 0
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
            count += 1
    return count


def save_adapter(
    model: PeftModel, folder: Path, base_id: str, revision: str | None, sharded: dict[str, torch.Tensor] | None = None
) -> None:
    """Write the adapter: fp32 safetensors, and a config that names the pinned base and is the same bytes every time."""
    model.save_pretrained(
        str(folder),
        safe_serialization=True,
        state_dict=sharded,
        selected_adapters=["default"],
        save_embedding_layers=False,
    )
    (folder / "README.md").unlink(missing_ok=True)  # peft's template of a card; ours is made from measurements
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_id
    config["revision"] = revision
    config["inference_mode"] = True
    if isinstance(config.get("target_modules"), list):
        config["target_modules"] = sorted(config["target_modules"])  # a set in peft, whose order varies between runs
    write_json(path, config)


def _dataset(rows: Path | pa.Table) -> Dataset:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    from finetune.train.divergence import ROW

    table = pq.read_table(rows) if isinstance(rows, Path) else rows
    if not len(table):
        raise GateRefused("no row is left to train on: check the rows dropped by filter, dedup, sample and render")
    return datasets.Dataset(table.append_column(ROW, pa.array(range(len(table)))))


def _arguments(shared: dict[str, Any], packed: bool) -> SFTConfig:
    from trl import SFTConfig

    return use_one_gpu(
        SFTConfig(
            **shared,
            packing=packed,
            packing_strategy="bfd",
            dataset_kwargs={"skip_prepare_dataset": True},  # the rows are rendered, packed and proved already
        )
    )


def _result(trainer: SFTTrainer, follower: Follower, micro: int, device: str) -> Result:
    from finetune.train import distributed

    history = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    tenth = max(1, len(history) // 10)
    sharded = distributed.whole_adapter(cast("torch.nn.Module", trainer.model))
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    held_out: HeldOut | None = follower.held_out
    best = held_out.put_back(model) if held_out else None
    trainable = sum(int(p.numel()) for p in model.parameters() if p.requires_grad)
    if not history:
        raise FinetuneError("training logged no loss: no step was run")
    return Result(
        model=model,
        sharded=best if best is not None and sharded is not None else sharded,
        loss=sum(history[-tenth:]) / tenth,
        first_loss=sum(history[:tenth]) / tenth,
        steps=int(trainer.state.global_step),
        epochs=round(float(trainer.state.epoch or 0), 4),
        tokens=follower.tokens,
        tokens_per_second=follower.tokens_per_second(),
        peak_memory_bytes=follower.peak_memory(device),
        trainable_parameters=trainable,
        device_name=_device_name(device),
        micro_batch_rows=micro,
        resumed_from=follower.resumed_from,
        held_out=held_out.figures() if held_out else {},
        before=cast("Sequence[Mapping[str, object]]", follower.made_by.get("before", ())),
    )
