"""Forward passes without gradients: the likelihood of held-out rows, and greedy answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.context import Context
from finetune.data.training_rows import TokenRow

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Answer:
    """A greedy generation. `finish` is "stop" (a terminator came, not part of `ids`) or "length"."""

    ids: list[int]
    finish: str


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, none over `batch_tokens` when padded (a longer row is alone)."""
    batch: list[int] = []
    for i in np.argsort(np.asarray(lengths), kind="stable"):
        if batch and (len(batch) + 1) * lengths[int(i)] > batch_tokens:  # sorted: the newest is the longest
            yield batch
            batch = []
        batch.append(int(i))
    if batch:
        yield batch


def row_nll(
    model: Any,  # noqa: ANN401 - PreTrainedModel or PeftModel
    rows: Sequence[TokenRow],
    batch_tokens: int,
    ctx: Context,
    label: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Per row: the summed negative log-likelihood of its supervised tokens (nats), and their number."""
    import torch

    nll = np.zeros(len(rows), dtype=np.float64)
    counts = np.array([int(r.mask[1:].sum()) for r in rows], dtype=np.int64)
    todo = list(batches([len(r.ids) for r in rows], batch_tokens))
    with torch.inference_mode():
        for batch in ctx.track(todo, label, len(todo)):
            width = max(len(rows[i].ids) for i in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            attention = torch.zeros(len(batch), width, dtype=torch.long)
            wanted = torch.zeros(len(batch), width, dtype=torch.bool)
            for k, i in enumerate(batch):
                n = len(rows[i].ids)
                ids[k, :n] = torch.from_numpy(rows[i].ids)
                attention[k, :n] = 1
                wanted[k, :n] = torch.from_numpy(rows[i].mask)
            sums = _batch_nll(model, ids, attention, wanted)
            nll[batch] = sums.double().cpu().numpy()
    return nll, counts


def _batch_nll(
    model: Any,  # noqa: ANN401 - PreTrainedModel or PeftModel
    ids: torch.Tensor,
    attention: torch.Tensor,
    wanted: torch.Tensor,
) -> torch.Tensor:
    """(B,) fp32 sums over the supervised positions of (B, T) rows; only those positions meet the vocabulary."""
    import torch

    ids, attention, wanted = (t.to(model.device) for t in (ids, attention, wanted))
    logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1]
    keep = wanted[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits[keep].float(), ids[:, 1:][keep], reduction="none")
    row = torch.arange(len(ids), device=ids.device).unsqueeze(1).expand_as(keep)[keep]
    return torch.zeros(len(ids), dtype=torch.float32, device=ids.device).index_add_(0, row, losses)


def greedy(
    model: Any,  # noqa: ANN401 - PreTrainedModel or PeftModel
    prompts: Sequence[np.ndarray],
    limits: Sequence[int],
    terminators: Sequence[int],
    pad_id: int,
    ctx: Context,
    batch_tokens: int = 16384,
) -> list[Answer]:
    """Greedy answers to prompts of token ids, each of at most its own `limits` new tokens.

    `batch_tokens` bounds prompts and answers of a batch together, padded: the key-value cache grows with it.
    """
    answers: list[Answer | None] = [None] * len(prompts)
    groups = list(batches([len(p) + n for p, n in zip(prompts, limits, strict=True)], batch_tokens))
    for group in ctx.track(groups, "generating", len(groups)):
        new = _generate(model, [prompts[i] for i in group], [limits[i] for i in group], terminators, pad_id, ctx)
        for i, ids in zip(group, new, strict=True):
            answers[int(i)] = _cut(ids, limits[int(i)], set(terminators))
    return [a for a in answers if a is not None]


def _generate(
    model: Any,  # noqa: ANN401 - PreTrainedModel or PeftModel
    prompts: Sequence[np.ndarray],
    limits: Sequence[int],
    terminators: Sequence[int],
    pad_id: int,
    ctx: Context,
) -> list[list[int]]:
    import torch
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

    width = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    attention = torch.zeros_like(ids)
    for k, prompt in enumerate(prompts):  # padded on the left, so that the next token follows the prompt
        ids[k, width - len(prompt) :] = torch.from_numpy(prompt)
        attention[k, width - len(prompt) :] = 1
    device = model.device
    allowed = torch.tensor(limits, device=device)

    class OwnLimit(StoppingCriteria):
        """Each row ends at its own limit; a signal ends all."""

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
        out = model.generate(
            input_ids=ids.to(device),
            attention_mask=attention.to(device),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([OwnLimit()]),
        )
    return [row[width:].tolist() for row in out.cpu()]


def _cut(ids: list[int], limit: int, terminators: set[int]) -> Answer:
    for n, token in enumerate(ids[:limit]):
        if token in terminators:
            return Answer(ids[:n], "stop")
    return Answer(ids[:limit], "length")
