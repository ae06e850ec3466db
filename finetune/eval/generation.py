"""Generate answers to prompts of token ids, in left-padded batches of similar length, with a key-value cache.

An answer depends only on its prompt and random stream, so neither batch size nor interruption changes it: greedy
decoding takes the likeliest token, and sampling inverts the cumulative distribution at numbers from a generator per
request (Philox, keyed by its `stream`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria, StoppingCriteriaList

from finetune.context import Context
from finetune.eval.scoring import batches

if TYPE_CHECKING:
    from finetune.models.layerwise import CausalModel, Generator

Prompt = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Answer:
    """A generation. `finish` is "stop" (a terminator came, not part of `ids`) or "length"."""

    ids: list[int]
    finish: str


@dataclass(frozen=True)
class Request:
    """A prompt of token ids, its limit of new tokens, and the key of its random stream (< 2^128)."""

    prompt: Prompt
    limit: int
    stream: int = 0


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 is greedy; otherwise sample from the smallest set of tokens with probability `top_p`."""

    temperature: float = 0.0
    top_p: float = 1.0


def greedy(
    model: CausalModel,
    prompts: Sequence[np.ndarray],
    limits: Sequence[int],
    terminators: Sequence[int],
    pad_id: int,
    ctx: Context,
    batch_tokens: int = 16384,
) -> list[Answer]:
    """Return greedy answers to prompts of token ids, each with at most its entry of `limits` new tokens.

    `batch_tokens` bounds prompts plus answers of a padded batch: the key-value cache grows with it.
    """
    requests = [Request(p, n) for p, n in zip(prompts, limits, strict=True)]
    answers: dict[int, Answer] = {}
    bar = ctx.bar("generating", len(requests))
    try:
        for done in answer(model, requests, Sampling(), terminators, pad_id, ctx, batch_tokens):
            answers |= done
            bar.advance(len(done))
    finally:
        bar.close()
    return [answers[i] for i in range(len(requests))]


def answer(
    model: CausalModel,
    requests: Sequence[Request],
    sampling: Sampling,
    terminators: Sequence[int],
    pad_id: int,
    ctx: Context,
    batch_tokens: int,
) -> Iterator[dict[int, Answer]]:
    """Yield, batch by batch, the index of each request with its answer; shorter requests come first.

    `batch_tokens` bounds prompts plus answers of a padded batch (a longer request is alone). A batch that does not fit
    the GPU is halved. Raises Stopped between two tokens if a signal was received.
    """
    todo = list(batches([len(r.prompt) + r.limit for r in requests], batch_tokens))[::-1]
    while todo:
        group = todo.pop()
        try:
            new = _generate(model, [requests[i] for i in group], sampling, terminators, pad_id, ctx)
        except torch.cuda.OutOfMemoryError:
            if len(group) == 1:
                raise
            half = len(group) // 2
            todo += [group[half:], group[:half]]
            torch.cuda.empty_cache()
            continue
        ends = set(terminators)
        yield {i: _cut(ids, requests[i].limit, ends) for i, ids in zip(group, new, strict=True)}


def _generate(
    model: CausalModel,
    requests: Sequence[Request],
    sampling: Sampling,
    terminators: Sequence[int],
    pad_id: int,
    ctx: Context,
) -> list[list[int]]:
    width, limits = max(len(r.prompt) for r in requests), [r.limit for r in requests]
    ids = torch.full((len(requests), width), pad_id, dtype=torch.long)
    attention = torch.zeros_like(ids)
    for k, request in enumerate(requests):  # padded on the left, so that the next token follows the prompt
        ids[k, width - len(request.prompt) :] = torch.as_tensor(np.asarray(request.prompt, dtype=np.int64))
        attention[k, width - len(request.prompt) :] = 1
    device = model.device
    allowed = torch.tensor(limits, device=device)

    class OwnLimit(StoppingCriteria):
        """Stopping criterion: each row ends at its own limit; a signal ends all."""

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
            ctx.stop.check()
            return (input_ids.shape[1] - width) >= allowed

    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=int(max(limits)),
        eos_token_id=list(terminators),
        pad_token_id=pad_id,
        use_cache=True,
    )
    with torch.inference_mode():
        out: torch.Tensor = cast("Generator", model).generate(
            input_ids=ids.to(device),
            attention_mask=attention.to(device),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([OwnLimit()]),
            logits_processor=[_sampler(requests, sampling, width, device)] if sampling.temperature else [],
        )
    return [row[width:].tolist() for row in out.cpu()]


def _sampler(requests: Sequence[Request], sampling: Sampling, width: int, device: torch.device) -> LogitsProcessor:
    """Return a logits processor that keeps only the token chosen by each row's random stream at this step."""
    steps = max(r.limit for r in requests)
    drawn = np.stack([np.random.Generator(np.random.Philox(key=r.stream)).random(steps) for r in requests])
    uniform = torch.from_numpy(drawn).to(device, torch.float32 if str(device).startswith("mps") else torch.float64)

    class Chosen(LogitsProcessor):
        """(B, V) scores → minus infinity except for the drawn token."""

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            step = min(input_ids.shape[1] - width, steps - 1)  # a deferred stopping check may request one more step
            token = draw(scores, uniform[:, step], sampling)
            return torch.full_like(scores, float("-inf")).scatter_(1, token.unsqueeze(1), 0.0)

    return Chosen()


def draw(scores: torch.Tensor, uniform: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return the token of each row at which the cumulative distribution exceeds its number.

    Args:
        scores: (B, V) logits.
        uniform: (B,) numbers in [0, 1).
        sampling: `temperature` > 0; `top_p` keeps the smallest set of likeliest tokens with that probability
            (arXiv:1904.09751), at least one.

    Returns:
        (B,) int64. The cumulative sum is in the order of the ids and in fp64, so that tokens of equal probability do
        not swap between batches.
    """
    chances = torch.softmax(scores.float() / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        ranked, order = chances.sort(dim=-1, descending=True, stable=True)
        outside = (ranked.cumsum(-1) - ranked) >= sampling.top_p
        chances = chances.masked_fill(torch.zeros_like(outside).scatter_(1, order, outside), 0.0)
    total = chances.to(uniform.dtype).cumsum(-1)
    token: torch.Tensor = (total <= (uniform * total[:, -1]).unsqueeze(1)).sum(-1)
    return token.clamp_(max=scores.shape[-1] - 1)


def _cut(ids: list[int], limit: int, terminators: set[int]) -> Answer:
    for n, token in enumerate(ids[:limit]):
        if token in terminators:
            return Answer(ids[:n], "stop")
    return Answer(ids[:limit], "length")
