"""A 4-bit linear layer and its LoRA adapter as one operator.

peft runs base, copy, A, B, scaling and sum separately, each a pass over (tokens x width) in memory. Here B's product
accumulates into the base's result (`addmm_`), and A's part of the gradient into the input's. The idea is Unsloth's
(`kernels/fast_lora.py`). The operator is opaque to `torch.compile`, which therefore cannot keep the dequantised matrix
from forward to backward.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig
from peft.tuners.lora.bnb import Linear4bit as AdaptedLinear4bit

from finetune.models.compile import KeptLinear4bit
from finetune.utils.upstream import register_lora_layers

if TYPE_CHECKING:

    class _Context(torch.autograd.function.FunctionCtx):
        """The context of an autograd function, with what `_keep` leaves for `_backward`."""

        block: int
        nested: int
        kind: str
        scaling: float
        saved_tensors: tuple[torch.Tensor, ...]
        needs_input_grad: tuple[bool, ...]


def wanted(asked: str, precision: str, environment: Mapping[str, str], *, worth: bool) -> bool:
    """Return whether adapters are fused: `asked` is runtime.fused_adapters; auto fuses in 16 bits if it is `worth` it.

    Never under FSDP, which shards the matrices.
    """
    if asked != "auto":
        return asked == "on"
    shared_out = environment.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    return worth and precision != "fp32" and not shared_out


def use(config: LoraConfig) -> None:
    """Make peft build `FusedLinear4bit` for 4-bit layers, through its interface for custom layers."""
    register_lora_layers(config, {Linear4bit: FusedLinear4bit})


class FusedLinear4bit(AdaptedLinear4bit):
    """peft's adapted 4-bit layer, as one operator if it has a single plain LoRA adapter; else peft's own forward."""

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """(…, in_features) → (…, out_features), in the dtype of `x`."""
        base: Any = self.get_base_layer()
        names = [n for n in self.active_adapters if n in self.lora_A]
        plain = len(names) == 1 and not (self.disable_adapters or self.merged or self.lora_variant or args or kwargs)
        if not plain or x.dtype != base.compute_dtype or not x.numel():
            result: torch.Tensor = super().forward(x, *args, **kwargs)
            return result
        (name,) = names
        dropout: Any = self.lora_dropout[name]
        dropped = dropout(x) if self.training and isinstance(dropout, torch.nn.Dropout) else None
        bias = None if base.bias is None else base.bias.to(x.dtype)
        a, b = (factors[name].weight.to(x.dtype) for factors in (self.lora_A, self.lora_B))
        out, _ = adapted_linear(x, dropped, *_stored(base), bias, a, b, float(self.scaling[name]))
        return out


def _stored(base: Linear4bit) -> tuple[torch.Tensor, list[torch.Tensor], int, int, str]:
    """Return a matrix as arguments of an operator: weights, scales, block sizes and the name of the 4-bit type."""
    if isinstance(base, KeptLinear4bit):
        return base.kept, [], 0, 0, ""
    state = cast("Params4bit", base.weight).quant_state
    scales, nested = [state.absmax, state.code], 0
    if state.nested:
        scales += [state.offset, state.state2.absmax, state.state2.code]
        nested = state.state2.blocksize
    return base.weight, scales, state.blocksize, nested, state.quant_type


def _matrix(
    weight: torch.Tensor,
    scales: list[torch.Tensor],
    block: int,
    nested: int,
    kind: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Dequantise the result of `_stored` to (out_features, in_features) in `dtype`."""
    if not scales:
        return weight
    absmax, code, *second = scales
    offset, state2 = None, None
    if second:
        offset, absmax2, code2 = second
        state2 = QuantState(absmax2, code=code2, blocksize=nested, dtype=torch.float32)
    state = QuantState(absmax, torch.Size(shape), code, block, kind, dtype, offset, state2)
    return dequantize_4bit(weight, state)


