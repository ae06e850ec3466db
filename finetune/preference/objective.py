"""What decides the loss of preference training, and what that loss is before anything is learned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Objective:
    """What of the recipe's preference section decides the loss."""

    method: str  # dpo or kto
    loss: str  # TRL's name
    beta: float
    label_smoothing: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


def expected_loss(objective: Objective, batch: Mapping[str, Any] | None) -> float | None:
    """TRL's loss at equal policies; without `batch` only if its weights do not depend on it."""
    weight = 1.0
    if objective.desirable_weight != objective.undesirable_weight:
        if batch is None:
            return None
        right = float(batch["label"].float().mean())
        weight = right * objective.desirable_weight + (1 - right) * objective.undesirable_weight
    else:
        weight = objective.desirable_weight
    return loss_at_start(objective.loss, objective.beta, objective.label_smoothing, weight)


def loss_at_start(loss: str, beta: float, smoothing: float, weight: float = 1.0) -> float | None:
    """What TRL's loss is where policy and reference are equal; None if the reference does not decide it.

    `weight`: the mean of KTO's weights over the batch. Source: the formulas of trl/trainer/dpo_trainer.py and
    kto_trainer.py at log-ratios of 0.
    """
    two = math.log(2)
    if loss == "exo_pair":
        return -two - 0.5 * (math.log1p(-smoothing) + math.log(smoothing))
    known = {
        "sigmoid": two, "sigmoid_norm": two, "robust": two, "aot": two, "aot_unpaired": two, "hinge": 1.0,
        "ipo": (0.5 / beta) ** 2, "nca_pair": 2 * two, "bco_pair": 2 * two, "sppo_hard": 2 * (0.5 / beta) ** 2,
        "apo_zero": 1.0, "apo_down": 1.0, "discopop": 0.5 * two + 0.5, "kto": 0.5 * weight,
        "apo_zero_unpaired": 0.5 * weight,
    }  # fmt: skip
    return known.get(loss)
