"""Tokens a second of the default recipe's training on a CPU, by how torch's threads are set; the ratio to one thread.

    .venv/bin/python scripts/bench/cpu_threads.py [--steps 20] [--rounds 3] [--busy 0]

Needs a finished `make sft`. One process a measurement, arms interleaved; `--busy N` keeps N other processes busy.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ARMS = {
    "one thread": {"THREADS": "1"},
    "torch's own": {},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
}


def measure(artifacts: Path, steps: int) -> float:
    """Train for `steps` steps in this process; tokens a second."""
    import torch

    from finetune.context import Context
    from finetune.models import loading
    from finetune.pipeline import runner
    from finetune.pipeline.store import Store
    from finetune.recipe.load import load_recipe
    from finetune.train import trainer as train_trainer

    recipe = load_recipe("tiny-pydoc", [f"train.max_steps={steps}"]).recipe
    store = Store(artifacts, artifacts.parent / "scratch")
    found = {s.stage.name: s.folder for s in runner.plan(recipe, store) if s.manifest and s.folder}
    if threads := os.environ.get("THREADS"):
        torch.set_num_threads(int(threads))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        ctx = Context(scratch=store.scratch, runtime=recipe.runtime, tracking=recipe.tracking, device="cpu")
        base = loading.load_base(recipe.model, found["base"], ctx, recipe.quantization, "fp32", "cpu")
        job = train_trainer.Job(
            seed=0, lora=recipe.lora, train=recipe.train, precision="fp32", device="cpu",
            checkpointing="none", checkpoints=out / "checkpoints", metrics_file=out / "metrics.jsonl",
        )  # fmt: skip
        rows = found["pack"] / "packed.parquet"
        return train_trainer.train(job, base, loading.load_tokenizer(found["base"]), rows, ctx).tokens_per_second


def _spin() -> None:
    while True:
        pass


def main() -> None:
    """Measure every arm and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--busy", type=int, default=0)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(measure(options.artifacts.absolute(), options.steps)))
        return
    others = [multiprocessing.Process(target=_spin, daemon=True) for _ in range(options.busy)]
    for other in others:
        other.start()
    found: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for _ in range(options.rounds):
        for arm, settings in ARMS.items():
            command = [
                sys.executable,
                __file__,
                "--arm",
                arm,
                "--artifacts",
                str(options.artifacts),
                "--steps",
                str(options.steps),
            ]
            done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=True)
            found[arm].append(float(done.stdout.splitlines()[-1]))
    for other in others:
        other.terminate()
    one = statistics.median(found["one thread"])
    for arm, rates in found.items():
        middle = statistics.median(rates)
        print(f"{arm:<26} {middle:8,.0f} tokens/s  {middle / one:5.2f} x  ({min(rates):,.0f} – {max(rates):,.0f})")


if __name__ == "__main__":
    main()
