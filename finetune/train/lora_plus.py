"""TRL's trainer with a separate learning rate for LoRA's B matrices (LoRA+), which its arguments do not support."""

from __future__ import annotations

from typing import Any

import torch
from trl import SFTTrainer


class RecipeTrainer(SFTTrainer):
    """`SFTTrainer` with LoRA+ (Hayou et al. 2024, arXiv:2402.12354): B matrices have `lora_plus_ratio` times the
    learning rate of the rest, which stays in the first parameter groups (their rate is logged).
    """

    lora_plus_ratio: float | None = None

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the configured optimiser and move the B matrices to separate parameter groups."""
        made = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if not made or self.lora_plus_ratio is None:
            return optimizer
        chosen: Any = self.model if model is None else model
        second = {id(p) for n, p in chosen.named_parameters() if ".lora_B." in n}
        for group in list(optimizer.param_groups):
            faster = [p for p in group["params"] if id(p) in second]
            group["params"] = [p for p in group["params"] if id(p) not in second]
            if faster:
                optimizer.add_param_group({**group, "params": faster, "lr": group["lr"] * self.lora_plus_ratio})
        return optimizer
