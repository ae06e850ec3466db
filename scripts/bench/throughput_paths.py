"""The ways to train that train_throughput.py compares: transformers' trainer, TRL's, finetune's, Unsloth's."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import throughput_parts as parts
import torch

from finetune.context import Context
from finetune.recipe import Runtime, Tracking, Train

PADDED_MICRO = 4
NO_CLIPPING = 1e9  # gradients are compared as they are


@dataclass(frozen=True)
class Way:
    """One configuration: whose loop, and what is on."""

    meaning: str
    path: str  # notebook, trl, finetune, unsloth
    packed: bool = True
    checkpointing: str = "full"
    varlen: bool = False
    large: bool = False  # micro-batches of 16,384 tokens instead of one row, where attention allows
    compile: bool = False
    liger: bool = False
    fused: bool = False  # adapters
    precision: str = ""  # on a GPU; else bf16
    changing: bool = False  # every row of another length, other ones in every step


@dataclass(frozen=True)
class Task:
    """What one process trains: a way on a size, `steps` long. `folder` has the adapter to begin with."""

    way: Way
    size: parts.Size
    data: parts.Data
    device: str
    precision: str
    steps: int
    folder: Path
    attention: str

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[self.precision]

    def every_step(self) -> list[parts.Data]:
        """The documents of each step, where they change; else those of all."""
        if not self.way.changing:
            return [self.data]
        return [parts.documents(self.size, seed, changing=True) for seed in range(self.steps)]

    @property
    def micro(self) -> int:
        """Rows of a micro-batch."""
        if not self.way.packed:
            return PADDED_MICRO
        from finetune.models.attention import is_varlen

        most = max(1, 16384 // self.size.length) if self.way.large and is_varlen(self.attention) else 1
        return max(n for n in range(1, most + 1) if self.size.rows % n == 0)


def run(task: Task, base: Any, watch: parts.Watch) -> float:  # noqa: ANN401 - PreTrainedModel
    """Train; the first step's loss."""
    return {"notebook": notebook, "trl": trl, "finetune": ours, "unsloth": unsloth}[task.way.path](task, base, watch)


def notebook(task: Task, base: Any, watch: parts.Watch) -> float:  # noqa: ANN401
    """The Colab notebook's training: norms and embeddings in fp32, padded rows, whole logits, all recomputed."""
    from datasets import Dataset
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from finetune.lora import config as lora_config

    prepared = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": True})
    model = get_peft_model(prepared, lora_config.lora_config(parts.LORA, base))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**_arguments(task, PADDED_MICRO, len(task.data.documents))),
        train_dataset=Dataset(parts.padded_table(task.data)),
        data_collator=DataCollatorForSeq2Seq(parts.tokenizer(), label_pad_token_id=-100),
    )
    return _train(trainer, task, watch)


def trl(task: Task, base: Any, watch: parts.Watch) -> float:  # noqa: ANN401
    """A plain TRL script on rows that are tokenised, and packed where the way says so."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from finetune.lora import config as lora_config

    rows = task.size.rows if task.way.packed else len(task.data.documents)
    table = (parts.packed_table if task.way.packed else parts.padded_table)(task.data)
    settings = SFTConfig(
        **_arguments(task, task.micro, rows),
        max_length=None,
        packing=task.way.packed,
        dataset_kwargs={"skip_prepare_dataset": True},
        activation_checkpointing=task.way.checkpointing == "full",
    )
    trainer = SFTTrainer(
        model=base,
        args=settings,
        train_dataset=Dataset(table),
        processing_class=parts.tokenizer(),
        peft_config=lora_config.lora_config(parts.LORA, base),
    )
    return _train(trainer, task, watch)


def _arguments(task: Task, micro: int, rows: int) -> dict[str, Any]:
    return {
        "output_dir": str(task.folder / "out"),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": rows // micro,
        "max_steps": task.steps,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "max_grad_norm": NO_CLIPPING,
        "optim": "adamw_torch",
        "bf16": task.precision == "bf16",
        "use_cpu": task.device == "cpu",
        "logging_first_step": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _train(trainer: Any, task: Task, watch: parts.Watch) -> float:  # noqa: ANN401
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(trainer.model, load_file(str(task.folder / "adapter" / "adapter_model.safetensors")))
    with watch:
        trainer.train()
    return float(next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))


def ours(task: Task, base: Any, watch: parts.Watch) -> float:  # noqa: ANN401
    """`finetune.train.trainer.train` with its proofs, callbacks, watchdog; the checkpoint at its end is not counted."""
    import pyarrow.parquet as pq

    from finetune.models import compile as models_compile
    from finetune.train import trainer as train_trainer

    folder = task.folder / "ours"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pq.write_table(parts.packed_table(parts.whole(task.every_step())), folder / "packed.parquet")
    runtime = Runtime(micro_batch_rows=task.micro, save_steps=task.steps)
    ctx = Context(scratch=folder, runtime=runtime, tracking=Tracking(), device=task.device)
    if task.way.liger:
        _liger(base)
    if task.way.compile:
        models_compile.compile_layers(base, print, "inductor" if task.device == "cuda" else "aot_eager")
    job = train_trainer.Job(
        seed=0,
        lora=parts.LORA,
        train=Train(
            learning_rate=1e-5,
            schedule="constant",
            warmup_fraction=0,
            max_steps=task.steps,
            batch_rows=task.size.rows,
            optimizer="adamw",
            max_grad_norm=NO_CLIPPING,
        ),
        precision=task.precision,
        device=task.device,
        checkpointing=task.way.checkpointing,
        checkpoints=folder / "checkpoints",
        metrics_file=folder / "metrics.jsonl",
        start=task.folder / "adapter",
        fused_adapters=task.way.fused,
    )
    with watch:
        result = train_trainer.train(job, base, parts.tokenizer(), folder / "packed.parquet", ctx)
    if result.micro_batch_rows != task.micro:
        raise RuntimeError(f"the device was full: {result.micro_batch_rows} rows were taken")
    with (folder / "metrics.jsonl").open() as lines:
        watch.losses = [float(entry["loss"]) for line in lines if "loss" in (entry := json.loads(line))]
    return watch.losses[0]


def _liger(base: Any) -> None:  # noqa: ANN401
    """Liger's norms, SwiGLU and rotary embedding on `base`; the loss stays TRL's."""
    from liger_kernel.transformers import apply_liger_kernel_to_mistral

    apply_liger_kernel_to_mistral(
        rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False, model=base
    )


def unsloth(task: Task, base: Any, watch: parts.Watch) -> float:  # noqa: ANN401
    """Unsloth's model under TRL's trainer on the same packed rows; `base`, in bf16, is saved for it to read."""
    from unsloth import FastLanguageModel  # isort: skip - first: it changes what it finds
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    folder = task.folder / "unsloth_base"
    base.save_pretrained(folder)
    parts.tokenizer().save_pretrained(folder)
    del base
    torch.cuda.empty_cache()
    model, words = FastLanguageModel.from_pretrained(str(folder), max_seq_length=task.size.length, load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(
        model, r=parts.LORA.r, lora_alpha=16, lora_dropout=0, use_gradient_checkpointing=False
    )
    settings = SFTConfig(
        **_arguments(task, task.size.rows, task.size.rows), max_length=None, packing=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=settings, train_dataset=Dataset(parts.packed_table(task.data)), processing_class=words
    )
    return _train(trainer, task, watch)
