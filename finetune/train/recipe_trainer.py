"""Additions to TRL's trainers: LoRA+ and, on a CPU, a head that scores the supervised tokens only."""

from __future__ import annotations

import functools
import inspect
import math
from typing import TYPE_CHECKING, Any

import torch
from trl import SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

LOGIT_BYTES = 1 << 30  # most that the logits of a micro-batch may take, with their gradient and log-probabilities


def keeps_logits(model: PreTrainedModel, tokens: int) -> bool:
    """Return whether a micro-batch of `tokens` tokens is scored by the model's own logits (`score_supervised`).

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


def agreed(accelerator: Accelerator, choice: bool) -> bool:
    """Return `choice` if it is every process's: processes that compute differently would wait for each other."""
    return bool(accelerator.gather(torch.tensor([int(choice)], device=accelerator.device)).min())


def score_supervised(base: PreTrainedModel) -> None:
    """Let TRL's fused head on `base` (trl/trainer/utils.py, add_fused_lm_head) score the supervised positions only.

    Outside Triton's devices it scores every position, prompt and padding too, twice (again in backward), with an
    entropy and a mean of the logits. Nothing here uses those two: they are NaN in the result. TRL's trainers sum,
    weigh and log the rest as before.
    """
    fused = base.forward

    @functools.wraps(fused)
    def forward(*inputs: Any, fused_lm_head: bool = False, **named: Any) -> Any:  # noqa: ANN401 - any model's output
        labels = named.get("labels")
        if not fused_lm_head or labels is None or named.get("output_router_logits"):
            return fused(*inputs, fused_lm_head=fused_lm_head, **named)
        targets = labels[:, 1:]
        kept = (targets != -100).any(0).nonzero().flatten()  # positions whose next token is supervised in any row
        asked = {name: value for name, value in named.items() if name != "labels"}
        logits = fused(*inputs, **asked, logits_to_keep=kept).logits.float()  # (B, N, V)
        own = targets[:, kept]
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), own.flatten(), reduction="none")  # ignored: 0
        log_probs = logits.new_zeros(targets.shape).index_copy(1, kept, -nll.view(own.shape))
        right = torch.zeros_like(targets, dtype=torch.bool).index_copy(1, kept, logits.argmax(-1) == own)
        unknown = torch.full_like(log_probs, math.nan, requires_grad=False)
        return FusedCausalLMOutput(
            log_probs=log_probs, entropy=unknown, mean_logits=unknown, is_top1=right, label_mask=targets != -100
        )

    vars(base)["forward"] = forward


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
