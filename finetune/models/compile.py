"""The same result faster: compiled layers on a GPU, dequantised weights kept on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit

from finetune.models.layerwise import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetune.context import Context


KEPT_SHARE = 0.25  # of the memory that is available: training and the system need the rest


class KeptLinear4bit(Linear4bit):
    """A 4-bit linear layer that multiplies by its dequantised weight, kept from one step to the next.

    The product and its gradient are those of `Linear4bit`, which dequantises the same weight in every forward and every
    backward. The kept one is neither a parameter nor a buffer: nothing saves it, sends it round or trains it.
    """

    kept: torch.Tensor  # (out_features, in_features), in compute_dtype

    @classmethod
    def of(cls, module: Linear4bit) -> KeptLinear4bit:
        """Return the same layer over the same 4-bit weight."""
        weight: Any = module.weight
        made = cls(module.in_features, module.out_features, bias=False, device="meta", quant_type=weight.quant_type)
        made.load_from(module)
        return made

    def load_from(self, module: Linear4bit) -> None:
        """Take over weight, bias and settings of `module`."""
        self.weight, self.bias = module.weight, module.bias
        self.compute_dtype, self.compute_type_is_set = module.compute_dtype, True
        weight: Any = module.weight
        self.quant_state, self.quant_storage = weight.quant_state, module.quant_storage
        self.support_avx512bf16_for_cpu = module.support_avx512bf16_for_cpu
        self.training = module.training
        kept = dequantize_4bit(weight.data, weight.quant_state)
        self.kept = kept.reshape(module.out_features, module.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in_features) → (…, out_features), in the type of `x`."""
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return torch.nn.functional.linear(x.to(self.compute_dtype), self.kept, bias).to(x.dtype)


def keep_dequantized(base: torch.nn.Module, available: int | None) -> int:
    """Let every 4-bit layer of `base` keep its dequantised weight as well; return the bytes taken.

    Nothing is kept if it would take more than KEPT_SHARE of the `available` bytes (None: unknown), or for a layer that
    computes in another dtype than its weight was quantised from.
    """
    layers: list[tuple[str, Any]] = [
        (name, module)
        for name, module in base.named_modules()
        if isinstance(module, Linear4bit) and not isinstance(module, KeptLinear4bit)
    ]
    layers = [(n, m) for n, m in layers if m.weight.quant_state.dtype == m.compute_dtype]
    wanted = sum(m.in_features * m.out_features * m.compute_dtype.itemsize for _, m in layers)
    if available is None or wanted > KEPT_SHARE * available:
        return 0
    for name, module in layers:
        base.set_submodule(name, KeptLinear4bit.of(module))
    return wanted


def compile_layers(base: PreTrainedModel, backend: str = "inductor") -> int:
    """Have every decoder layer of `base` compiled when it first runs; how many there are.

    A layer and not the model: layers share what was compiled for one of them (the first, whose input needs no gradient,
    has a graph of its own), and nothing is fused across layers anyway.
    """
    layers = decoder_layers(base)
    for layer in layers:
        layer.compile(backend=backend)
    return len(layers)


def speed_up(base: PreTrainedModel, ctx: Context) -> None:
    """Apply the recipe's `runtime` options for speed to `base`, and report them."""
    if ctx.runtime.compile:
        ctx.say(f"train: {compile_layers(base)} layers are compiled at their first step")
