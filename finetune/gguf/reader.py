"""The weights of a GGUF file as the transformers model has them: dequantised, and their rows put back in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import torch

from finetune.errors import FinetuneError
from finetune.gguf.writer import Planned, unpermute

BLOCK_ELEMENTS = 1 << 20
ROUNDED = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}  # the kinds that have an exact expectation


class GgufWeights:
    """The tensors of one file, by their transformers names; the file is mapped, and one tensor read at a time."""

    def __init__(self, path: Path, planned: Sequence[Planned], stored: Sequence[Planned] | None = None) -> None:
        """Open `path`, which holds the tensors of `planned`, in whatever kind each; those of `stored` if it was written
        here. Raises FinetuneError if one is missing.
        """
        self.path = path
        self.written = planned if stored is None else stored
        self.planned: Mapping[str, Planned] = {p.source.name: p for p in planned}
        self._stored = {t.name: t for t in gguf.GGUFReader(path).tensors}
        if lost := sorted({p.name for p in planned} - set(self._stored)):
            raise FinetuneError(f"{path.name}: {lost[0]} is not in it ({len(lost)} tensors in all are missing)")

    def __call__(self, name: str) -> torch.Tensor:
        """The tensor of that name, fp32, in memory of its own."""
        planned = self.planned[name]
        stored = self._stored[planned.name]
        weight = torch.empty(planned.source.shape, dtype=torch.float32)
        values = weight.numpy()
        step = max(1, BLOCK_ELEMENTS // max(1, weight[:1].numel()))
        for start in range(0, len(values), step):  # gguf's own call on the whole holds it two or three times
            rows = stored.data[start : start + step]
            values[start : start + step] = gguf.quants.dequantize(rows, stored.tensor_type)
        if planned.offset:
            weight -= planned.offset
        return unpermute(weight, planned.heads) if planned.heads else weight

    def difference(self, planned: Planned) -> float:
        """The largest difference of a tensor from the merged weights; rounding to its kind (not one of blocks) is the
        only one allowed: raises FinetuneError for any other.
        """
        there, merged = self(planned.source.name), planned.source.load()
        dtype: torch.dtype = vars(torch)[ROUNDED[planned.kind]]
        largest = 0.0
        step = max(1, BLOCK_ELEMENTS // max(1, merged[:1].numel()))
        for start in range(0, len(merged), step):
            stored, source = there[start : start + step], merged[start : start + step]
            expected = source.to(dtype).float()
            if planned.offset:  # as a reader gets it back, rounded by the sum
                expected = (source.float() + planned.offset) - planned.offset
            if not torch.equal(stored, expected):
                raise _other_weights(self.path, planned)
            largest = max(largest, float((stored - source.float()).abs().max()))
        return largest

    def require_finite(self) -> None:
        """Read every tensor in blocks, which nothing else has read. Raises FinetuneError if one is not finite."""
        for one in self.written:
            if one.kind not in ROUNDED and not torch.isfinite(self(one.source.name)).all():
                raise FinetuneError(f"{self.path.name}: {one.name} holds values that are not finite")

    def require_same(self, read: Mapping[str, torch.Tensor]) -> None:
        """Raise FinetuneError unless `read`, a state that another reader made of the file, holds the same values."""
        for name, planned in self.planned.items():
            if name not in read or not torch.equal(read[name].cpu(), self(name)):
                raise _other_weights(self.path, planned)


def _other_weights(path: Path, planned: Planned) -> FinetuneError:
    return FinetuneError(f"{path.name}: {planned.name} reads back as other weights; this is a mistake in this program")
