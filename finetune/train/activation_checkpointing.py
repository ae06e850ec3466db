"""Activation checkpointing policies as settings of transformers and torch.

`selective` is built here: TRL's `{"selective": True}` wraps a method of the PEFT model that transformers 5 does not
call, so with an adapter it is ignored silently and every layer is recomputed. A test fails when that changes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, create_selective_checkpoint_contexts
from trl.models.activation_offloading import OffloadActivations

from finetune.errors import InputError
from finetune.estimate.activations import OFFLOAD_BUFFERS
from finetune.train.batch import OFFLOAD_ON_CPU

ATTENTION = ("_scaled_dot_product_", "varlen_attn", "flash_attn", "flash_attention")


def settings(policy: str, device: str) -> tuple[bool, dict[str, Any] | None]:
    """Return Trainer's `activation_checkpointing` and its kwargs for a value of runtime.checkpointing except `auto`.

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
        # what is recomputed from is moved by TRL's `activation_offloading`, on a stream of its own
    return True, chosen


def keep_attention() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """Keep attention's outputs, recompute the rest: attention is the most expensive at long lengths, its output
    small.
    """
    return create_selective_checkpoint_contexts(_keeps)


def _keeps(ctx: SelectiveCheckpointContext, operator: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    name = str(operator)
    return CheckpointPolicy.MUST_SAVE if any(a in name for a in ATTENTION) else CheckpointPolicy.PREFER_RECOMPUTE


def enable(model: torch.nn.Module, chosen: dict[str, Any] | None) -> None:
    """Enable checkpointing as `Trainer` does: one of the settings is for transformers, the rest for torch."""
    own = dict(chosen or {})
    every = own.pop("every_n_layers", 1)
    whole: Any = model
    whole.activation_checkpointing_enable(activation_checkpointing_kwargs=own, every_n_layers=every)


def buffer_twice(trainer: Any) -> None:  # noqa: ANN401 - any of TRL's trainers
    """Let TRL's offloading keep the inputs of OFFLOAD_BUFFERS layers on the GPU: one is copied while the next is made.

    TRL keeps five. Its transfers run on a second stream, back too: the copy for a layer begins while the GPU still
    computes the one before. What is frozen is named again, because fusing has moved it.
    """
    context = trainer.maybe_activation_offload_context
    if isinstance(context, OffloadActivations):
        context.max_fwd_stash_size = OFFLOAD_BUFFERS
        context.update_model_params(trainer.model)
