"""Tokens a second of a QLoRA training step, lever by lever, on a random NF4 base: the same documents for every way.

    .venv/bin/python scripts/bench/train_throughput.py --all --model 7b --device cuda --out DIR [--budget 400]
    .venv/bin/python scripts/bench/train_throughput.py --config H --model small --device cpu --out DIR
    .venv/bin/python scripts/bench/train_throughput.py --pairs 20 --model small --device cpu --out DIR

--all runs every configuration in a process of its own, those first that a short lease needs most; DIR/table.md has the
table, DIR/X.json the figures of one. A step is all documents once. Losses and gradients of the first step are compared
with those of an fp32 reference on the same weights: eager attention, a document at a time. --pairs measures finetune's
training beside a plain TRL script's on the same packed rows, interleaved in one process, and gives the ratio of their
step times with a 95 % bootstrap interval.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import throughput_parts as parts
import torch
from throughput_paths import Task, Way, run

PACKED = Way("packed rows, full checkpointing, SDPA with a dense mask, TRL's own loop", "trl")
VARLEN = Way("D + variable-length attention (on sm80+)", "finetune", varlen=True)
LARGE = dataclasses.replace(VARLEN, meaning="E + micro-batches of 16 k tokens", large=True)
FREE = dataclasses.replace(LARGE, meaning="F without checkpointing", checkpointing="none")
FUSED = dataclasses.replace(FREE, meaning="H + fused adapters", fused=True)
LADDER = {
    "A": Way("the Colab notebook: padded rows, SDPA, all recomputed, whole logits, norms in fp32", "notebook", False),
    "B": Way("TRL's defaults: padded rows, SDPA, checkpointing, chunked loss", "trl", False),
    "C": PACKED,
    "D": dataclasses.replace(PACKED, meaning="C by finetune: proofs, watchdog, adapters in fp32", path="finetune"),
    "E": VARLEN,
    "F": LARGE,
    "G": dataclasses.replace(LARGE, meaning="F with selective checkpointing", checkpointing="selective"),
    "H": FREE,
    "I": FUSED,
    "J": dataclasses.replace(FUSED, meaning="I + compiled layers", compile=True),
    "K": dataclasses.replace(FUSED, meaning="I + Liger's norms, SwiGLU and RoPE", liger=True),
    "M": dataclasses.replace(FREE, meaning="Unsloth under TRL's trainer", path="unsloth"),
    "O": dataclasses.replace(FUSED, meaning="J, every row of another length", compile=True, changing=True),
    "P": dataclasses.replace(FUSED, meaning="I in fp16 with the GradScaler", precision="fp16"),
    "N": dataclasses.replace(FREE, meaning="H + compiled layers (adapters not fused)", compile=True),
}
FIRST = "ABCHIJOPKNGDEFM"  # where time is short
COLUMNS = (
    "tokens_per_second", "supervised_tokens_per_second", "step_seconds_median", "step_seconds_p95",
    "before_first_step_seconds", "allocated_peak_bytes", "reserved_peak_bytes", "mfu", "grad_norm", "loss_error",
    "gradient_error",
)  # fmt: skip
PEAK_FLOPS = 989e12  # of an H100 or H200, dense bf16, by the datasheet


def task_of(asked: argparse.Namespace, way: Way, folder: Path) -> Task:
    """A way on this machine."""
    from finetune.models import attention

    size = parts.SIZES[asked.model]
    precision = (way.precision or "bf16") if asked.device == "cuda" else "fp32"
    name = "sdpa"
    if way.varlen:
        config = folder / "config"
        config.mkdir(parents=True, exist_ok=True)
        settings = parts.random_model.config_of(size.shape)
        (config / "config.json").write_text(json.dumps(settings))
        name = attention.choose(asked.device, way.packed, precision, config, lambda line: print(line, file=sys.stderr))
    return Task(way, size, parts.documents(size), asked.device, precision, asked.steps, folder, name)


def measure(asked: argparse.Namespace, letter: str) -> dict[str, Any]:
    """One configuration in this process."""
    way = LADDER[letter]
    task = task_of(asked, way, asked.out)
    base = parts.base(task.size, task.device, task.dtype, task.attention, four_bits=way.path != "unsloth")
    watch = parts.Watch(task.device)
    loss = run(task, base, watch)
    found = parts.figures(watch, task.size, task.data, asked.skip, PEAK_FLOPS if task.device == "cuda" else None)
    errors: dict[str, Any] = {"loss_error": None, "gradient_error": None, "losses": watch.losses}
    if way.changing:
        seconds, tokens = watch.seconds(asked.skip), sum(d.tokens for d in task.every_step()) / task.steps
        found["tokens_per_second"] = round(tokens * len(seconds) / sum(seconds), 1)
        found |= {"slowest_step_seconds": max(seconds), "graphs": _graphs()}
    else:
        expected = torch.load(asked.out / "reference.pt", weights_only=True)
        errors["loss_error"] = abs(loss - expected["loss"]) / expected["loss"]
        errors["gradient_error"] = parts.relative_error(watch.first, expected["gradients"])
    about = {"config": letter, "meaning": way.meaning, "attention": task.attention, "micro_batch_rows": task.micro}
    return {**about, "model": asked.model, "device": task.device, "precision": task.precision, **found, **errors}


def _graphs() -> int:
    """What was compiled, each of the first layer and of the others for some lengths or for any."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def reference(asked: argparse.Namespace) -> None:
    """The adapter that all begin with; loss and gradients in fp32, eager, a document at a time."""
    from peft import get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    from finetune.lora import config as lora_config

    task = task_of(asked, LADDER["D"], asked.out)
    base = parts.base(task.size, task.device, torch.float32, "eager")
    parts.save_adapter(base, asked.out / "adapter")
    from finetune.train.oom import remove_adapters

    remove_adapters(base)
    model = get_peft_model(base, lora_config.lora_config(parts.LORA, base))
    set_peft_model_state_dict(model, load_file(str(asked.out / "adapter" / "adapter_model.safetensors")))
    total, loss = sum(task.data.supervised), 0.0
    for number, ids in enumerate(task.data.documents):
        row, labels = (torch.tensor([x], device=task.device) for x in (ids, task.data.labels(number)))
        logits = model(input_ids=row, use_cache=False).logits[0, :-1]
        part = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum") / total
        part.backward()
        loss += part.item()
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = {i: p.grad.cpu() for i, p in enumerate(trained) if p.grad is not None}
    torch.save({"loss": loss, "gradients": gradients}, asked.out / "reference.pt")


