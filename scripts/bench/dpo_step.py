"""Step time of our preference training beside plain TRL's DPOTrainer, on the same pairs, adapter and NF4 base.

Both trainers are alive in one process, each with its own base, and take steps in turn (interleaved), so that a busy
machine slows both. Ours has the weighting over the step, the recorder of rows and the callback of `finetune run`; plain
TRL has its own collator and no callback. Prints the ratio of medians, and the 95 % interval of the median of the paired
ratios (bootstrap).

    python scripts/bench/dpo_step.py [--steps 24] [--hidden 256] [--layers 4] [--tokens 128]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    """Build both trainers, take one step of each to warm up, then `--steps` of each in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("steps", 24), ("hidden", 256), ("layers", 4), ("tokens", 128), ("pairs", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ours, plain = build(asked, Path(folder))
        times: dict[str, list[float]] = {"ours": [], "plain": []}
        for step in range(asked.steps + 1):
            for name, take in (("ours", ours), ("plain", plain)) if step % 2 else (("plain", plain), ("ours", ours)):
                started = time.perf_counter()
                take()
                if step:
                    times[name].append(time.perf_counter() - started)
    report(times)


def build(asked: argparse.Namespace, folder: Path) -> tuple[Any, Any]:
    """Two functions that each take one optimiser step."""
    import bitsandbytes  # noqa: F401 - before torch counts threads
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MistralConfig, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=4096, hidden_size=asked.hidden, intermediate_size=2 * asked.hidden, num_hidden_layers=asked.layers,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=2048,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    vocabulary = {f"t{i}": i for i in range(4096)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "t0")), pad_token="t0", eos_token="t2"
    )
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)

    def base() -> Any:  # noqa: ANN401
        found = AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=nf4, dtype=torch.float32)
        loading._keep_weights_unpacked(found)  # or bitsandbytes repacks them on some CPUs, and gradients are wrong
        return found

    from finetune.models import loading
    from tests.helpers.preferences import start_adapter, write_pairs

    adapter = start_adapter(base(), folder / "adapter", target_modules="all-linear")
    pairs = write_pairs(folder / "pairs" / "train.parquet", rows(asked))
    return our_step(asked, base(), tokenizer, pairs, adapter, folder), plain_step(
        asked, base(), tokenizer, pairs, adapter, folder
    )


def rows(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Random pairs of `--tokens` tokens, half of them the prompt; masks of ones, as TRL's own."""
    rng = np.random.default_rng(0)
    half = asked.tokens // 2
    found = []
    for i in range(8 * asked.pairs):
        prompt, chosen, rejected = (rng.integers(5, 4096, half).tolist() for _ in range(3))
        ones = [1] * half
        found.append(
            {"pair_id": str(i), "source": "random", "prompt_ids": prompt, "chosen_ids": chosen,
             "rejected_ids": rejected, "chosen_mask": ones, "rejected_mask": ones}
        )  # fmt: skip
    return found


def settings(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What both are given."""
    return {
        "output_dir": str(folder), "per_device_train_batch_size": asked.pairs, "max_steps": 10_000, "max_length": None,
        "learning_rate": 1e-5, "optim": "adamw_torch", "activation_checkpointing": False, "report_to": "none",
        "disable_tqdm": True, "logging_steps": 1, "remove_unused_columns": False, "bf16": False, "use_cpu": True,
        "save_strategy": "no", "lr_scheduler_type": "constant",
    }  # fmt: skip


class Stepper:
    """Runs `trainer.train()` in a thread of its own and lets it take one step at a time."""

    def __init__(self, trainer: Any) -> None:  # noqa: ANN401
        import threading

        from transformers import TrainerCallback

        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        outer = self

        class Gate(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
                outer.go.acquire()

            def on_log(self, *_: Any, **__: Any) -> None:  # noqa: ANN401 - the last thing that a step does
                outer.done.release()

        trainer.add_callback(Gate())
        threading.Thread(target=trainer.train, daemon=True).start()

    def __call__(self) -> None:
        """Take one step and wait for its end."""
        self.go.release()
        self.done.acquire()


def our_step(asked: argparse.Namespace, base: Any, tokenizer: Any, pairs: Path, adapter: Path, folder: Path) -> Stepper:  # noqa: ANN401
    """The trainer of finetune.preference, with its proofs done and its callback in place."""
    import datasets

    from finetune.context import Context
    from finetune.preference import align, batches
    from finetune.preference.follower import AlignFollower
    from finetune.preference.reference import Objective
    from finetune.recipe import Runtime, Tracking
    from finetune.train import divergence
    from finetune.train.callbacks import replace_printers

    objective = Objective("dpo", "sigmoid", 0.1)
    dataset = datasets.Dataset(batches.read_pairs(pairs, "dpo", asked.pairs, 0))
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
    asked: argparse.Namespace,
    base: Any,  # noqa: ANN401
    tokenizer: Any,  # noqa: ANN401
    pairs: Path,
    adapter: Path,
    folder: Path,
) -> Stepper:
    """TRL's DPOTrainer as it comes, but that the rows are tokenised already."""
    import datasets
    import pyarrow.parquet as pq
    from peft import PeftModel
    from transformers.trainer_callback import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:  # noqa: ANN401
            return dataset

    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    dataset = datasets.Dataset(pq.read_table(pairs, columns=columns))
    arguments = DPOConfig(**settings(asked, folder / "plain"), beta=0.1)
    trainer = Tokenised(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    return Stepper(trainer)


def report(times: dict[str, list[float]]) -> None:
    """Medians, their ratio and the interval of the paired ratio."""
    ours, plain = (np.array(times[name]) for name in ("ours", "plain"))
    ratios = ours / plain
    rng = np.random.default_rng(0)
    drawn = np.median(ratios[rng.integers(0, len(ratios), (4000, len(ratios)))], axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"n = {len(ratios)}: ours {medians['ours']:.3f} s, plain TRL {medians['plain']:.3f} s a step")
    print(f"paired ratio {np.median(ratios):.3f} (95 % {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
