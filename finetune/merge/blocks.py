"""Compute the tensors of a merged model in blocks of rows: read, change, round, in a few threads.

The delta is computed and added in fp32, and the sum is rounded once. Each thread processes its own blocks with one
torch thread: the operations are short, and threads sharing one operation wait for each other on a busy machine. So the
bits do not depend on the number of threads either.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, pairwise
from math import prod

import torch

from finetune.errors import FinetuneError
from finetune.merge.deltas import Edit
from finetune.merge.plan import MergePlan, Target
from finetune.utils.runtime import in_order, single_thread
from finetune.utils.safetensors_io import ITEM_BYTES, torch_dtype

BLOCK_ELEMENTS = 1 << 20  # 4 MB in fp32
MOST_THREADS = 9
AHEAD = 3  # blocks read, computed or waiting to be written, in addition to one per thread


def merged_pieces(
    plan: MergePlan, names: Iterable[str], device: str = "cpu", *, once: bool = True
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the named tensors of the merged model, each as pieces of whole rows, on the CPU, in output dtype.

    A piece's memory is reused once the next piece is requested. The products are computed on `device`, on which no
    other bits depend. `once`: the base is not read again soon, so the page cache need not keep it.
    Raises FinetuneError if a value is not finite (a broken adapter, or fp16 too narrow for the base).
    """
    threads = min(torch.get_num_threads() + 1, MOST_THREADS)
    slots = [_Slot() for _ in range(threads + AHEAD)]

    def blocks() -> Iterator[_Block]:
        """Yield blocks; a source's factors are loaded while the blocks of the previous one are computed."""
        count = 0
        sources = (_Source(plan.targets[name], device, once) for name in names)
        for source, following in pairwise(chain(sources, (None,))):
            assert source is not None  # noqa: S101
            todo = [] if following is None else [(following, None)]
            for owner, rows in (*todo, *((source, rows) for rows in source.blocks())):
                yield _Block(owner, rows, slots[count % len(slots)])
                count += 1

    with single_thread():
        for made in in_order(_Block.make, blocks(), threads, len(slots)):
            if made is not None:
                yield made


def merged_tensor(plan: MergePlan, name: str) -> torch.Tensor:
    """Return one tensor of the merged model by its name in the model, on the CPU, in its output dtype, as a copy.

    Conversions that transformers does on load are applied.

    Raises FinetuneError as `merged_pieces` does.
    """
    if name in plan.stored.made_of:
        return plan.stored.convert(name, partial(_whole, plan))
    return _whole(plan, plan.stored.in_file(name))


def _whole(plan: MergePlan, name: str) -> torch.Tensor:
    """Return one tensor, by its name in the files."""
    target = plan.targets[name]
    source, slot = _Source(target), _Slot()
    value = torch.empty(target.shape.shape, dtype=torch_dtype(target.dtype))
    for rows in source.blocks():
        made = _Block(source, rows, slot).make()
        assert made is not None  # noqa: S101
        (value[rows] if value.dim() else value).copy_(made[1])
    return value


class _Slot:
    """Memory for one block, reused for the next: new pages would cost as much time as the arithmetic."""

    def __init__(self) -> None:
        self._raw = torch.empty(0, dtype=torch.uint8)
        self._part = torch.empty(0, dtype=torch.float32)

    def raw(self, size: int) -> torch.Tensor:
        """Return the buffer for bytes read, later for bytes to be written: (size,) uint8."""
        if len(self._raw) < size:
            self._raw = torch.empty(size, dtype=torch.uint8)
        return self._raw[:size]

    def part(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the buffer for values being changed, fp32."""
        if len(self._part) < prod(shape):
            self._part = torch.empty(prod(shape), dtype=torch.float32)
        return self._part[: prod(shape)].view(shape)


@dataclass
class _Source:
    """A tensor to be computed and the data of its changes, loaded once by the first thread that needs it."""

    target: Target
    device: str = "cpu"
    once: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _edits: list[Edit] | None = None
    _scales: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the base; a scalar counts as one row."""
        return self.target.base.shape or (1,)

    def blocks(self) -> Iterator[slice]:
        """Yield row ranges computed together; a tensor without elements is one empty block."""
        target, count = self.target, self.shape[0]
        trip = target.round_trip
        by_rows = all(c.by_rows for c in target.changes)
        if trip is not None:
            by_rows = by_rows and trip.by_rows(self.shape[-1], target.transposed)
        step = max(1, BLOCK_ELEMENTS // max(1, prod(self.shape[1:]))) if by_rows else max(1, count)
        for start in range(0, max(1, count), step):
            yield slice(start, min(start + step, count))

    def ready(self) -> list[Edit]:
        """Load the adapter's tensors, and the scales of a base with double quantisation."""
        with self._lock:
            if self._edits is None:
                trip = self.target.round_trip
                if trip is not None and trip.double and trip.by_rows(self.shape[-1], self.target.transposed):
                    slot = _Slot()
                    self._scales = trip.scales(self.read(rows, slot, once=False)[1] for rows in self.blocks())
                self._edits = [change.loaded(self.device) for change in self.target.changes]
        return self._edits

    def read(self, rows: slice, slot: _Slot, *, once: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Read these rows into `slot`; return the bytes and a view of them in the tensor's dtype."""
        base = self.target.base
        row_bytes = prod(self.shape[1:]) * ITEM_BYTES[base.dtype]
        raw = slot.raw((rows.stop - rows.start) * row_bytes)
        base.read_into(raw, rows.start * row_bytes, once=once)
        return raw, raw.view(torch_dtype(base.dtype)).view(rows.stop - rows.start, *self.shape[1:])

    def through_4_bits(self, value: torch.Tensor, rows: slice) -> torch.Tensor:
        """Return these rows quantised and dequantised, as in training."""
        trip = self.target.round_trip
        if trip is None:
            return value
        if self._scales is None:
            return trip.apply(value, self.target.transposed)
        width = value.shape[-1] // 64
        return trip.apply(value, stored_scales=self._scales[rows.start * width : rows.stop * width])


@dataclass(frozen=True)
class _Block:
    """Some rows of a tensor to be computed; without rows, a request to load the data of its changes."""

    source: _Source
    rows: slice | None
    slot: _Slot

    def make(self) -> tuple[str, torch.Tensor] | None:
        """Return the tensor's name and the merged rows, in the slot's memory."""
        source, target, rows = self.source, self.source.target, self.rows
        edits = source.ready()
        if rows is None:
            return None
        raw, value = source.read(rows, self.slot, once=source.once)
        dtype = torch_dtype(target.dtype)
        if edits or target.round_trip or value.dtype != dtype:
            part = self.slot.part(tuple(value.shape)).copy_(source.through_4_bits(value, rows))
            moved = part.to(source.device)
            with torch.no_grad():
                for edit in edits:
                    edit(moved, rows)
            if dtype == torch.float32:
                value = part if moved is part else part.copy_(moved)
            else:  # the output is no wider than the input, unless it is fp32
                value = raw[: part.numel() * dtype.itemsize].view(dtype).view(part.shape).copy_(moved)
        if value.is_floating_point() and not _finite(value):
            raise FinetuneError(
                f"{target.name} is not finite in the merged model ({target.dtype}); with merge.dtype float16 use "
                "bfloat16, otherwise the adapter or the base is damaged"
            )
        return target.name, value.view(target.base.shape) if not target.base.shape else value


def _finite(value: torch.Tensor) -> bool:
    """Return whether every element is finite: a finite sum proves it, several times faster than testing each."""
    return bool(torch.isfinite(value.sum(dtype=torch.float32)) or torch.isfinite(value).all())
