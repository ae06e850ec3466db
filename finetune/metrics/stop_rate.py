"""What to say of a model that never ends an answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TRAIN_LONGER = (
    "Read its answers in the report. That the end of an answer carries a label is proved before training, so train "
    "longer (train.epochs, train.max_steps) or at a higher train.learning_rate; until then, give a limit of new tokens "
    "wherever it is used."
)


def never_stops(figures: Mapping[str, Any], to_do: str = TRAIN_LONGER) -> str:
    """What that means and what to do, where no answer of an evaluation ended by itself; empty elsewhere."""
    if figures.get("stop_rate") != 0:
        return ""
    return (
        f"NO ANSWER ENDED BY ITSELF (0 of {figures['generations']}, each with room for twice its reference and 64 "
        f"tokens more): this model talks on until something cuts it off. {to_do}"
    )
