"""Trainer callback of preference training: `Follower`, with checks that the reference is the start adapter."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from finetune.context import Context
from finetune.errors import GateRefused
from finetune.preference import reference
from finetune.preference.reference import Objective, expected_loss
from finetune.train.callbacks import Follower

MARGIN_TOLERANCE = {"cpu": 0.0, "cuda": 0.01}  # of step 1, in β-scaled nats: a GPU may take another kernel for backward


class AlignFollower(Follower):
    """`Follower` with the checks that need the running training: after a resume, and on the whole first step."""

    def __init__(
        self,
        ctx: Context,
        metrics_file: Path,
        checkpoints: Path,
        steps: int,
        *,
        fp16: bool,
        objective: Objective,
        start: Mapping[str, torch.Tensor],
    ) -> None:
        super().__init__(ctx, metrics_file, checkpoints, steps, fp16=fp16)
        self.objective, self.start = objective, start

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        **more: object,
    ) -> None:
        """Check, after the checkpoint is loaded, that the reference is still the start adapter."""
        if model is not None:
            inner: torch.nn.Module = getattr(model, "module", model)  # of DistributedDataParallel
            reference.require_start(inner, self.start, resumed=self.resumed_from > 0)
        super().on_train_begin(args, state, control, model=model, **more)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **more: object,
    ) -> None:
        """Check that every margin of step 1 is 0: its loss is computed before the first update."""
        if logs and "loss" in logs and state.global_step == 1:
            self._first_step(logs, args.device.type)
        super().on_log(args, state, control, logs=logs, **more)

    def _first_step(self, logs: Mapping[str, Any], device: str) -> None:
        tolerance = MARGIN_TOLERANCE.get(device, 0.01)
        for name in ("rewards/margins", "rewards/chosen", "rewards/rejected"):
            if abs(float(logs.get(name, 0.0))) > tolerance:
                raise GateRefused(
                    f"align: {name} of the first step is {logs[name]:.3g}; it must be 0, since policy and reference "
                    "are equal: the reference differs from the start adapter"
                )
        if device == "cpu":
            reference.require_loss(float(logs["loss"]), expected_loss(self.objective, None), "of the first step")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: object) -> None:
        """Remove the reference from the checkpoint: a resumed run loads it from the start adapter."""
        if self.ctx.rank == 0:
            shutil.rmtree(self.checkpoints / f"checkpoint-{state.global_step}" / "ref", ignore_errors=True)
        super().on_save(args, state, control, **more)
