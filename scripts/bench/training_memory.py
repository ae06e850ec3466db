"""The peak of real trainings on a GPU beside what `finetune plan` predicts, and their speed beside the predicted one.

    .venv/bin/python scripts/bench/training_memory.py --model 7b --out DIR [--budget 120]
    .venv/bin/python scripts/bench/training_memory.py --model tiny --device cpu --out DIR     # does it run

One random NF4 base, one process, three steps of `finetune.train.trainer.train` with its proofs for every way to train.
Predicted is all that the allocator hands out: neither CUDA's context nor what the allocator holds and does not fill,
which are assumptions of the plan and stand in columns of their own. On a CPU the peak is the whole process's.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import throughput_parts as parts
import torch

from finetune.context import Context
from finetune.estimate import choice
from finetune.estimate import memory as estimate_memory
from finetune.estimate.shapes import shapes_of
from finetune.models import attention
from finetune.preference.align import align
from finetune.preference.reference import Objective
from finetune.recipe import Lora, Quantization, Runtime, Tracking, Train
from finetune.train import trainer as train_trainer
from finetune.train.oom import remove_adapters

STEPS = 3
REFERENCE = Lora(r=64, alpha=16, dropout=0.1, targets=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"])


@dataclass(frozen=True)
class Way:
    """`rows` at once, `batches` of them a step. `share`: the row length's part of the size's."""

    rows: int
    policy: Any
    batches: int = 1
    lora: Lora = parts.LORA
    optimizer: str = "adamw"
    share: float = 1.0
    packed: bool = True
    varlen: bool = True
    fused: bool = False
    pairs: bool = False  # DPO


WAYS = {
    "8 GB: one row, all recomputed, paged 8-bit optimiser": Way(1, "full", 2, optimizer="paged_adamw_8bit", fused=True),
    "one row, nothing recomputed": Way(1, "none", 2, fused=True),
    "2 rows, nothing recomputed": Way(2, "none", fused=True),
    "4 rows, nothing recomputed": Way(4, "none", fused=True),
    "DPO, 2 pairs, all recomputed": Way(2, "full", 2, packed=False, varlen=False, pairs=True, share=0.5),
    "DoRA, 4 rows, all but attention recomputed": Way(
        4, "selective", lora=Lora(r=16, alpha=16, dropout=0.0, dora=True)
    ),
    "one row, inputs in RAM": Way(1, "offload", 2, fused=True),
    "4 rows, 1 layer in 2 recomputed": Way(4, "every_2", 2, fused=True),
    "8 rows, all but attention recomputed": Way(8, "selective", fused=True),
    "8 rows, nothing recomputed": Way(8, "none", fused=True),
    "the reference's adapter with dropout, 4 rows": Way(4, "none", 2, REFERENCE, "paged_adamw_32bit", fused=True),
    "4 padded rows, all recomputed": Way(4, "full", 2, packed=False, varlen=False, fused=True),
    "one row, all recomputed, not fused": Way(1, "full", 2),
    "the same, 8-bit paged optimiser": Way(1, "full", 2, optimizer="paged_adamw_8bit"),
    "one row, inputs in RAM, not fused": Way(1, "offload", 2),
    "one row, nothing recomputed, not fused": Way(1, "none", 2),
    "2 rows, nothing recomputed, not fused": Way(2, "none"),
    "4 rows, 1 layer in 4 recomputed, not fused": Way(4, "every_4"),
    "4 rows, 1 layer in 2 recomputed, not fused": Way(4, "every_2", 2),
    "4 rows of half the length, all but attention recomputed, not fused": Way(4, "selective", 2, share=0.5),
    "8 rows, all but attention recomputed, not fused": Way(8, "selective"),
    "8 rows, all recomputed, not fused": Way(8, "full"),
    "8 rows, nothing recomputed, not fused": Way(8, "none"),
    "the reference's adapter with dropout, 4 rows, not fused": Way(4, "selective", 2, REFERENCE, "paged_adamw_32bit"),
    "one row under SDPA with a dense mask, not fused": Way(1, "none", 2, varlen=False),
    "4 rows of twice the length, all recomputed": Way(4, "full", share=2, fused=True),
}


class Peaks(parts.Watch):
    """The peak of the first step (what sft.train proves before it is not counted) and of the others apart."""

    first_peak = 0

    def _step(self, optimizer: torch.optim.Optimizer, *more: object) -> None:
        super()._step(optimizer, *more)
        if self.device == "cuda" and len(self.moments) == 1:
            self.first_peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()


def measure(base: Any, size: parts.Size, way: Way, asked: argparse.Namespace) -> dict[str, Any]:  # noqa: ANN401
    """Train; peak and tokens a second, found and predicted."""
    device, length = asked.device, int(size.length * way.share)
    cuda = device == "cuda"
    precision = "bf16" if cuda else "fp32"
    size = replace(size, rows=way.rows * way.batches, length=length)
    data = parts.documents(size)
    folder = asked.out / "work"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows: Any = parts.packed_table(data) if way.packed else parts.padded_table(data).slice(0, size.rows)
    table = rows
    if way.pairs:
        pq.write_table(_pairs(data, size), folder / "pairs.parquet")
        parts.save_adapter(base, folder / "adapter")
        remove_adapters(base)
    if way.packed:
        pq.write_table(table, folder / "packed.parquet")
        rows = folder / "packed.parquet"
    fused: Any = "on" if way.fused else "off"
    runtime = Runtime(micro_batch_rows=way.rows, save_steps=STEPS, fused_adapters=fused)
    train = Train(learning_rate=1e-5, warmup_fraction=0, max_steps=STEPS, batch_rows=size.rows, optimizer=way.optimizer)
    ctx = Context(scratch=folder, runtime=runtime, tracking=Tracking(), device=device)
    base.activation_checkpointing_disable()  # the way before may have recomputed
    base.set_attn_implementation(attention.VARLEN if way.varlen and cuda else "sdpa")
    longest = length if way.pairs else max(len(ids) for ids in table["input_ids"].to_pylist())
    run = estimate_memory.Training(
        way.lora, Quantization(), train, runtime, way.packed, longest, 2 if way.pairs else 1, way.pairs
    )
    shapes = shapes_of(parts.random_model.config_of(size.shape))
    assert shapes is not None
    attending = estimate_memory.Attention(varlen=way.varlen)
    planned = estimate_memory.training(shapes, run, way.rows, way.policy, attending)
    job = train_trainer.Job(
        seed=0, lora=way.lora, train=train, precision=precision, device=device, checkpointing=way.policy,
        checkpoints=folder / "checkpoints", metrics_file=folder / "metrics.jsonl", fused_adapters=way.fused,
    )  # fmt: skip
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    with Peaks(device, gradients=False) as watch:
        if way.pairs:
            objective = Objective("dpo", "sigmoid", 0.1)
            given = (folder / "pairs.parquet", folder / "adapter")
            result = align(replace(job, stage="align"), objective, base, parts.tokenizer(), *given, ctx)
        else:
            result = train_trainer.train(job, base, parts.tokenizer(), rows, ctx)
    if result.micro_batch_rows != way.rows:
        raise RuntimeError(f"the device was full: {result.micro_batch_rows} rows were taken")
    peaks = parts.memory(device)
    allocated = max(watch.first_peak, peaks["allocated_peak_bytes"])
    # a paged optimiser's states lie in memory that moves between GPU and RAM, which torch's allocator does not count
    outside = planned["optimizer"] if way.optimizer.startswith("paged") else 0
    predicted = sum(planned.values()) - planned["unused"] - planned["device"] - outside
    tokens = 2 * size.rows * length if way.pairs else sum(len(ids) for ids in table["input_ids"].to_pylist())
    rate = tokens / watch.seconds(STEPS - 1)[0]
    like = choice.DEVICES["h200"] if not cuda else gpu()
    return {
        "allocated": allocated, "predicted": predicted, "off": predicted / allocated - 1, "plan": sum(planned.values()),
        "reserved": peaks["reserved_peak_bytes"], "tokens_per_second": rate, "parts": planned,
        "predicted_tokens_per_second": choice.tokens_per_second(shapes, run, like, way.rows, way.policy, attending),
    }  # fmt: skip


def _pairs(data: parts.Data, size: parts.Size) -> Any:  # noqa: ANN401 - pyarrow.Table
    """A pair a row of `size`, each side as long as a row: half prompt, half answer."""
    import pyarrow as pa

    ids = [token for document in data.documents for token in document]
    half, sides = size.length // 2, {}
    rows = [ids[i * size.length : (i + 1) * size.length] for i in range(size.rows)]
    for name, order in (("chosen", 1), ("rejected", -1)):
        answers = [row[half:][::order] for row in rows]
        sides |= {f"{name}_ids": answers, f"{name}_mask": [[1] * len(a) for a in answers]}
    return pa.table({"prompt_ids": [row[:half] for row in rows], **sides})


def gpu() -> choice.Device:
    """The one there is, as the planner sees it."""
    name, total = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    return choice.device_like(name, total, torch.cuda.get_device_capability() >= (8, 0))


def main() -> None:
    """Every way, and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(parts.SIZES), default="7b")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no further one begins")
    parser.add_argument("--only", default="", help="ways whose name has this in it; ways that OUT has are not repeated")
    asked = parser.parse_args()
    begun = time.monotonic()
    asked.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    size = parts.SIZES[asked.model]
    if asked.device == "cuda":
        attention.register(attention.VARLEN, attention.torch_kernel())
    else:
        torch.set_num_threads(1)
    dtype = torch.bfloat16 if asked.device == "cuda" else torch.float32
    base = parts.base(size, asked.device, dtype, "sdpa")
    kept = asked.out / "training_memory.json"
    found: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    for name, way in WAYS.items():
        if (way.policy == "offload" and asked.device == "cpu") or asked.only not in name or name in found:
            continue
        if time.monotonic() - begun > asked.budget:
            print(f"no time left for: {name}", flush=True)
            continue
        try:
            found[name] = measure(base, size, way, asked)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        finally:
            remove_adapters(base)
        row = found[name]
        speed = f"{row['tokens_per_second']:,.0f} tokens/s"
        print(f"{name}: {row['allocated'] / 1e9:.2f} GB, predicted {row['off']:+.1%}, {speed}", flush=True)
        kept.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    lines = ["| what | allocated | predicted | off | reserved | the plan's total | tokens/s | predicted |"]
    lines += ["|" + "---|" * 8]
    for name, row in found.items():
        gb = (f"{row[k] / 1e9:.2f}" for k in ("allocated", "predicted", "reserved", "plan"))
        allocated, predicted, reserved, plan = gb
        rates = f"{row['tokens_per_second']:,.0f} | {row['predicted_tokens_per_second']:,.0f}"
        lines.append(f"| {name} | {allocated} | {predicted} | {row['off']:+.1%} | {reserved} | {plan} | {rates} |")
    (asked.out / "training_memory.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
