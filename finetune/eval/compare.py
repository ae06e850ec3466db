"""Two models on the same held-out tokens: likelihood, divergence and greedy choice at every supervised position.

Only the final hidden states of supervised positions are kept, (P, d); logits are made again from them a slice of
positions at a time, so that a vocabulary of 150,000 never meets all positions at once.
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
LONGEST = 4  # times the tokens asked for, where prompts are long and answers short
Head = Callable[["torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True)
class HeldOut:
    """Rows laid into right-padded batches; positions are those whose next token is supervised, in `order` of rows."""

    batches: tuple[torch.Tensor, ...]  # (B, T) int64
    positions: tuple[torch.Tensor, ...]  # (B, T) bool, true where the next token is supervised
    labels: torch.Tensor  # (P,) int64: the token that follows
    row: NDArray[np.int64]  # (P,): which row, 0 … rows - 1
    rows: int


@dataclass(frozen=True)
class Comparison:
    """Per position, all (P,): NLL in nats under each model, KL(first ‖ second) in nats, and each greedy token."""

    nll_first: NDArray[np.float64]
    nll_second: NDArray[np.float64]
    kl: NDArray[np.float64]
    greedy_first: NDArray[np.int64]
    greedy_second: NDArray[np.int64]


def first_rows(rows: Sequence[TokenRow], tokens: int) -> list[int]:
    """Numbers of the first rows that together have at most `tokens` tokens, passing over one that no longer fits; at
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
    """The first rows (`first_rows`); where fewer than half of those tokens are supervised, rows are added, those with
    the largest supervised share first, until as many are or until LONGEST times `tokens` would be read.
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
    """Tokens of a row whose likelihood is compared: the supervised ones but for the first of the row."""
    return int(np.count_nonzero(row.mask[1:]))


def lay_out(rows: Sequence[TokenRow], batch_tokens: int = 4096) -> HeldOut:
    """Batches of rows of like length, none over `batch_tokens` when padded (a longer row is alone)."""
    import torch

    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    groups: list[list[int]] = []
    for i in order:
        if groups and (len(groups[-1]) + 1) * len(rows[i].ids) <= batch_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    batches, positions, labels, owners = [], [], [], []
    for group in groups:
        width = max(len(rows[i].ids) for i in group)
        ids = torch.zeros(len(group), width, dtype=torch.int64)
        wanted = torch.zeros(len(group), width, dtype=torch.bool)
        for k, i in enumerate(group):
            row = torch.from_numpy(np.asarray(rows[i].ids, dtype=np.int64))
            supervised = torch.from_numpy(np.asarray(rows[i].mask, dtype=bool))
            ids[k, : len(row)] = row
            wanted[k, : len(row) - 1] = supervised[1:]
            labels.append(row[1:][supervised[1:]])
            owners.append(np.full(int(supervised[1:].sum()), i, dtype=np.int64))
        batches.append(ids)
        positions.append(wanted)
    return HeldOut(tuple(batches), tuple(positions), torch.cat(labels), np.concatenate(owners), len(rows))


def supervised_hidden(states: Iterable[torch.Tensor], held_out: HeldOut) -> torch.Tensor:
    """Final hidden states (P, d) of the supervised positions, from those of all, (B, T, d) a batch."""
    import torch

    pairs = zip(states, held_out.positions, strict=True)
    return torch.cat([state[wanted.to(state.device)] for state, wanted in pairs])


def compare(
    first: torch.Tensor, first_head: Head, second: torch.Tensor, second_head: Head, labels: torch.Tensor
) -> Comparison:
    """Both models at each position, from hidden states (P, d) and the labels (P,), `POSITIONS` at a time."""
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
    """Sums of `values` (P,) over each row's positions, (rows,) float64; of None, how many positions each row has."""
    return np.bincount(held_out.row, weights=values, minlength=held_out.rows).astype(np.float64)


ENOUGH_TOKENS = 4096  # compared; with fewer, what is measured is said to rest on few
