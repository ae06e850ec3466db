"""Curves outside the run's own folder: Weights & Biases (offline without a key) and TensorBoard, each only if asked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from finetune.context import Context
from finetune.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path


class Tracker:
    """Sends the same figures to every tracker the recipe names."""

    def __init__(self, wandb_run: Any | None, board: Any | None) -> None:  # noqa: ANN401 - two third-party handles
        self._wandb, self._board = wandb_run, board

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """One point of every curve."""
        if self._wandb:
            self._wandb.log(dict(figures), step=step)
        if self._board:
            for name, value in figures.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"train/{name}", value, step)

    def close(self) -> None:
        """Flush and close."""
        if self._wandb:
            self._wandb.finish()
        if self._board:
            self._board.close()


def open_tracker(ctx: Context) -> Tracker | None:
    """The trackers of the recipe, or None. W&B never asks for a key: without one it records offline.

    Raises InputError when tensorboard is asked for and not installed.
    """
    folder = ctx.scratch / "tracking" / ctx.run_name
    if not (ctx.tracking.wandb or ctx.tracking.tensorboard):
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return Tracker(
        _open_wandb(ctx, folder) if ctx.tracking.wandb else None,
        _open_board(folder) if ctx.tracking.tensorboard else None,
    )


def _open_wandb(ctx: Context, folder: Path) -> Any:  # noqa: ANN401 - wandb's run
    import wandb

    has_key = bool(os.environ.get("WANDB_API_KEY")) or bool(wandb.api.api_key)
    mode: Any = os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")
    ctx.say(f"tracking: W&B {mode} (project {ctx.tracking.wandb_project}, files in {folder})")
    return wandb.init(
        project=ctx.tracking.wandb_project,
        name=ctx.run_name,
        dir=str(folder),
        mode=mode,
        config=dict(ctx.environment),
        settings=wandb.Settings(silent=True, console="off"),
    )


def _open_board(folder: Path) -> Any:  # noqa: ANN401 - SummaryWriter
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("tracking.tensorboard: tensorboard is not installed (pip install tensorboard)") from None
    return SummaryWriter(str(folder))
