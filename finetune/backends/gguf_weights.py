"""The weights of a GGUF file as the transformers model has them: dequantised, and their rows put back in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.backends.gguf_file import Planned, unpermute
from finetune.errors import FinetuneError

if TYPE_CHECKING:
    import torch

BLOCK_ROWS = 4096
ROUNDED = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}  # the kinds that have an exact expectation


class GgufWeights:
    """The tensors of one file, by their transformers names; the file is mapped, and one tensor read at a time."""

    def __init__(self, path: Path, planned: Sequence[Planned]) -> None:
        """Open `path`, which holds the tensors of `planned`, in whatever kind each. Raises FinetuneError otherwise."""
        import gguf

        self.path = path
        self.planned: Mapping[str, Planned] = {p.source.name: p for p in planned}
        self._stored = {t.name: t for t in gguf.GGUFReader(path).tensors}
        if lost := sorted({p.name for p in planned} - set(self._stored)):
            raise FinetuneError(f"{path.name}: {lost[0]} is not in it ({len(lost)} tensors in all are missing)")

    def __call__(self, name: str) -> torch.Tensor:
        """The tensor of that name, fp32, in memory of its own."""
        import gguf
        import numpy as np
        import torch

        planned = self.planned[name]
        stored = self._stored[planned.name]
        values = gguf.quants.dequantize(stored.data, stored.tensor_type)
        weight = torch.from_numpy(np.require(values, np.float32, ["C", "W"])).reshape(planned.source.shape)
        return unpermute(weight, planned.heads) if planned.heads else weight

    def difference(self, planned: Planned) -> float:
        """The largest difference of a tensor from the merged weights; rounding to its kind (not one of blocks) is the
        only one allowed: raises FinetuneError for any other.
        """
        import torch

        there, merged = self(planned.source.name), planned.source.load()
        dtype: torch.dtype = vars(torch)[ROUNDED[planned.kind]]
        largest = 0.0
        for start in range(0, len(merged), BLOCK_ROWS):
            found, source = there[start : start + BLOCK_ROWS], merged[start : start + BLOCK_ROWS]
            if not torch.equal(found, source.to(dtype).float()):
                raise _other_weights(self.path, planned)
            largest = max(largest, float((found - source.float()).abs().max()))
        return largest

    def require_same(self, read: Mapping[str, torch.Tensor]) -> None:
        """Raise FinetuneError unless `read`, a state that another reader made of the file, holds the same values."""
        import torch

        for name, planned in self.planned.items():
            if name not in read or not torch.equal(read[name].cpu(), self(name)):
                raise _other_weights(self.path, planned)


def _other_weights(path: Path, planned: Planned) -> FinetuneError:
    return FinetuneError(f"{path.name}: {planned.name} reads back as other weights; this is a mistake in this program")
