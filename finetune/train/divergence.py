"""Watchdog of a training: detect NaN, a loss far above its level, or zero gradients, and report the rows."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

ROW = "row_number"  # a column of the dataset that the collator removes
WINDOW = 50  # losses for estimating the noise
RECENT = 20  # a loss no higher than one of the last N is normal; with fewer losses the noise is unknown
LEVEL = 10  # losses whose median is the running level: few, because a long median lags behind a fast-falling loss
FIRST = 5  # the same, while the noise is not known
IN_A_ROW = 5  # steps; a spike that recovers is shorter
DEVIATIONS = 8.0  # of the noise, above the level
MOST_OVERFLOWS = 20  # in a row, under fp16
ROWS_NAMED = 8


@dataclass(frozen=True)
class Alarm:
    """Reason to stop, the first step concerned, and advice. `diverged`: later checkpoints are also unusable."""

    reason: str
    advice: str
    since: int
    diverged: bool = False
    optional: bool = True  # runtime.watchdog=false ignores it


@dataclass
class Watchdog:
    """Checks each step's metrics once, in order."""

    fp16: bool
    _level: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _high: list[float] = field(default_factory=list)
    _still: int = 0
    _overflows: int = 0

    def look(self, step: int, loss: float | None, grad_norm: float | None) -> Alarm | None:
        """Return an alarm for this step, or None."""
        alarms = self._no_number(step, loss, grad_norm), self._too_high(step, loss), self._no_gradient(step, grad_norm)
        return next((alarm for alarm in alarms if alarm), None)

    def _no_number(self, step: int, loss: float | None, grad_norm: float | None) -> Alarm | None:
        """Check for NaN and infinity. Under fp16 the GradScaler finds its scale by overflows, skipping the step and
        halving the scale, so only many in a row count.
        """
        overflow = grad_norm is not None and not math.isfinite(grad_norm)
        self._overflows = self._overflows + 1 if overflow else 0
        if loss is not None and not math.isfinite(loss):
            name, value = "loss", loss
        elif self._overflows > (MOST_OVERFLOWS if self.fp16 else 0):
            name, value = "grad_norm", float(grad_norm or 0)
        else:
            return None
        advice = "Lower train.learning_rate, or check the rows of that step"
        return Alarm(f"{name} became {value} at step {step}", advice, step, optional=False)

    def _too_high(self, step: int, loss: float | None) -> Alarm | None:
        """Check for a loss above its running level for several steps. High losses do not raise the level until they
        end.
        """
        if loss is None or not math.isfinite(loss):
            return None
        limit = self.limit()
        if loss <= limit:
            self._level.extend([*self._high, loss])
            self._high.clear()
            return None
        self._high.append(loss)
        if len(self._high) < IN_A_ROW:
            return None
        reason = (
            f"the loss is {loss:.3f} at step {step} and was above {limit:.3f} for {IN_A_ROW} steps; the median of the "
            f"steps before was {statistics.median(list(self._level)[-LEVEL:]):.3f}"
        )
        advice = (
            "Lower train.learning_rate, raise train.warmup_fraction or lower train.max_grad_norm; if this "
            "curve is intended, --set runtime.watchdog=false"
        )
        return Alarm(reason, advice, step - IN_A_ROW + 1, diverged=True)

    def limit(self) -> float:
        """Return the loss above which a step counts as high; infinite before the first step."""
        if not self._level:
            return math.inf
        losses = list(self._level)
        if len(losses) < RECENT:
            level = statistics.median(losses[-FIRST:])
            return max(level + max(level, 2.0), *losses[-FIRST:])
        level = statistics.median(losses[-LEVEL:])
        # The median absolute deviation, of the differences between neighbours: the curve's own fall is not noise.
        # 1.4826 makes it a normal distribution's standard deviation, and a difference has √2 times that of a loss.
        noise = 1.4826 / math.sqrt(2) * statistics.median(abs(b - a) for a, b in pairwise(losses))
        return max(level + max(DEVIATIONS * noise, 0.25 * level, 0.5), *losses[-RECENT:])

    def _no_gradient(self, step: int, grad_norm: float | None) -> Alarm | None:
        self._still = self._still + 1 if grad_norm == 0.0 else 0
        if self._still < IN_A_ROW:
            return None
        return Alarm(
            f"the gradient has been exactly zero for {IN_A_ROW} steps, at step {step}: nothing is learned",
            "Check these rows and render.supervise; if this is intended, --set runtime.watchdog=false",
            step - IN_A_ROW + 1,
        )


@dataclass(frozen=True)
class MicroBatch:
    """Content of one collated batch: row numbers, tokens, and cells including padding."""

    rows: tuple[int, ...]
    tokens: int
    cells: int


class Recorder:
    """Collator that records its batches. Batches are trained on in the order of collation, although one is collated
    ahead: calling `take` once per micro-batch returns that micro-batch's record.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collate = collate
        self._made: deque[MicroBatch] = deque()

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate without the ROW column."""
        batch = self.collate([{k: v for k, v in e.items() if k != ROW} for e in examples])
        rows = tuple(int(e[ROW]) for e in examples)
        padded = batch.get("attention_mask")  # none of packed rows, which have no padding
        tokens = sum(len(e["input_ids"]) for e in examples) if padded is None else int(padded.sum())
        self._made.append(MicroBatch(rows, tokens, int(batch["input_ids"].numel())))
        return batch

    def take(self) -> MicroBatch:
        """Return the record of the next micro-batch trained on."""
        return self._made.popleft()


def row_names(numbers: Sequence[int], file: Path | None) -> list[str]:
    """The ids of rows `numbers` of the data set, read from `row_ids` (lists, of packed rows), `pair_id` or `id` in a
    Parquet file; the numbers themselves without one.
    """
    if file is None:
        return [str(n) for n in numbers]
    import pyarrow.parquet as pq

    there = pq.read_schema(file).names
    column = next(name for name in ("row_ids", "pair_id", "id") if name in there)
    values = pq.read_table(file, columns=[column])[column]
    names = [values[n].as_py() for n in numbers]
    return [name for value in names for name in (value if isinstance(value, list) else [value])]


def name_rows(numbers: Sequence[int], file: Path | None) -> str:
    """Return a sentence with the first of those ids; empty without numbers."""
    if not numbers:
        return ""
    names = row_names(numbers, file)
    more = f" and {len(names) - ROWS_NAMED} more" if len(names) > ROWS_NAMED else ""
    return f"Rows of this step: {', '.join(names[:ROWS_NAMED])}{more}"