@torch.library.custom_op("finetune::adapted_linear", mutates_args=())
def adapted_linear(
    x: torch.Tensor,
    dropped: torch.Tensor | None,
    weight: torch.Tensor,
    scales: list[torch.Tensor],
    block: int,
    nested: int,
    kind: str,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x·Wᵀ + bias + scaling · (x·Aᵀ)·Bᵀ, (…, out), and x·Aᵀ, (T, r), for the backward.

    x (…, in), `dropped` is x after dropout (None: no dropout), W from `_stored`, A (r, in), B (out, r).
    """
    flat = x.flatten(0, -2)
    with torch.autocast(x.device.type, enabled=False):  # everything is in the dtype of `x`
        matrix = _matrix(weight, scales, block, nested, kind, (b.shape[0], a.shape[1]), x.dtype)
        out = torch.nn.functional.linear(flat, matrix, bias)
        del matrix
        low = (flat if dropped is None else dropped.flatten(0, -2)) @ a.T
        out.addmm_(low, b.T, alpha=scaling)
    return out.view(*x.shape[:-1], b.shape[0]), low


@adapted_linear.register_fake
def _(x, dropped, weight, scales, block, nested, kind, bias, a, b, scaling):  # noqa: ANN001, ANN202
    return x.new_empty(*x.shape[:-1], b.shape[0]), x.new_empty(x.numel() // x.shape[-1], a.shape[0])


@torch.library.custom_op("finetune::adapted_linear_backward", mutates_args=())
def adapted_linear_backward(
    gradient: torch.Tensor,
    weight: torch.Tensor,
    scales: list[torch.Tensor],
    block: int,
    nested: int,
    kind: str,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    of_input: bool,
    apart: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of x (…, in), of `dropped` (…, in) if it is kept `apart`, and of x·Aᵀ (T, r).

    `gradient` is (…, out). Gradients that are not needed are empty. Without dropout A's part of x's gradient is added
    to the base's.
    """
    flat, shape = gradient.flatten(0, -2), (*gradient.shape[:-1], a.shape[1])
    given, dropped = gradient.new_empty(0), gradient.new_empty(0)
    with torch.autocast(gradient.device.type, enabled=False):
        low = (flat @ b).mul_(scaling)
        if of_input:
            given = flat @ _matrix(weight, scales, block, nested, kind, (b.shape[0], a.shape[1]), gradient.dtype)
            if not apart:
                given.addmm_(low, a)
            given = given.view(shape)
        if apart:
            dropped = (low @ a).view(shape)
    return given, dropped, low


@adapted_linear_backward.register_fake
def _(gradient, weight, scales, block, nested, kind, a, b, scaling, of_input, apart):  # noqa: ANN001, ANN202
    shape, none = (*gradient.shape[:-1], a.shape[1]), (0,)
    made = [gradient.new_empty(shape if asked else none) for asked in (of_input, apart)]
    return *made, gradient.new_empty(gradient.numel() // gradient.shape[-1], a.shape[0])


def _keep(ctx: _Context, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, dropped, weight, scales, block, nested, kind, _, a, b, scaling = inputs
    ctx.set_materialize_grads(False)  # x·Aᵀ has no gradient: do not allocate zeros
    ctx.save_for_backward(x if dropped is None else dropped, output[1], weight, a, b, *scales)
    ctx.block, ctx.nested, ctx.kind, ctx.scaling = block, nested, kind, scaling


def _backward(ctx: _Context, gradient: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
    given, low, weight, a, b, *scales = ctx.saved_tensors
    gradient = gradient.contiguous()
    of_x, of_dropped, of_low = adapted_linear_backward(
        gradient,
        weight,
        scales,
        ctx.block,
        ctx.nested,
        ctx.kind,
        a,
        b,
        ctx.scaling,
        *ctx.needs_input_grad[:2],
    )
    of_a = of_low.T @ given.flatten(0, -2)
    of_b = (gradient.flatten(0, -2).T @ low).mul_(ctx.scaling)
    given_back = (g if needed else None for g, needed in zip((of_x, of_dropped), ctx.needs_input_grad, strict=False))
    frozen = None, [None] * len(scales), None, None, None, None  # weight to bias
    return *given_back, *frozen, of_a, of_b, None


adapted_linear.register_autograd(_backward, setup_context=_keep)
