"""Micro-batch size, gradient accumulation and number of optimiser steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import InputError
from finetune.estimate.choice import PADDED_ROWS
from finetune.recipe import Train

if TYPE_CHECKING:
    import pyarrow as pa

OFFLOAD_ON_CPU = (
    "runtime.checkpointing: offload moves a GPU's activations to RAM, but this training is on a CPU; use full"
)


def batch_shape(
    batch_rows: int, micro: int | str, world: int, packed: bool, field: str = "train.batch_rows"
) -> tuple[int, int]:
    """Micro-batch rows and accumulation steps, so that every optimiser step sees `batch_rows` rows on any machine.

    Raises InputError with the process counts that divide the batch.
    """
    if batch_rows % world:
        fits = [n for n in range(1, batch_rows + 1) if batch_rows % n == 0]
        raise InputError(
            f"{field} {batch_rows} cannot be shared by {world} processes; use {', '.join(map(str, fits))} "
            f"processes, or a {field.rpartition('.')[2]} that {world} divides"
        )
    per_process = batch_rows // world
    if micro == "auto":
        # Packed rows are flattened into one sequence; under SDPA that is a dense (B·L)² mask, so one row at a time.
        most = 1 if packed else PADDED_ROWS
        micro = max(n for n in range(1, most + 1) if per_process % n == 0)
    micro = int(micro)
    if per_process % micro:
        raise InputError(f"runtime.micro_batch_rows {micro} does not divide the {per_process} rows of each process")
    return micro, per_process // micro


def total_steps(rows: int, train: Train) -> int:
    """Return the optimiser steps, including the last, smaller batch of an epoch."""
    if train.max_steps is not None:
        return train.max_steps
    return max(1, math.ceil(train.epochs * math.ceil(rows / train.batch_rows)))


@dataclass(frozen=True)
class Sizing:
    """A batch size for a number of rows; `packed` False: turn pack off."""

    batch_rows: int
    epochs: int
    packed: bool
    steps: int


WANTED_STEPS = 60  # fewest optimiser steps for a schedule with a warm-up
MOST_EPOCHS = 3  # more passes over the same rows mostly memorise them


def size_to_rows(rows: int, bins: int) -> Sizing:
    """Return the largest batch size, then the fewest epochs, that give WANTED_STEPS optimiser steps or more.

    Packed rows (`bins` of them, filled by `rows` documents) are tried first, then unpacked rows. If neither gives
    enough steps in MOST_EPOCHS epochs, the result is one unpacked row a step and MOST_EPOCHS epochs.
    """
    bins, rows = max(1, min(bins, rows)), max(1, rows)
    for units, packed, batches in ((bins, True, (16, 8, 4)), (rows, False, (16, 8, 4, 2, 1))):
        for batch in batches:
            for epochs in range(1, MOST_EPOCHS + 1):
                if (steps := epochs * math.ceil(units / batch)) >= WANTED_STEPS:
                    return Sizing(batch, epochs, packed, steps)
    return Sizing(1, MOST_EPOCHS, False, MOST_EPOCHS * rows)


def sizing_advice(rows: int, bins: int) -> str:
    """Return recipe fields that make a training on these rows long enough."""
    sizing = size_to_rows(rows, bins)
    pack = "" if sizing.packed else "pack: null, "
    return f"set {pack}train.batch_rows: {sizing.batch_rows} and train.epochs: {sizing.epochs} ({sizing.steps} steps)"


def longest_row(rows: Path | pa.Table) -> int:
    """Return the tokens of the longest row of a packed file, or of a table with input_ids."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(rows, columns=["input_ids"]) if isinstance(rows, Path) else rows
    return int(pc.max(pc.list_value_length(table["input_ids"])).as_py() or 1)


def count_rows(rows: Path | pa.Table) -> int:
    """Return the rows of a packed file, or of a table."""
    import pyarrow.parquet as pq

    return int(pq.read_metadata(rows).num_rows if isinstance(rows, Path) else rows.num_rows)
