"""TRL's `SFTTrainer` with what a recipe adds: LoRA+ and, on a CPU, the loss of the supervised tokens only."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, cast

import torch
from trl import SFTTrainer

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

LOGIT_BYTES = 1 << 30  # most that the logits of a micro-batch may take, with their gradient and log-probabilities


def keeps_logits(model: PreTrainedModel, tokens: int) -> bool:
    """Return whether the loss of a micro-batch of `tokens` tokens is computed from the model's own logits.

    The model must compute the logits of chosen positions (`logits_to_keep`; some know only the last ones, so it is
    tried), on a CPU, and they must be small. The answer depends on nothing that changes from run to run.
    """
    vocabulary = model.config.get_text_config().vocab_size
    chooses = "logits_to_keep" in inspect.signature(type(model).forward).parameters
    if not chooses or model.device.type != "cpu" or 3 * 4 * tokens * vocabulary > LOGIT_BYTES:
        return False
    kept = torch.tensor([0, 2])
    asked: dict[str, Any] = {"input_ids": torch.arange(4)[None], "use_cache": False}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        whole = model(**asked).logits
        try:
            some = model(**asked, logits_to_keep=kept).logits
        except (TypeError, ValueError, RuntimeError, IndexError):  # a slice by a tensor
            return False
    return some.shape[1] == len(kept) and torch.allclose(some, whole[:, kept], rtol=1e-3, atol=1e-3)


class RecipeTrainer(SFTTrainer):
    """`SFTTrainer` with two additions.

    LoRA+ (Hayou et al. 2024, arXiv:2402.12354): B matrices have `lora_plus_ratio` times the learning rate of the rest,
    which stays in the first parameter groups (their rate is logged).

    With `own_logits` the loss is computed from the logits of the supervised positions alone. TRL's fused head computes
    every position outside Triton's devices, twice (again in backward), and their entropy; it is made for vocabularies
    whose logits do not fit.
    """

    lora_plus_ratio: float | None = None
    own_logits = False
    counts = torch.zeros(3, dtype=torch.int64)  # since the last log: tokens predicted right, supervised, all
    tokens_seen = 0

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

    def compute_loss(
        self,
        model: Callable[..., Any],
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Return the loss of a micro-batch (labels (B, T), -100 where nothing is learned); () fp32.

        It is the sum over the supervised tokens divided by `num_items_in_batch`, their number in the whole batch.
        """
        if not self.own_logits or return_outputs:
            loss: torch.Tensor = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            return loss
        targets = inputs["labels"][:, 1:]
        kept = (targets != -100).any(0).nonzero().flatten()  # positions whose next token any row learns
        asked = {name: value for name, value in inputs.items() if name != "labels"}
        logits = model(**asked, use_cache=False, logits_to_keep=kept).logits.float()  # (B, N, V)
        targets = targets[:, kept]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        supervised = targets != -100
        count = supervised.sum() if num_items_in_batch is None else num_items_in_batch
        loss = loss / torch.as_tensor(count).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages the gradients across ranks
        right = (logits.detach().argmax(-1) == targets)[supervised].sum()
        mask = inputs.get("attention_mask")  # packed rows have none, and no padding
        tokens = mask.sum() if mask is not None else torch.tensor(inputs["labels"].numel())
        if cast("torch.nn.Module", self.model).training:
            self.counts = self.counts + torch.stack([right, supervised.sum(), tokens])
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a step, with the names that TRL uses for the tokens seen and the share of them predicted right."""
        if self.own_logits:
            counts = self.accelerator.gather(self.counts[None]).sum(0).tolist()
            self.counts = torch.zeros(3, dtype=torch.int64)
            self.tokens_seen += counts[2]
            if counts[2]:  # none since the last step: the summary at the end
                logs = {**logs, "mean_token_accuracy": counts[0] / max(1, counts[1]), "num_tokens": self.tokens_seen}
        super().log(logs, start_time)
