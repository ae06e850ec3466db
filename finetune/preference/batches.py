"""Rendered pairs as TRL's preference trainers read them: columns, collators, and the mismatched answers of KTO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.errors import GateRefused, InputError
from finetune.preference.records import SIDES
from finetune.train.batch import batch_shape
from finetune.train.divergence import ROW

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

FIELD = "preference.batch_pairs"
WHOLE_BATCH = ("aot", "aot_unpaired")  # losses that sort the pairs of a batch: it must be the whole step's
MISMATCHED = "kl"  # KTO: another row's answer, from which the distance to the reference is estimated


def least(micro: int, method: str, loss: str) -> int:
    """Return the smallest micro-batch that computes the same loss: the whole one if the loss sorts it, 2 for KTO."""
    if loss in WHOLE_BATCH:
        return micro
    return 2 if method == "kto" else 1


def batch_of(batch: int, asked: int | str, world: int, method: str, loss: str) -> tuple[int, int]:
    """Pairs (for kto answers) of a micro-batch, and micro-batches of a step of `batch`; `asked` as micro_batch_rows.

    A pair is two rows, so `auto` takes half as many pairs as training takes rows. TRL's KTO needs two answers or more
    in a micro-batch. Raises InputError if the processes cannot share the batch.
    """
    if loss in WHOLE_BATCH:
        if world > 1:
            raise InputError(f"preference.loss: {loss} sorts the pairs of a step; use one process")
        return batch, 1
    micro, accumulate = batch_shape(batch, asked, world, packed=False, field=FIELD)
    per_process = micro * accumulate
    if asked == "auto" and micro > 1 and method == "dpo":
        micro = max(n for n in range(1, micro // 2 + 1) if per_process % n == 0)
    if method == "kto" and micro == 1:
        micro = next((n for n in range(2, per_process + 1) if per_process % n == 0), 0)
        if not micro:
            raise InputError(f"{FIELD}: kto needs 2 answers or more on each process, and this is {per_process}")
    return micro, per_process // micro


def read_pairs(path: Path, method: str, batch: int, seed: int) -> pa.Table:
    """Return the rows of a `pairs` output in training order, with the column ROW (the row's number in the file).

    The columns are prompt_ids, and {side}_ids and {side}_mask of each side (list<int>; mask 1 = supervised); for kto
    also `label`, and kl_ids, kl_mask: the answer of the row before in the same optimiser step of `batch` rows, of the
    first row that of the last (arXiv:2402.01306, section 4.1). TRL makes those within a micro-batch, so that its
    estimate depends on the micro-batch. TRL reads KTO's rows in the order of the file: they are shuffled here.

    Raises GateRefused if there is no row, or fewer than two for kto.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = ["prompt_ids", *(f"{side}_{part}" for side in SIDES[method] for part in ("ids", "mask"))]
    table = pq.read_table(path, columns=[*columns, *(["label"] if method == "kto" else [])])
    least = 2 if method == "kto" else 1
    if len(table) < least:
        raise GateRefused(f"align: {len(table)} pairs to train on, at least {least} needed; see what pairs dropped")
    table = table.append_column(ROW, pa.array(range(len(table))))
    if method != "kto":
        return table
    table = table.take(np.random.default_rng(seed).permutation(len(table)))
    other = [start + (i - 1) % size for start, size in _steps(len(table), batch) for i in range(size)]
    for part in ("ids", "mask"):
        table = table.append_column(f"{MISMATCHED}_{part}", table[f"completion_{part}"].take(pa.array(other)))
    return table


def longest(table: pa.Table, method: str) -> int:
    """Tokens of the longest prompt with an answer in rendered pairs."""
    import pyarrow.compute as pc

    prompt = pc.list_value_length(table["prompt_ids"])
    answers = [pc.list_value_length(table[f"{side}_ids"]) for side in SIDES[method]]
    return max(int(pc.max(pc.add(prompt, answer)).as_py()) for answer in answers)


def _steps(rows: int, batch: int) -> list[tuple[int, int]]:
    """(first row, rows) of every optimiser step of one epoch."""
    return [(start, min(batch, rows - start)) for start in range(0, rows, batch)]


def collate_pairs(examples: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """DPO's batch: input_ids, attention_mask, completion_mask, each (2 B, T) int64, chosen above rejected."""
    return _side(examples, "chosen", pad_id, "rejected")


def collate_judged(examples: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """KTO's batch: input_ids, attention_mask, completion_mask, (B, T) int64, the same of the mismatched answers with
    KL_ before the name, and label, (B,) bool.
    """
    import torch

    batch = _side(examples, "completion", pad_id)
    batch |= {f"KL_{name}": value for name, value in _side(examples, MISMATCHED, pad_id).items()}
    return {**batch, "label": torch.tensor([bool(e["label"]) for e in examples])}


def _side(examples: Sequence[Mapping[str, Any]], side: str, pad_id: int, *more: str) -> dict[str, torch.Tensor]:
    import torch

    rows = [(e["prompt_ids"], e[f"{name}_ids"], e[f"{name}_mask"]) for name in (side, *more) for e in examples]
    shape = len(rows), max(len(prompt) + len(answer) for prompt, answer, _ in rows)
    ids = torch.full(shape, pad_id, dtype=torch.long)
    attention, completion = (torch.zeros(shape, dtype=torch.long) for _ in range(2))
    for k, (prompt, answer, mask) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[k, :end] = torch.tensor([*prompt, *answer])
        attention[k, :end] = 1
        completion[k, len(prompt) : end] = torch.tensor(mask, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": attention, "completion_mask": completion}
