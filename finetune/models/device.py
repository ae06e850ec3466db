"""Which device and which precision a run computes in."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finetune.errors import InputError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

Precision = Literal["bf16", "fp16", "fp32"]
DTYPES: dict[Precision, str] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def machine_notes() -> list[str]:
    """Return notes for Apple and AMD machines, one sentence each; none elsewhere. Imports no torch."""
    notes = []
    if sys.platform == "darwin" and platform.machine() == "arm64":
        notes.append(
            "Apple: everything runs on the CPU, in fp32; MPS is not used, because bitsandbytes' 4-bit training and "
            "fp16 without a gradient scaler were not proved on it"
        )
    if Path("/dev/kfd").exists():  # the driver's device of an AMD GPU
        notes.append(
            "AMD: a ROCm build of torch is used like CUDA, with bitsandbytes' ROCm wheel; variable-length attention "
            "and the predicted speeds were not proved on it, and a kernel that fails its trial is replaced by SDPA"
        )
    return notes


def pick_device(ctx_device: str) -> str:
    """`cpu` or `cuda` for the context's device (`auto` takes the GPU if there is one). Raises InputError."""
    import torch

    if ctx_device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if ctx_device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(
            f"device {ctx_device!r} was asked for, but torch {torch.__version__} sees no GPU; use cpu or auto"
        )
    return ctx_device


def pick_precision(precision: Literal["auto", "bf16", "fp16", "fp32"], device: str) -> tuple[Precision, str]:
    """The precision to compute in, and a sentence with the reason. Raises InputError for fp16 on a CPU."""
    import torch

    if device == "cpu":
        if precision == "fp16":
            raise InputError("precision fp16 needs a GPU; on a CPU use auto, fp32 or bf16")
        if precision == "auto":
            return "fp32", "a CPU computes exactly in fp32, and few are faster in bf16"
        return precision, "the recipe asks for it"
    major, minor = torch.cuda.get_device_capability(gpu_index(device))
    name = f"{torch.cuda.get_device_name(gpu_index(device))} (sm{major}{minor})"
    if precision == "auto":
        if major >= 8:
            return "bf16", f"{name} multiplies bf16 in its tensor cores"
        return "fp16", f"{name} has no bf16 tensor cores"
    slow = "" if precision != "bf16" or major >= 8 else f", though {name} has to emulate bf16, which is slow"
    return precision, f"the recipe asks for it{slow}"


def has_bf16() -> bool:
    """Return whether the CPU has bf16 instructions. Without them torch emulates it, up to 34 times slower than fp32."""
    import torch

    abilities = torch.cpu.get_capabilities()
    return bool(abilities.get("avx512_bf16") or abilities.get("amx_bf16"))


def gpu_index(device: str) -> int:
    """The number of the GPU this process uses: the launcher's LOCAL_RANK, unless the device names one."""
    return int(device.split(":")[1]) if ":" in device else int(os.environ.get("LOCAL_RANK", "0"))


def as_trained(model: PeftModel, stored: Mapping[str, torch.Tensor], *, autocast_forward: bool = True) -> None:
    """Give what was trained whole its own values, from `stored` (the adapter's tensors, by key), in fp32, and run every
    forward of `model` under the autocast of training. A base in fp32 had none, and a trainer has its own.
    """
    base: Any = model.get_base_model()  # Any: mypy has no method that can be assigned
    dtype = base.dtype
    widen_saved(model)
    for key, parameter in _saved(model):
        parameter.data.copy_(stored[key])
    if dtype.itemsize < 4 and autocast_forward:
        base.forward = autocast(base.device.type, dtype)(base.forward)  # the base's own, which `generate` calls too


def widen_saved(model: torch.nn.Module) -> None:
    """Make fp32 what in `model` was trained whole, on whatever device it is (meta too)."""
    for _, parameter in _saved(model):
        parameter.data = parameter.data.float()


def autocast(device: str, dtype: torch.dtype | None) -> torch.autocast:
    """Return training's autocast context for a 16-bit dtype; a null context for None."""
    import torch

    kind = torch.device(device).type
    return torch.autocast(kind, dtype) if dtype else torch.autocast(kind, enabled=False)


def _saved(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """(key in the adapter's file, parameter) of what was trained whole, in a model that peft has wrapped."""
    from peft.utils import ModulesToSaveWrapper

    wrappers = [(n, m) for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    return [(f"{n}.{leaf}", p) for n, w in wrappers for leaf, p in w.modules_to_save["default"].named_parameters()]
