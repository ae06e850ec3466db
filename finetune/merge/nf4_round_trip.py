"""Reproduce the weights of 4-bit training: quantise and dequantise as bitsandbytes does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from bitsandbytes.functional import (
    QuantState,
    dequantize_4bit,
    dequantize_blockwise,
    get_4bit_type,
    quantize_4bit,
    quantize_blockwise,
)

from finetune.utils.safetensors_io import torch_dtype

SLICE_ELEMENTS = 1 << 18
BLOCK = 64  # weights per scale, the value that transformers passes to bitsandbytes


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """Storage of linear weights in training: rounded to `dtype`, then to 4 bits in blocks of 64."""

    type: Literal["nf4", "fp4"]
    double: bool
    dtype: str  # dtype in which the base was loaded before quantisation: "bfloat16"
    device: str = "cpu"  # where training quantised it

    def by_rows(self, width: int, transposed: bool) -> bool:
        """Return whether rows (out, `width`) can be processed in parts: rows are contiguous and end with a block."""
        return width % BLOCK == 0 and not transposed

    def scales(self, slices: Iterable[torch.Tensor]) -> torch.Tensor | None:
        """Return all scales of a weight, if they depend on each other, so that `apply` can process it in parts."""
        if not self.double:
            return None
        dtype = torch_dtype(self.dtype)
        highest = [s.to(self.device, dtype).reshape(-1, BLOCK).abs().amax(dim=1).float() for s in slices]
        return torch.cat(list(self._stored_scales(highest)))

    def apply(
        self, weight: torch.Tensor, transposed: bool = False, stored_scales: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Quantise and dequantise (out, in), or (in, out) if `transposed`: the values in training, in `dtype`.

        `stored_scales` are those of these rows, from `scales`; without them `weight` must be the whole weight.
        """
        value = weight.to(device=self.device, dtype=torch_dtype(self.dtype))
        value = (value.T if transposed else value).clone(memory_format=torch.contiguous_format)
        # Slices of whole blocks give the same bits as the whole in a fraction of the memory. If a row does not end with
        # a block, bitsandbytes' CPU kernel (0.50.2) assigns scales to blocks by the shape: keep the shape then.
        step = len(value) if value.shape[1] % BLOCK else max(1, SLICE_ELEMENTS // value.shape[1])
        slices = [slice(start, start + step) for start in range(0, len(value), step)]
        packed, scales = zip(*(self._quantize(value[rows]) for rows in slices), strict=True)
        if stored_scales is None:
            kept = self._stored_scales(scales)
        else:
            kept = torch.split(stored_scales, [len(s) for s in scales])
        for rows, codes, scale in zip(slices, packed, kept, strict=True):
            value[rows] = self._dequantize(codes, scale, value[rows])
        return (value.T if transposed else value).to("cpu")

    def _quantize(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return packed codes and the largest magnitude of each block (fp32)."""
        if self.type == "nf4" and values.device.type == "cpu" and values.shape[-1] % BLOCK == 0:
            return quantize_nf4(values)
        packed, state = quantize_4bit(values, blocksize=BLOCK, compress_statistics=False, quant_type=self.type)
        return packed, state.absmax

    def _stored_scales(self, scales: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return the scales after double quantisation, which rounds them to 8 bits around their mean."""
        if not self.double:
            return scales
        every = torch.cat(list(scales))
        offset = every.mean()
        rounded, state = quantize_blockwise(every - offset, blocksize=256)
        return torch.split(dequantize_blockwise(rounded, state) + offset, [len(s) for s in scales])

    def _dequantize(self, packed: torch.Tensor, scales: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        state = QuantState(scales, shape=like.shape, dtype=like.dtype, blocksize=BLOCK, quant_type=self.type)
        return dequantize_4bit(packed, state).reshape(like.shape)


def quantize_nf4(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise whole blocks bit for bit like bitsandbytes' CPU kernel (0.50.2), several times faster.

    Returns the packed codes (elements / 2, 1) uint8, the first value of a pair in the high half, and the largest
    magnitude of each block, fp32.

    The kernel finds each value among the 15 midpoints by bisection, which branches; counting midpoints does not.
    """
    code = get_4bit_type("nf4", device="cpu")
    blocks = values.reshape(-1, BLOCK).float()
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(1)).clamp_(-1, 1).reshape(-1)
    numbers = scaled.numpy()  # torch's comparison takes seven times as long
    above, count = np.empty(numbers.shape, bool), np.zeros(numbers.shape, np.uint8)
    for midpoint in ((code[:-1] + code[1:]) / 2).numpy():
        np.add(count, np.greater(numbers, midpoint, out=above).view(np.uint8), out=count)
    return torch.from_numpy(count[::2] << 4 | count[1::2]).unsqueeze(1), absmax
