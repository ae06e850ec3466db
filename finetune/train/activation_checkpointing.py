"""Which activations a training keeps, in transformers' and torch's words.

`selective` is built here: TRL's own `{"selective": True}` wraps a method of the PEFT model that transformers 5 does not
call, so with an adapter it is dropped without a word and every layer is recomputed whole. A test tells when that ends.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from finetune.errors import InputError
from finetune.train.batch import OFFLOAD_ON_CPU

ATTENTION = ("_scaled_dot_product_", "varlen_attn", "flash_attn", "flash_attention")


def settings(policy: str, device: str) -> tuple[bool, dict[str, Any] | None]:
    """Trainer's `activation_checkpointing` and its kwargs for a value of runtime.checkpointing that is not `auto`.

    Raises InputError for `offload` without a GPU.
    """
    if policy == "none":
        return False, None
    chosen: dict[str, Any] = {"use_reentrant": False}
    if policy.startswith("every_"):
        chosen["every_n_layers"] = int(policy.removeprefix("every_"))
    elif policy == "selective":
        chosen["context_fn"] = keep_attention
    elif policy == "offload":
        if device == "cpu":
            raise InputError(OFFLOAD_ON_CPU)
        chosen["offload"] = True
    return True, chosen


def keep_attention() -> Any:  # noqa: ANN401 - the two contexts that torch's checkpoint asks for
    """Keep what attention makes, recompute all else: its forward costs most at long lengths, its output least."""
    return create_selective_checkpoint_contexts(_keeps)


def _keeps(ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:  # noqa: ANN401
    name = str(operator)
    return CheckpointPolicy.MUST_SAVE if any(a in name for a in ATTENTION) else CheckpointPolicy.PREFER_RECOMPUTE


def enable(model: torch.nn.Module, chosen: dict[str, Any] | None) -> None:
    """Begin to recompute, as `Trainer` does when it trains: two of the settings are transformers', the rest torch's."""
    own = dict(chosen or {})
    every, offload = own.pop("every_n_layers", 1), own.pop("offload", False)
    whole: Any = model
    whole.activation_checkpointing_enable(activation_checkpointing_kwargs=own, every_n_layers=every, offload=offload)