def everything(asked: argparse.Namespace) -> None:
    """Each configuration in its own process, and the table."""
    begun = time.monotonic()
    found: dict[str, dict[str, Any]] = {}
    for letter in ["reference", *(c for c in FIRST if c in asked.only)]:
        missing = unavailable(letter, asked.device)
        if missing or time.monotonic() - begun > asked.budget:
            found[letter] = {"config": letter, "skipped": missing or "no time left"}
            continue
        if letter == "reference" and (asked.out / "reference.pt").exists():
            continue
        command = [sys.executable, __file__, "--config", letter, "--model", asked.model, "--device", asked.device]
        command += ["--out", str(asked.out), "--steps", str(asked.steps), "--skip", str(asked.skip)]
        command += ["--threads", str(asked.threads)]
        with (asked.out / f"{letter}.log").open("w") as log:
            left = max(60.0, asked.budget - (time.monotonic() - begun)) if asked.budget < float("inf") else None
            try:
                code = subprocess.run(command, stdout=log, stderr=log, timeout=left).returncode
            except subprocess.TimeoutExpired:
                code = "too long"  # type: ignore[assignment]
        result = asked.out / f"{letter}.json"
        if code:
            last = (asked.out / f"{letter}.log").read_text().strip().splitlines()[-1:]
            found[letter] = {"config": letter, "failed": f"{code}: {''.join(last)[:300]}"}
            if letter == "reference":
                raise SystemExit(f"the reference failed: {found[letter]['failed']}")
        elif result.exists():
            found[letter] = json.loads(result.read_text())
        print(letter, json.dumps(found.get(letter, "done")), flush=True)
        (asked.out / "table.md").write_text(table(found))
        (asked.out / "all.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(table(found))


def unavailable(letter: str, device: str) -> str | None:
    """Why a configuration cannot run here."""
    package = {"K": "liger_kernel", "M": "unsloth"}.get(letter)
    if package and device == "cpu":
        return "needs a GPU"
    return f"{package} is not installed" if package and importlib.util.find_spec(package) is None else None


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown, in the ladder's order."""
    lines = [f"| | what | attention | rows | {' | '.join(c.replace('_', ' ') for c in COLUMNS)} |"]
    lines.append("|" + "---|" * (len(COLUMNS) + 4))
    for letter in sorted(k for k in found if k in LADDER):
        row = found[letter]
        why = row.get("skipped") or row.get("failed")
        cells = [why, *[""] * (len(COLUMNS) - 1)] if why else [_cell(c, row[c]) for c in COLUMNS]
        about = [letter, LADDER[letter].meaning, row.get("attention", ""), str(row.get("micro_batch_rows", ""))]
        lines.append(f"| {' | '.join([*about, *map(str, cells)])} |")
    return "\n".join(lines) + "\n"


def _cell(column: str, value: float | None) -> str:
    if value is None:
        return "–"
    if column.endswith("bytes"):
        return f"{value / 1e9:.2f} GB"
    return f"{value:.1e}" if column.endswith("error") else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"


def pairs(asked: argparse.Namespace) -> dict[str, Any]:
    """Step time of finetune over a plain TRL script's, pair by pair, the order turned round every time."""
    from finetune.train.oom import remove_adapters

    ways = {"trl": Way("plain", "trl", checkpointing="none"), "finetune": Way("ours", "finetune", checkpointing="none")}
    tasks = {name: task_of(asked, way, asked.out) for name, way in ways.items()}
    task = tasks["finetune"]
    base = parts.base(task.size, task.device, task.dtype, task.attention)
    parts.save_adapter(base, asked.out / "adapter")
    ratios, seconds = [], {name: [] for name in ways}  # type: ignore[var-annotated]
    for number in range(-1, asked.pairs):  # the first pair warms up
        medians = {}
        for name in sorted(ways, reverse=bool(number % 2)):
            remove_adapters(base)
            gc.collect()
            watch = parts.Watch(task.device, gradients=False)
            run(tasks[name], base, watch)
            medians[name] = statistics.median(watch.seconds(asked.skip))
        if number >= 0:
            ratios.append(medians["finetune"] / medians["trl"])
            for name, value in medians.items():
                seconds[name].append(value)
            print(
                f"pair {number + 1}: {medians['trl']:.4f} s, {medians['finetune']:.4f} s, {ratios[-1]:.4f}", flush=True
            )
    drawn = np.median(np.random.default_rng(0).choice(ratios, (10_000, len(ratios))), axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {
        "pairs": asked.pairs, "steps_a_run": asked.steps - asked.skip, "model": asked.model, "device": asked.device,
        "trl_step_seconds": statistics.median(seconds["trl"]), "ratios": ratios,
        "finetune_step_seconds": statistics.median(seconds["finetune"]),
        "ratio_median": statistics.median(ratios), "ratio_low": float(low), "ratio_high": float(high),
    }  # fmt: skip


def main() -> None:
    """One configuration, all of them, or pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--config", choices=[*LADDER, "reference"])
    kind.add_argument("--all", action="store_true")
    kind.add_argument("--pairs", type=int)
    parser.add_argument("--model", choices=list(parts.SIZES), default="tiny")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU: a busy machine needs 1")
    parser.add_argument("--skip", type=int, default=3, help="first steps that no figure counts")
    parser.add_argument("--only", default="".join(LADDER), help="of --all: letters")
    parser.add_argument("--budget", type=float, default=float("inf"), help="of --all: seconds")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(asked.threads)
    if asked.all:
        everything(asked)
    elif asked.config == "reference":
        reference(asked)
    else:
        found = pairs(asked) if asked.pairs else measure(asked, asked.config)
        (asked.out / f"{asked.config or 'pairs'}.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        print(json.dumps(found, sort_keys=True))


if __name__ == "__main__":
    main()
