"""Coordination of the processes of one training: devices, stopping, gathering the adapter."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import FinetuneError, GateRefused, InputError

if TYPE_CHECKING:
    import torch

ASKED = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DEEPSPEED"}


def check_devices(device: str, world: int, environment: Mapping[str, str]) -> None:
    """Raise InputError if this machine has fewer GPUs than processes: two on one would share its memory."""
    import torch

    local = int(environment.get("LOCAL_WORLD_SIZE", str(world)))
    if world == 1 or device == "cpu" or not torch.cuda.is_available() or torch.cuda.device_count() >= local:
        return
    raise InputError(
        f"{local} processes were started on a machine with {torch.cuda.device_count()} GPUs; start one per GPU"
    )


def asked(environment: Mapping[str, str]) -> str | None:
    """Return the distribution that the launcher was configured for, if it is not DDP."""
    return next((name for variable, name in ASKED.items() if environment.get(variable, "").lower() == "true"), None)


def verify(kind: str, processes: int, world: int, environment: Mapping[str, str]) -> None:
    """Refuse a training that is not distributed as configured; accelerate ignores some settings on a CPU.

    `kind` and `processes` are accelerate's result (`distributed_type`, `num_processes`).
    """
    wanted = asked(environment)
    if processes != world:
        raise GateRefused(f"{world} processes were started, and accelerate trains in {processes} that know each other")
    if wanted is not None and kind != wanted:
        raise GateRefused(
            f"{wanted} was requested, but accelerate uses {kind}: it ignores {wanted} without a GPU or in one process. "
            "Use recipes/accelerate/ddp.yaml or multi_cpu.yaml"
        )
    if (world > 1) != (kind != "NO"):
        raise GateRefused(f"{world} processes were started, but accelerate's distributed_type is {kind}")


def highest(value: int, device: torch.device) -> int:
    """Return the highest `value` of any rank; every rank must call this at the same point."""
    import torch
    import torch.distributed

    shared = torch.tensor(value, device=device)
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    return int(shared.item())


def whole_adapter(model: torch.nn.Module) -> dict[str, torch.Tensor] | None:
    """Return the trainable parameters by name, gathered on the CPU, if FSDP has sharded them; else None.

    Every rank must call this. The frozen base is not gathered: it is on disk.
    """
    from torch.distributed.tensor import DTensor

    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    if not any(isinstance(p, DTensor) for p in trained.values()):
        return None
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).cpu() for n, p in trained.items()}


def part() -> None:
    """Destroy the process group after all ranks have arrived: the following stages run in one process."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


@contextmanager
def explained(world: int) -> Iterator[None]:
    """Raise FinetuneError for an error caused by the exit of another process (gloo raises RuntimeError)."""
    import torch.distributed

    try:
        yield
    except RuntimeError as error:
        if world == 1 or not (isinstance(error, torch.distributed.DistError) or "gloo/" in str(error)):
            raise
        raise FinetuneError(
            "train: another process of this training has exited; run the same command to resume from a checkpoint"
        ) from error


def before(marker: Path, now: Mapping[str, object], step: int) -> list[dict[str, object]]:
    """Return earlier splits of the batch up to `step`, if the checkpoint's marker differs from `now`; oldest first."""
    try:
        was: dict[str, Any] = json.loads(marker.read_text(encoding="utf-8"))
    except ValueError:
        return []
    earlier: list[dict[str, object]] = was.pop("before", [])
    same = all(now.get(name) == value for name, value in was.items())  # an older marker may have fewer fields
    return earlier if same else [*earlier, {**was, "until_step": step}]


def changes(marker: Path, now: Mapping[str, object]) -> str:
    """Return a message on changes of the batch's split since a checkpoint's marker; empty if there are none."""
    try:
        was = json.loads(marker.read_text(encoding="utf-8"))
    except ValueError:
        return ""  # a marker of an earlier version is empty
    differences = [
        f"{name} was {was[name]}, is {now[name]}" for name in sorted(now) if was.get(name, now[name]) != now[name]
    ]
    return f"; {', '.join(differences)}: the batch stays {now['batch_rows']} rows" if differences else ""
