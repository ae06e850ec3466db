"""A trained adapter computes in the precision that it was trained in.

Training keeps what it trains in fp32 and runs under autocast to the base's 16 bits. peft loads a module that was
trained whole in the base's own dtype instead, which rounds embeddings and norms that training saw unrounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


def as_trained(model: PeftModel, stored: Mapping[str, torch.Tensor]) -> None:
    """Give what was trained whole its own values, from `stored` (the adapter's tensors, by key), in fp32, and run every
    forward of `model` under the autocast of training. A base in fp32 had none.
    """
    base: Any = model.get_base_model()  # Any: mypy has no method that can be assigned
    dtype = base.dtype
    widen_saved(model)
    for key, parameter in _saved(model):
        parameter.data.copy_(stored[key])
    if dtype.itemsize < 4:
        base.forward = autocast(base.device.type, dtype)(base.forward)  # the base's own, which `generate` calls too


def widen_saved(model: torch.nn.Module) -> None:
    """Make fp32 what in `model` was trained whole, on whatever device it is (meta too)."""
    for _, parameter in _saved(model):
        parameter.data = parameter.data.float()


def autocast(device: str, dtype: torch.dtype | None) -> torch.autocast:
    """What training computes under: autocast to a dtype of 16 bits; with None, nothing."""
    import torch

    kind = torch.device(device).type
    return torch.autocast(kind, dtype) if dtype else torch.autocast(kind, enabled=False)


def _saved(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """(key in the adapter's file, parameter) of what was trained whole, in a model that peft has wrapped."""
    from peft.utils import ModulesToSaveWrapper

    wrappers = [(n, m) for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    return [(f"{n}.{leaf}", p) for n, w in wrappers for leaf, p in w.modules_to_save["default"].named_parameters()]
