"""Precision of a training on a CPU: a short trial, made once a training and kept with its checkpoints."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from finetune.errors import FinetuneError
from finetune.models.device import Precision, has_bf16, pick_precision
from finetune.utils.files import canonical_json, read_json, replace_bytes
from finetune.utils.runtime import SMALL_PARAMETERS, single_thread

if TYPE_CHECKING:
    from finetune.context import Context

FILE = "precision.json"
WORTH = 2.0  # times as fast as fp32, in the layers' products alone: casts take a part of it back
ROUNDS, TOKENS, SECONDS, WIDEST = 7, 512, 2.0, 8192  # most rounds, unless two took longer; widest layer tried
PATIENCE = 600.0  # seconds that other processes wait for the first one's trial


def decide(
    precision: Literal["auto", "bf16", "fp16", "fp32"], device: str, base: Path, checkpoints: Path, ctx: Context
) -> tuple[Precision, str]:
    """Return the precision to train in, and a phrase that says why; `auto` on a CPU is decided by a trial.

    The first process makes it before the first step and writes it to `checkpoints`; other processes and a resumed
    training read it there, so it never changes within a training. Small bases (under SMALL_PARAMETERS) and CPUs without
    bf16 instructions stay in fp32 without one. Raises InputError as `pick_precision` does, FinetuneError if the first
    process writes nothing.
    """
    if precision != "auto" or device != "cpu":
        return pick_precision(precision, device)
    file = checkpoints / FILE
    if ctx.rank:
        _wait(file, ctx)
    elif (recorded := _read(file)) is not None:
        chosen, why = recorded
        slow = (
            "" if chosen != "bf16" or has_bf16() else "; WARNING: this CPU has no bf16 instructions and is far slower"
        )
        return chosen, f"as this training began ({why}){slow}"
    else:
        chosen, why = _try(base, started=any(checkpoints.glob("checkpoint-*")))
        checkpoints.mkdir(parents=True, exist_ok=True)
        replace_bytes(file, canonical_json({"precision": chosen, "why": why}).encode())
        return chosen, why
    return _read(file) or ("fp32", "the first process wrote nothing that can be read")


def _read(file: Path) -> tuple[Precision, str] | None:
    """Return the recorded precision and reason; None if nothing readable is there."""
    try:
        recorded = read_json(file)
        return recorded["precision"], recorded["why"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _try(base: Path, *, started: bool) -> tuple[Precision, str]:
    if started:
        return "fp32", "this training was begun by a version without a trial, or on a GPU"
    if read_json(base / "base.json")["parameters"] < SMALL_PARAMETERS:
        return "fp32", "exact, and the base is too small to gain from bf16"
    if not has_bf16():
        return "fp32", "this CPU has no bf16 instructions"
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config") or config
    hidden = int(config.get("hidden_size") or config.get("n_embd") or 1024)
    width = config.get("intermediate_size") or 4 * hidden
    width = max(width) if isinstance(width, list) else int(width)  # Gemma 3n lists it for each layer
    ratio = measure(min(hidden, WIDEST // 4), min(width, WIDEST))
    if ratio >= WORTH:
        return "bf16", f"{ratio:.1f} times as fast as fp32 in a trial on this CPU"
    return "fp32", f"bf16 was {ratio:.1f} times as fast in a trial on this CPU; {WORTH} is needed"


def measure(hidden: int, intermediate: int) -> float:
    """Return how many times as fast as in fp32 a linear layer's forward and backward are under bf16 autocast.

    Frozen weight (intermediate, hidden), inputs (TOKENS, hidden) that need a gradient. Processor time of one thread, so
    that other work on the machine does not decide; the best of ROUNDS each, in turn.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, hidden, generator=generator).requires_grad_()
    weight = torch.randn(intermediate, hidden, generator=generator)
    narrow = weight.bfloat16()

    def step(weight: torch.Tensor, *, bf16: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = torch.nn.functional.linear(x, weight)
        torch.autograd.backward(out.float().sum())

    best = {False: float("inf"), True: float("inf")}
    begun = time.thread_time()
    with single_thread():
        for done in range(ROUNDS):
            if done > 1 and time.thread_time() - begun > SECONDS:
                break
            for bf16 in best:
                started = time.thread_time()
                step(narrow if bf16 else weight, bf16=bf16)
                best[bf16] = min(best[bf16], time.thread_time() - started)
    return best[False] / max(best[True], 1e-9)


def _wait(file: Path, ctx: Context) -> None:
    until = time.monotonic() + PATIENCE
    while not file.exists():
        ctx.stop.check()
        if time.monotonic() > until:
            raise FinetuneError(f"the first process of this training has not written {FILE} in {PATIENCE:.0f} s")
        time.sleep(0.05)
