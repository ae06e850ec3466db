"""The same result faster: compiled layers on a GPU, dequantised weights kept on a CPU."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit

from finetune.models.layerwise import decoder_layers
from finetune.utils.format import first_line
from finetune.utils.upstream import prepare_compiling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetune.context import Context


GRAPHS = 5  # of a layer: of the first and of the others, for one length and for any, and one to spare
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


def compile_layers(base: PreTrainedModel, say: Callable[[str], None], backend: str = "inductor") -> int:
    """Have every decoder layer of `base` compiled when it first runs; how many there are.

    A layer and not the model: layers share what was compiled for one of them (the first, whose input needs no gradient,
    has a graph of its own), and nothing is fused across layers anyway. What needs no gradient (proofs, held-out rows)
    runs as it is: it would take graphs of its own. Where compiling fails, `say` is told once and
    all layers run as they are; a length beyond the GRAPHS graphs of a layer runs uncompiled, too.
    """
    errors = prepare_compiling(GRAPHS)
    layers = decoder_layers(base)
    plainly = [layer.forward for layer in layers]

    def replace(number: int) -> None:
        compiled = torch.compile(plainly[number], backend=backend)

        @functools.wraps(plainly[number])
        def forward(*inputs: object, **named: object) -> object:
            if not (torch.is_grad_enabled() and is_compiled(base)):
                return plainly[number](*inputs, **named)
            try:
                return compiled(*inputs, **named)
            except errors as error:
                for layer in layers:
                    vars(layer).pop("forward", None)
                cause = getattr(error, "inner_exception", None) or error
                say(f"layers run uncompiled, for compiling failed: {first_line(cause)}")
            return plainly[number](*inputs, **named)

        vars(layers[number])["forward"] = forward

    for number in range(len(layers)):
        replace(number)
    return len(layers)


def is_compiled(base: PreTrainedModel) -> bool:
    """Return whether the layers of `base` are compiled, or will be when they first run."""
    return "forward" in vars(decoder_layers(base)[0])


def speed_up(base: PreTrainedModel, ctx: Context, wanted: bool, stage: str = "train") -> None:
    """Have the layers of `base` compiled if it is `wanted`; what is compiled is kept in scratch for the next start."""
    if wanted:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ctx.scratch.absolute() / "compiled"))
        count = compile_layers(base, lambda line: ctx.say(f"{stage}: {line}"))
        ctx.say(f"{stage}: {count} layers are compiled at their first step")
