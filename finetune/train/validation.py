"""Held-out loss during training: evaluate every few steps, keep the best adapter, stop early.

The state that later steps depend on is in the checkpoint (STATE and BEST), so that a resumed training does the same as
an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import FinetuneError
from finetune.eval.scoring import batches, padded, token_nll
from finetune.metrics import TrainMetrics
from finetune.recipe import Train
from finetune.tokenization.token_rows import TokenRow
from finetune.utils.files import read_json, write_json

if TYPE_CHECKING:
    import torch

    from finetune.models.layerwise import CausalModel

STATE, BEST = "held_out.json", "best_adapter.safetensors"
BATCH_TOKENS = 2048  # with padding, or one row: less memory than a training step, because nothing is kept for backward


@dataclass(frozen=True)
class Seen:
    """Measurements so far. `waited`: measurements since the best one; `stopped`: step of the early stop."""

    step: int = 0
    loss: float | None = None
    best_step: int = 0
    best_loss: float | None = None
    waited: int = 0
    stopped: bool = False


class HeldOut:
    """Evaluates the held-out loss and decides on early stopping. All ranks compute the same result."""

    def __init__(
        self,
        rows: Sequence[TokenRow],
        train: Train,
        steps: int,
        autocast: Callable[[], AbstractContextManager[Any]],
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """`rows` are scored every `train.eval_steps` and at the last of `steps`; `autocast` is the training's own."""
        self.rows, self.train, self.steps, self.autocast = rows, train, steps, autocast
        self.rank, self.world = rank, world
        self.seen = Seen()
        self.best: dict[str, torch.Tensor] = {}  # on the CPU, by parameter name

    def resume(self, checkpoint: Path) -> None:
        """Load the state of `checkpoint`. Raises FinetuneError if it holds none."""
        if not (checkpoint / STATE).is_file():
            raise FinetuneError(f"{checkpoint.name} was written without train.eval_steps; start again with --fresh")
        self.seen = Seen(**read_json(checkpoint / STATE))
        if self.train.keep_best and self.seen.best_loss is not None:
            from safetensors.torch import load_file

            self.best = load_file(str(checkpoint / BEST))

    def save(self, checkpoint: Path) -> None:
        """Write the state into a checkpoint; called by one process."""
        write_json(checkpoint / STATE, vars(self.seen))
        if self.best:
            from safetensors.torch import save_file

            save_file(self.best, str(checkpoint / BEST))

    def look(self, model: CausalModel, step: int) -> bool:
        """Evaluate if due; return whether to stop because `train.patience` measurements were no better.

        Raises FinetuneError for a loss that is NaN.
        """
        every = self.train.eval_steps
        if every is None or (step % every and step != self.steps):
            return self.seen.stopped
        loss = self.loss(model)
        if not math.isfinite(loss):
            raise FinetuneError(f"the held-out loss became {loss} at step {step}; lower train.learning_rate")
        if self.seen.best_loss is None or loss < self.seen.best_loss:
            self.seen = Seen(step, loss, step, loss)
            if self.train.keep_best:
                self.best = trained_tensors(model)
        else:
            waited = self.seen.waited + 1
            stopped = self.train.patience is not None and waited >= self.train.patience and step < self.steps
            self.seen = Seen(step, loss, self.seen.best_step, self.seen.best_loss, waited, stopped)
        return self.seen.stopped

    def loss(self, model: CausalModel) -> float:
        """Return nats per supervised token over all rows, independent of batching and of the number of processes.

        Dropout and noise are off; random generators, mode and gradients are restored.
        """
        import torch

        from finetune.utils.runtime import RandomState

        todo = list(batches([len(r.ids) for r in self.rows], BATCH_TOKENS))
        before, training = RandomState.now(), model.training
        total = torch.zeros(2, dtype=torch.float64)
        model.eval()
        try:
            with torch.no_grad(), self.autocast():
                # Each rank takes its share, with equally many forwards: under FSDP all ranks take part in a forward.
                for turn in range(-(-len(todo) // self.world)):
                    mine = turn * self.world + self.rank
                    sums = batch_nll(model, [self.rows[i] for i in todo[min(mine, len(todo) - 1)]])
                    total += sums if mine < len(todo) else torch.zeros_like(sums)
        finally:
            model.train(training)
            before.restore()
        if self.world > 1:
            import torch.distributed

            total = total.to(next(model.parameters()).device)
            torch.distributed.all_reduce(total)
        nll, tokens = total.tolist()
        return float(nll / tokens)

    def put_back(self, model: CausalModel) -> dict[str, torch.Tensor] | None:
        """Load the best adapter into `model` if train.keep_best is on; return its tensors for a model sharded by
        FSDP.
        """
        import torch
        from torch.distributed.tensor import DTensor

        if not self.best:
            return None
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and not isinstance(parameter, DTensor):
                    parameter.copy_(self.best[name])
        return self.best

    def figures(self) -> TrainMetrics:
        """Return the metrics of the stage."""
        seen = self.seen
        return {
            "held_out_rows": len(self.rows),
            "held_out_loss": seen.loss,
            "held_out_best_loss": seen.best_loss,
            "held_out_best_step": seen.best_step,
            "stopped_early": seen.stopped,
        }


def trained_tensors(model: CausalModel) -> dict[str, torch.Tensor]:
    """Return the trainable parameters by name, copied to the CPU; every rank must call this."""
    from finetune.train import distributed

    own = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    whole = distributed.whole_adapter(model) or own
    return {n: t.to("cpu", copy=True).contiguous() for n, t in whole.items()}


def batch_nll(model: CausalModel, rows: Sequence[TokenRow]) -> torch.Tensor:
    """Return (2,) fp64: the summed negative log-likelihood of the supervised tokens of `rows` (nats), and their
    number.
    """
    import torch

    losses = token_nll(model, *(t.to(model.device) for t in padded(rows)))
    return torch.tensor([float(losses.double().sum()), len(losses)], dtype=torch.float64)
