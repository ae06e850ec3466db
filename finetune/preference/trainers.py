"""TRL's DPOTrainer and KTOTrainer on rows that are tokenised already, with a loss that no micro-batch size changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from trl import DPOTrainer, KTOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

if TYPE_CHECKING:
    from datasets import Dataset


class _OwnRows:
    """Changes to both of TRL's trainers: no tokenisation, and a mean over the pairs of the optimiser step.

    TRL averages over a micro-batch and then over the micro-batches, so that the pairs of a smaller last micro-batch
    would count for more.
    """

    accelerator: Any
    share = 1.0  # units of a micro-batch are multiplied by it; 1 outside a step

    def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
        """The rows as they are: rendered and masked by stage pairs."""
        return dataset

    def units(self, batch: Mapping[str, torch.Tensor]) -> int:
        """Return the number of items that the loss of `batch` averages over."""
        raise NotImplementedError

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """The micro-batches of one step, as `Trainer` collects them, and their units on all processes counted."""
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        if samples:
            count = self._sum(sum(self.units(batch) for batch in samples))
            self.share = len(samples) * self.accelerator.num_processes / count
        return samples, items

    def _sum(self, value: float) -> float:
        """The sum over all processes."""
        local_value = torch.tensor([float(value)], device=self.accelerator.device, dtype=torch.float64)
        return float(self.accelerator.gather(local_value).sum())

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """TRL's loss, weighted by the units of this micro-batch."""
        assert not return_outputs  # noqa: S101 - nothing here asks for logits
        loss: torch.Tensor = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)  # type: ignore[misc]
        return loss * (self.share * self.units(inputs) if self.share != 1.0 else 1.0)


class PairTrainer(_OwnRows, DPOTrainer):
    """DPO."""

    def units(self, batch: Mapping[str, torch.Tensor]) -> int:
        """Pairs; for the loss `sft` the supervised tokens of the chosen answers."""
        half = len(batch["input_ids"]) // 2
        return int(batch["completion_mask"][:half, 1:].sum()) if self.loss_types == ["sft"] else half


class JudgedTrainer(_OwnRows, KTOTrainer):
    """KTO, whose distance to the reference is the mean over the optimiser step and not over a micro-batch."""

    _distance: Mapping[str, torch.Tensor] | None = None  # adapter -> mean log-probability of the mismatched answers

    def units(self, batch: Mapping[str, torch.Tensor]) -> int:
        """Answers."""
        return len(batch["input_ids"])

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """As in `_OwnRows`; then score the mismatched answers of the whole step with policy and reference."""
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if samples and self.calculate_KL:
            self._distance = None
            batches = [self._prepare_inputs(batch) for batch in samples]
            count = self._sum(sum(self.units(batch) for batch in batches))
            distance = {}
            model: Any = self.model
            settings: Any = self.args.gradient_checkpointing_kwargs
            quiet = disable_gradient_checkpointing(model, settings)
            with torch.no_grad(), self.compute_loss_context_manager(), quiet:
                for name in ("default", "ref"):
                    with use_adapter(self.accelerator.unwrap_model(model), name):
                        sums = [self._compute_kl_logps(model, batch).double().sum() for batch in batches]
                    distance[name] = torch.tensor(
                        self._sum(float(torch.stack(sums).sum())) / count, device=self.accelerator.device
                    )
            self._distance = distance
        return samples, items

    def _compute_kl_logps(self, model: torch.nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        """The step's mean under the active adapter; outside a step the log-probabilities of `batch`, (B,)."""
        if self._distance is None:
            return super()._compute_kl_logps(model, batch)
        return self._distance[self.accelerator.unwrap_model(self.model).active_adapter]
