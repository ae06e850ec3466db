"""Compare two models on the same held-out tokens: likelihood, divergence and greedy token at supervised positions.

Only the final hidden states of supervised positions are kept, (P, d); logits are computed from them for a slice of
positions at a time, so that a vocabulary of 150,000 never needs all positions at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

    from finetune.tokenization.token_rows import TokenRow

POSITIONS = 256
LONGEST = 4  # times the requested tokens, if prompts are long and answers short
Head = Callable[["torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True)
class HeldOut:
    """Rows in right-padded batches; positions are those whose next token is supervised, in `order` of rows."""

    batches: tuple[torch.Tensor, ...]  # (B, T) int64
    positions: tuple[torch.Tensor, ...]  # (B, T) bool, true if the next token is supervised
    labels: torch.Tensor  # (P,) int64: the next token
    row: NDArray[np.int64]  # (P,): row index, 0 … rows - 1
    rows: int


@dataclass(frozen=True)
class Comparison:
    """Arrays (P,) per position: NLL in nats under each model, KL(first ‖ second) in nats, and each greedy token."""

    nll_first: NDArray[np.float64]
    nll_second: NDArray[np.float64]
    kl: NDArray[np.float64]
    greedy_first: NDArray[np.int64]
    greedy_second: NDArray[np.int64]


def first_rows(rows: Sequence[TokenRow], tokens: int) -> list[int]:
    """Return the indices of the first rows with at most `tokens` tokens in total, skipping rows that no longer fit; at
    least one.
    """
    chosen: list[int] = []
    room = tokens
    for i, row in enumerate(rows):
        if len(row.ids) <= room or not chosen:
            chosen.append(i)
            room -= len(row.ids)
    return chosen


def choose_rows(rows: Sequence[TokenRow], tokens: int) -> list[TokenRow]:
    """Return the first rows (`first_rows`); if fewer than half of their tokens are supervised, add rows with the
    largest supervised share until half of `tokens` are supervised or LONGEST times `tokens` would be read.
    """
    chosen = first_rows(rows, tokens)
    compared = sum(_compared(rows[i]) for i in chosen)
    room = LONGEST * tokens - sum(len(rows[i].ids) for i in chosen)
    taken = set(chosen)
    for i in sorted(set(range(len(rows))) - taken, key=lambda i: (-_compared(rows[i]) / len(rows[i].ids), i)):
        if compared >= tokens // 2:
            break
        if len(rows[i].ids) <= room:
            taken.add(i)
            compared += _compared(rows[i])
            room -= len(rows[i].ids)
    return [rows[i] for i in sorted(taken)]


def _compared(row: TokenRow) -> int:
    """Return the number of compared tokens of a row: the supervised ones except the row's first."""
    return int(np.count_nonzero(row.mask[1:]))


def lay_out(rows: Sequence[TokenRow], batch_tokens: int = 4096) -> HeldOut:
    """Batch rows of similar length, at most `batch_tokens` with padding (a longer row is alone)."""
    import torch

    from finetune.eval import scoring

    batches, positions, labels, owners = [], [], [], []
    for group in scoring.batches([len(row.ids) for row in rows], batch_tokens):
        ids, _, wanted = scoring.padded([rows[i] for i in group])
        batches.append(ids)
        positions.append(torch.nn.functional.pad(wanted[:, 1:], (0, 1)))
        labels.append(ids[:, 1:][wanted[:, 1:]])
        owners.append(np.repeat(group, wanted[:, 1:].sum(1).numpy()))
    return HeldOut(tuple(batches), tuple(positions), torch.cat(labels), np.concatenate(owners), len(rows))


def supervised_hidden(states: Iterable[torch.Tensor], held_out: HeldOut) -> torch.Tensor:
    """Return the final hidden states (P, d) of supervised positions from those of all, (B, T, d) per batch."""
    import torch

    pairs = zip(states, held_out.positions, strict=True)
    return torch.cat([state[wanted.to(state.device)] for state, wanted in pairs])


def compare(
    first: torch.Tensor, first_head: Head, second: torch.Tensor, second_head: Head, labels: torch.Tensor
) -> Comparison:
    """Compare both models at each position from hidden states (P, d) and labels (P,), `POSITIONS` at a time."""
    import torch

    parts: list[list[torch.Tensor]] = []
    for start in range(0, len(labels), POSITIONS):
        part = slice(start, start + POSITIONS)
        with torch.no_grad():
            a = torch.log_softmax(first_head(first[part]).float(), dim=-1)
            b = torch.log_softmax(second_head(second[part]).float(), dim=-1).to(a.device)
            target = labels[part].to(a.device).unsqueeze(1)
            kl = (a.exp() * (a - b)).sum(-1, dtype=torch.float64)
            nll = [-x.gather(1, target).squeeze(1).double() for x in (a, b)]
            parts.append([t.cpu() for t in (*nll, kl, a.argmax(-1), b.argmax(-1))])
    return Comparison(*(torch.cat(column).numpy() for column in zip(*parts, strict=True)))


def per_row(values: NDArray[np.float64] | None, held_out: HeldOut) -> NDArray[np.float64]:
    """Return the sums of `values` (P,) over each row's positions, (rows,) float64; the number of positions for None."""
    return np.bincount(held_out.row, weights=values, minlength=held_out.rows).astype(np.float64)


ENOUGH_TOKENS = 4096  # compared tokens; with fewer, the report adds a warning
