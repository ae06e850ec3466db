"""What the processes of one training must agree on: who they are, when to stop, and the whole adapter at the end."""

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
    """Raise InputError where this machine has fewer GPUs than processes: two on one would share its memory."""
    import torch

    local = int(environment.get("LOCAL_WORLD_SIZE", str(world)))
    if world == 1 or device == "cpu" or not torch.cuda.is_available() or torch.cuda.device_count() >= local:
        return
    raise InputError(
        f"{local} processes were started on a machine with {torch.cuda.device_count()} GPUs; start one a GPU"
    )


def asked(environment: Mapping[str, str]) -> str | None:
    """What the launcher was told to distribute by, where that is not DDP."""
    return next((name for variable, name in ASKED.items() if environment.get(variable, "").lower() == "true"), None)


def verify(kind: str, processes: int, world: int, environment: Mapping[str, str]) -> None:
    """Refuse a training that is not distributed as its launcher was told; accelerate ignores some settings on a CPU.

    `kind` and `processes` are what accelerate made of them (`distributed_type`, `num_processes`).
    """
    wanted = asked(environment)
    if processes != world:
        raise GateRefused(f"{world} processes were started, and accelerate trains in {processes} that know each other")
    if wanted is not None and kind != wanted:
        raise GateRefused(
            f"{wanted} was asked for and accelerate took {kind}: it ignores {wanted} without a GPU, or in one process. "
            "Use recipes/accelerate/ddp.yaml or multi_cpu.yaml"
        )
    if (world > 1) != (kind != "NO"):
        raise GateRefused(f"{world} processes were started and accelerate's distributed_type is {kind}")


def highest(value: int, device: torch.device) -> int:
    """The highest `value` of any rank; every rank must call this at the same point."""
    import torch
    import torch.distributed

    shared = torch.tensor(value, device=device)
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    return int(shared.item())


def whole_adapter(model: torch.nn.Module) -> dict[str, torch.Tensor] | None:
    """The trainable parameters by name, gathered on the CPU, where FSDP has shared them out; None where nobody did.

    Every rank must call this. The frozen base is not gathered: it is on disk already.
    """
    from torch.distributed.tensor import DTensor

    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    if not any(isinstance(p, DTensor) for p in trained.values()):
        return None
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).cpu() for n, p in trained.items()}


def part() -> None:
    """End what the ranks have together, once the last of them is here: the stages that follow are one process's."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


@contextmanager
def explained(world: int) -> Iterator[None]:
    """Raise FinetuneError for an error that means only that another process is gone (gloo raises RuntimeError)."""
    import torch.distributed

    try:
        yield
    except RuntimeError as error:
        if world == 1 or not (isinstance(error, torch.distributed.DistError) or "gloo/" in str(error)):
            raise
        raise FinetuneError(
            "train: another process of this training is gone; the same command goes on from the last checkpoint"
        ) from error


def before(marker: Path, now: Mapping[str, object], step: int) -> list[dict[str, object]]:
    """How the batch was shared out until `step`, where the marker of that checkpoint says otherwise; earliest first."""
    try:
        was: dict[str, Any] = json.loads(marker.read_text(encoding="utf-8"))
    except ValueError:
        return []
    earlier: list[dict[str, object]] = was.pop("before", [])
    same = all(now.get(name) == value for name, value in was.items())  # an older marker may say less
    return earlier if same else [*earlier, {**was, "until_step": step}]


def changes(marker: Path, now: Mapping[str, object]) -> str:
    """How the batch is shared out and computed `now`, where a checkpoint's marker says otherwise; else empty."""
    try:
        was = json.loads(marker.read_text(encoding="utf-8"))
    except ValueError:
        return ""  # a marker of an earlier version says nothing
    found = [f"{name} was {was[name]}, is {now[name]}" for name in sorted(now) if was.get(name, now[name]) != now[name]]
    return f"; {', '.join(found)}: the batch stays {now['batch_rows']} rows" if found else ""
