"""Additions to TRL's trainers: LoRA+ and, on a CPU, a head that scores supervised tokens only, in two threads."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from trl import SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from finetune.utils.runtime import SMALL_PARAMETERS

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

LOGIT_BYTES = 1 << 30  # most that the logits of a micro-batch may take, with their gradient and log-probabilities
THREADS = 2  # fixed, because pieces decide the order of sums: one seed gives the same bits on 1 core and on 64
PIECE_TOKENS = 512  # of packed documents that are computed together; attention grows with the square
BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")  # of packed documents, as TRL gives them
TOKENS_AT_ONCE = 4096  # of a micro-batch in pieces


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


def in_pieces(model: PreTrainedModel) -> bool:
    """Return whether a micro-batch is computed in pieces by THREADS threads: a small model on a CPU that draws no
    random numbers in training (it is tried). A larger one uses torch's own threads, which wait for each other more
    often than operations of a small model last.
    """
    if model.device.type != "cpu" or model.num_parameters() >= SMALL_PARAMETERS:
        return False
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        before, training = torch.get_rng_state(), model.training
        model.train()
        model(input_ids=torch.arange(4)[None], use_cache=False)
        model.train(training)
        return torch.equal(before, torch.get_rng_state())


def score_supervised(base: PreTrainedModel, pieces: bool = False) -> None:
    """Let TRL's fused head on `base` (trl/trainer/utils.py, add_fused_lm_head) score the supervised positions only.

    Outside Triton's devices it scores every position, prompt and padding too, twice (again in backward), with an
    entropy and a mean of the logits. Nothing here uses those two: they are NaN in the result. TRL's trainers sum,
    weigh and log the rest as before. With `pieces`, rows and packed documents are computed by several threads, backward
    too; `in_pieces` says for which models.
    """
    fused = base.forward

    def score(named: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probabilities and hits of the labels of (B, T) tokens, each (B, T) with nothing in the last."""
        labels = torch.nn.functional.pad(named.pop("labels")[:, 1:], (0, 1), value=-100)
        kept = (labels != -100).any(0).nonzero().flatten()  # positions whose next token is supervised in any row
        logits = fused(**named, logits_to_keep=kept).logits.float()  # (B, N, V)
        own = labels[:, kept]
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), own.flatten(), reduction="none")  # ignored: 0
        log_probs = logits.new_zeros(labels.shape).index_copy(1, kept, -nll.view(own.shape))
        right = torch.zeros_like(labels, dtype=torch.bool).index_copy(1, kept, logits.argmax(-1) == own)
        return log_probs, right

    @functools.wraps(fused)
    def forward(*inputs: Any, fused_lm_head: bool = False, **named: Any) -> Any:  # noqa: ANN401 - any model's output
        labels = named.get("labels")
        if not fused_lm_head or labels is None or inputs or named.get("output_router_logits"):
            return fused(*inputs, fused_lm_head=fused_lm_head, **named)
        parts = divided(named) if pieces else [named]
        if len(parts) == 1:
            log_probs, right = score(dict(named))
        else:
            hits: list[torch.Tensor] = [labels] * len(parts)

            def scored(number: int) -> torch.Tensor:
                out, hits[number] = score(dict(parts[number]))
                return out

            trained = [p for p in base.parameters() if p.requires_grad] if torch.is_grad_enabled() else []
            along = 1 if len(labels) == 1 else 0  # packed documents follow each other, rows are below each other
            log_probs = torch.cat(_Threads.apply(scored, len(parts), *trained), along)
            right = torch.cat(hits, along)
        unknown = torch.full_like(log_probs[:, 1:], math.nan, requires_grad=False)
        return FusedCausalLMOutput(
            log_probs=log_probs[:, :-1], entropy=unknown, mean_logits=unknown,
            is_top1=right[:, :-1], label_mask=labels[:, 1:] != -100,
        )  # fmt: skip

    vars(base)["forward"] = forward


def divided(named: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the arguments of a forward pass over (B, T) tokens in pieces that do not depend on each other.

    Rows are divided by THREADS; the documents of one packed row (whose positions begin at 0) by PIECE_TOKENS. An
    argument that is neither (B, T) nor a bound of documents is not divided, nor is the pass then.
    """
    rows, tokens = named["input_ids"].shape
    if any(torch.is_tensor(v) and v.shape[:2] != (rows, tokens) for k, v in named.items() if k not in BOUNDS):
        return [named]
    if rows > 1:
        size = -(-rows // THREADS)
        return [_part(named, slice(a, a + size), slice(None)) for a in range(0, rows, size)]
    if named.get("position_ids") is None or named.get("attention_mask") is not None:
        return [named]
    starts = (named["position_ids"][0] == 0).nonzero().flatten().tolist()
    if starts[:1] != [0] or (named["labels"][0, starts] != -100).any():  # predicted from the document before
        return [named]
    cuts = [0]
    for start, end in pairwise([*starts, tokens]):
        if start and end - cuts[-1] > PIECE_TOKENS:
            cuts.append(start)
    return [_part(named, slice(None), slice(a, b)) for a, b in pairwise([*cuts, tokens])]


def _part(named: dict[str, Any], rows: slice, tokens: slice) -> dict[str, Any]:
    part = {k: v[rows, tokens] if torch.is_tensor(v) and k not in BOUNDS else v for k, v in named.items()}
    if BOUNDS[0] in part:
        positions = part["position_ids"].flatten()
        bounds = torch.cat([(positions == 0).nonzero().flatten(), torch.tensor([len(positions)])])
        longest = int(bounds.diff().max())
        part |= dict(zip(BOUNDS, (bounds.int(), bounds.int(), longest, longest), strict=True))
    return part


class _Threads(torch.autograd.Function):
    """Compute `function(0)` to `function(count - 1)` in THREADS threads, and their backward passes too.

    Gradients of `parameters` are added in the order of the pieces, so they do not depend on which thread is faster.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        function: Callable[[int], torch.Tensor],
        count: int,
        *parameters: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Return the detached results; their graphs are kept for backward."""
        ctx.parameters = parameters
        ctx.results = _in_threads(function, range(count), grad=bool(parameters))
        return tuple(result.detach() for result in ctx.results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        """Return the gradients of the parameters."""
        results = ctx.results

        def piece(number: int) -> Sequence[torch.Tensor | None]:
            if not results[number].requires_grad:  # no supervised token
                return [None] * len(ctx.parameters)
            return torch.autograd.grad(results[number], ctx.parameters, gradients[number], allow_unused=True)

        total: list[torch.Tensor | None] = [None] * len(ctx.parameters)
        for parts in _in_threads(piece, range(len(results)), grad=False):
            total = [b if a is None else a if b is None else a + b for a, b in zip(total, parts, strict=True)]
        del ctx.results
        return (None, None, *total)


def _in_threads(function: Callable[[int], Any], numbers: Sequence[int], *, grad: bool) -> list[Any]:
    autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def call(number: int) -> Any:  # noqa: ANN401 - what the function returns
        with torch.set_grad_enabled(grad), torch.autocast("cpu", autocast[1], enabled=autocast[0]):
            return function(number)

    with ThreadPoolExecutor(THREADS) as pool:  # a new thread has grad mode and autocast of its own
        return list(pool.map(call, numbers))


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
