"""Step time of our preference training beside plain TRL's DPOTrainer, on the same pairs, adapter and NF4 base.

Both trainers are alive in one process, each with its own base, and take steps in turn (interleaved), so that a busy
machine slows both; the order within a pair of steps alternates. Ours has the weighting over the step, the recorder of
rows and the callback of `finetune run`; plain TRL has its own collator and no callback. TRL rounds its adapter to bf16,
which is slow on a CPU: it is cast back to fp32, so that both compute the same. Prints, for wall and CPU time, the
median of the paired ratios with its 95 % interval (bootstrap).

    finetune run tiny-preference --until pairs
    PYTHONPATH=. python scripts/bench/dpo_step.py artifacts/base/KEY artifacts/pairs/KEY/train.parquet [--steps 24]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

Times = dict[str, list[tuple[float, float]]]  # wall and CPU seconds of each step


def main() -> None:
    """Build both trainers, take one step of each to warm up, then `--steps` of each in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="folder of a stage base, or of a model in 16 or 32 bits")
    parser.add_argument("pairs", type=Path, help="train.parquet of a stage pairs (dpo)")
    for name, default in (("steps", 24), ("micro", 2), ("accumulate", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        steppers = dict(zip(("ours", "plain"), build(asked, Path(folder)), strict=True))
        times: Times = {"ours": [], "plain": []}
        for step in range(asked.steps + 1):
            for name in ("ours", "plain") if step % 2 else ("plain", "ours"):
                started, used = time.perf_counter(), time.process_time()
                steppers[name]()
                if step:
                    times[name].append((time.perf_counter() - started, time.process_time() - used))
        for stepper in steppers.values():
            stepper.stop()
    report(times)


def build(asked: argparse.Namespace, folder: Path) -> tuple[Stepper, Stepper]:
    """Ours and plain TRL's."""
    import bitsandbytes  # noqa: F401 - before torch counts threads
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from finetune.models import loading
    from tests.helpers.preferences import start_adapter

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)

    def base() -> PreTrainedModel:
        found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            asked.base, quantization_config=nf4, dtype=torch.float32
        )
        loading._keep_weights_unpacked(found)  # or bitsandbytes repacks them on some CPUs, and gradients are wrong
        return found

    tokenizer = loading.load_tokenizer(asked.base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    adapter = start_adapter(base(), folder / "adapter", size=0.001, r=16, lora_alpha=32, target_modules="all-linear")
    given = (asked, base(), tokenizer, adapter, folder)
    return our_step(*given), plain_step(asked, base(), tokenizer, adapter, folder)


def settings(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What both are given."""
    return {
        "output_dir": str(folder), "per_device_train_batch_size": asked.micro, "max_steps": 10_000, "max_length": None,
        "gradient_accumulation_steps": asked.accumulate, "learning_rate": 1e-5, "optim": "adamw_torch",
        "activation_checkpointing": False, "report_to": "none", "disable_tqdm": True, "logging_steps": 1,
        "remove_unused_columns": False, "bf16": False, "use_cpu": True, "save_strategy": "no",
        "lr_scheduler_type": "constant",
    }  # fmt: skip


class Stepper:
    """Runs `trainer.train()` in a thread of its own and lets it take one step at a time."""

    def __init__(self, trainer: Trainer) -> None:
        from transformers import TrainerCallback

        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.failure: BaseException | None = None
        self.over = False
        outer = self

        class Gate(TrainerCallback):
            def on_step_begin(self, *_: object, **__: object) -> None:
                outer.go.acquire()
                if outer.over:
                    raise SystemExit

            def on_log(self, *_: object, **__: object) -> None:  # the last thing that a step does
                outer.done.release()

        def train() -> None:
            try:
                trainer.train()
            except BaseException as error:
                self.failure = error
                self.done.release()

        trainer.add_callback(Gate())
        self.thread = threading.Thread(target=train, daemon=True)
        self.thread.start()

    def __call__(self) -> None:
        """Take one step and wait for its end. Raises what the training raised."""
        self.go.release()
        self.done.acquire()
        if self.failure is not None:
            raise self.failure

    def stop(self) -> None:
        """End the training."""
        self.over = True
        self.go.release()
        self.thread.join()


def our_step(
    asked: argparse.Namespace, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, adapter: Path, folder: Path
) -> Stepper:
    """The trainer of finetune.preference, with its proofs done and its callback in place."""
    import datasets

    from finetune.context import Context
    from finetune.preference import align, batches
    from finetune.preference.follower import AlignFollower
    from finetune.preference.reference import Objective
    from finetune.recipe import Runtime, Tracking
    from finetune.train import divergence
    from finetune.train.callbacks import replace_printers

    objective = Objective(method="dpo", loss="sigmoid", beta=0.1)
    dataset = datasets.Dataset(batches.read_pairs(asked.pairs, "dpo", asked.micro * asked.accumulate, 0))
    start: dict[str, Any] = {}
    trainer = align._trainer(objective, base, tokenizer, dataset, adapter, settings(asked, folder / "ours"), start)
    align.prove(trainer, objective, dataset, start, "fp32")
    ctx = Context(scratch=folder, runtime=Runtime(), tracking=Tracking(), device="cpu")
    (folder / "ours").mkdir(exist_ok=True)
    metrics = folder / "ours" / "metrics.jsonl"
    follower = AlignFollower(ctx, metrics, folder / "ours", 10_000, fp16=False, objective=objective, start=start)
    replace_printers(trainer, follower)
    trainer.data_collator = follower.recorder = divergence.Recorder(trainer.data_collator)
    return Stepper(trainer)


def plain_step(
    asked: argparse.Namespace, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, adapter: Path, folder: Path
) -> Stepper:
    """TRL's DPOTrainer as it comes, but that the rows are tokenised already and the adapters are in fp32."""
    import datasets
    import pyarrow.parquet as pq
    from peft import PeftModel
    from transformers.trainer_callback import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset: datasets.Dataset, *_: object) -> datasets.Dataset:
            return dataset

    model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    dataset = datasets.Dataset(pq.read_table(asked.pairs, columns=["prompt_ids", "chosen_ids", "rejected_ids"]))
    arguments = DPOConfig(**settings(asked, folder / "plain"), beta=0.1)
    trainer = Tokenised(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    trainer.remove_callback(PrinterCallback)
    return Stepper(trainer)


def report(times: Times) -> None:
    """Medians, their paired ratio and its interval, by wall and by CPU time."""
    rng = np.random.default_rng(0)
    for kind, name in enumerate(("wall", "CPU")):
        ours, plain = (np.array([step[kind] for step in times[who]]) for who in ("ours", "plain"))
        ratios = ours / plain
        drawn = np.median(ratios[rng.integers(0, len(ratios), (4000, len(ratios)))], axis=1)
        low, high = np.quantile(drawn, [0.025, 0.975])
        medians = f"ours {statistics.median(ours):.3f} s, plain TRL {statistics.median(plain):.3f} s a step"
        print(f"{name}, n = {len(ratios)}: {medians}; ratio {np.median(ratios):.3f} (95 % {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
