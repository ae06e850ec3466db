"""Forward passes without gradients: the likelihood of held-out rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from finetune.context import Context
from finetune.errors import FinetuneError
from finetune.models.layerwise import head_logits, without_adapter
from finetune.tokenization.token_rows import TokenRow

if TYPE_CHECKING:
    from finetune.models.layerwise import CausalModel

POSITIONS = 1024  # whose logits exist at once


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yield indices in batches of similar length, at most `batch_tokens` with padding (a longer row is alone)."""
    batch: list[int] = []
    for i in np.argsort(np.asarray(lengths), kind="stable"):
        if batch and (len(batch) + 1) * lengths[int(i)] > batch_tokens:  # sorted: the newest is the longest
            yield batch
            batch = []
        batch.append(int(i))
    if batch:
        yield batch


def row_nll(
    model: CausalModel,
    rows: Sequence[TokenRow],
    batch_tokens: int,
    ctx: Context,
    label: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Return per row the summed negative log-likelihood of its supervised tokens (nats), and their number."""
    nll = np.zeros(len(rows), dtype=np.float64)
    counts = np.array([int(r.mask[1:].sum()) for r in rows], dtype=np.int64)
    todo = list(batches([len(r.ids) for r in rows], batch_tokens))
    with torch.inference_mode():
        for batch in ctx.track(todo, label, len(todo)):
            sums = _batch_nll(model, *padded([rows[i] for i in batch]))
            nll[batch] = sums.double().cpu().numpy()
    return nll, counts


def padded(rows: Sequence[TokenRow]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a padded batch (B, T): token ids and attention mask int64, and supervised tokens, bool."""
    shape = len(rows), max(len(r.ids) for r in rows)
    ids, attention = (torch.zeros(shape, dtype=torch.long) for _ in range(2))
    wanted = torch.zeros(shape, dtype=torch.bool)
    for k, row in enumerate(rows):
        n = len(row.ids)
        ids[k, :n] = torch.from_numpy(row.ids)
        attention[k, :n] = 1
        wanted[k, :n] = torch.from_numpy(row.mask)
    return ids, attention, wanted


def _batch_nll(
    model: CausalModel,
    ids: torch.Tensor,
    attention: torch.Tensor,
    wanted: torch.Tensor,
) -> torch.Tensor:
    """Return (B,) fp32 sums over the supervised positions of (B, T) rows."""
    ids, attention, wanted = (t.to(model.device) for t in (ids, attention, wanted))
    losses = token_nll(model, ids, attention, wanted)
    keep = wanted[:, 1:]
    row = torch.arange(len(ids), device=ids.device).unsqueeze(1).expand_as(keep)[keep]
    return torch.zeros(len(ids), dtype=torch.float32, device=ids.device).index_add_(0, row, losses)


def token_nll(
    model: CausalModel,
    ids: torch.Tensor,
    attention: torch.Tensor,
    wanted: torch.Tensor,
) -> torch.Tensor:
    """Return (P,) fp32: nats of every `wanted` token of (B, T) rows, in order; a row's first token is never scored.

    Logits are computed for POSITIONS wanted tokens at a time: for 8,192 positions and a vocabulary of 128,000 they
    would take 4 GB. They are computed within the model's forward, at the call of its head, so that weights sharded by
    FSDP are present; later changes of logits (Gemma's cap, Cohere's scale) are applied to each part by that forward.
    """
    causal = without_adapter(model)
    keep, targets = wanted[:, 1:], ids[:, 1:][wanted[:, 1:]]
    parts: list[torch.Tensor] = []

    def score(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hook.remove()  # the forwards below call the same head
        hidden = given[0][:, :-1][keep]  # (P, d)
        for start in range(0, len(targets), POSITIONS):
            part = slice(start, start + POSITIONS)
            logits = head_logits(causal, hidden[part]).float()
            parts.append(torch.nn.functional.cross_entropy(logits, targets[part], reduction="none"))
        return (given[0][:, :1], *given[1:])

    hook = causal.get_output_embeddings().register_forward_pre_hook(score)
    try:
        model(input_ids=ids, attention_mask=attention, use_cache=False)
    finally:
        hook.remove()
    if len(targets) and not parts:
        raise FinetuneError(
            f"{type(causal).__name__} computes logits without calling its head; its rows cannot be scored"
        )
    return torch.cat(parts) if parts else torch.zeros(0, device=ids.device)
