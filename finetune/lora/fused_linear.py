"""4-bit linear layers and their LoRA adapters as one operator: one layer, or several that receive the same tensor.

peft runs base, copy, A, B, scaling and sum separately, each a pass over (tokens x width) in memory. Here B's product
accumulates into the base's result (`addmm_`), and A's part of the gradient into the input's. The idea is Unsloth's
(`kernels/fast_lora.py`). Several layers (shared_inputs.py) share one dequantisation, one product with all A matrices
and one gradient of the input. The operator is opaque to `torch.compile`, which therefore cannot keep the dequantised
matrices from forward to backward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig
from peft.tuners.lora.bnb import Linear4bit as AdaptedLinear4bit

from finetune.models.compile import KeptLinear4bit
from finetune.utils.upstream import register_lora_layers

if TYPE_CHECKING:
    # matrices of the operator: weights (one packed tensor, or each dequantised), scales, block sizes, the 4-bit type
    Stored = tuple[list[torch.Tensor], list[torch.Tensor], int, int, str]

    class _Context(torch.autograd.function.FunctionCtx):
        """The context of an autograd function, with what `_keep` leaves for `_backward`."""

        counts: list[int]
        settings: tuple[int, int, str]
        scalings: list[float]
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
        factors = None if args or kwargs else factors_of(self, x)
        if factors is None:
            result: torch.Tensor = super().forward(x, *args, **kwargs)
            return result
        a, b, scaling, dropout = factors
        base: Any = self.get_base_layer()
        dropped = None if dropout is None else dropout(x)
        return adapted_linears(x, dropped, *stored_of(base), biases_of([base], x), [a], [b], [scaling])[0]


Factors = tuple[torch.Tensor, torch.Tensor, float, torch.nn.Module | None]


def factors_of(layer: torch.nn.Module, x: torch.Tensor) -> Factors | None:
    """A (r, in), B (out, r) in the dtype of `x`, scaling and active dropout of a layer; r is 0 without an adapter.

    None where the layer computes something else than x·Wᵀ + scaling · (x·Aᵀ)·Bᵀ, or in another dtype.
    """
    base = base_of(layer)
    if x.dtype != base.compute_dtype or not x.numel():
        return None
    if not isinstance(layer, AdaptedLinear4bit):
        return x.new_empty(0, base.in_features), x.new_empty(base.out_features, 0), 0.0, None
    names = [n for n in layer.active_adapters if n in layer.lora_A]
    if len(names) != 1 or layer.disable_adapters or layer.merged or layer.lora_variant:
        return None
    (name,) = names
    first, second, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if second.bias is not None:
        return None
    dropping = dropout if layer.training and isinstance(dropout, torch.nn.Dropout) else None
    return first.weight.to(x.dtype), second.weight.to(x.dtype), float(layer.scaling[name]), dropping


def biases_of(bases: Sequence[Any], x: torch.Tensor) -> list[torch.Tensor]:
    """(out,) of each layer in the dtype of `x`, (0,) without one."""
    return [x.new_empty(0) if base.bias is None else base.bias.to(x.dtype) for base in bases]


def base_of(layer: torch.nn.Module) -> Any:  # noqa: ANN401 - Linear4bit
    """The 4-bit layer below an adapter, or `layer` itself."""
    return layer.get_base_layer() if isinstance(layer, AdaptedLinear4bit) else layer


# --- the operator -----------------------------------------------------------------------------------------------------


def stored_of(base: Any) -> Stored:  # noqa: ANN401 - Linear4bit
    """The matrix of one layer as arguments of the operator."""
    if isinstance(base, KeptLinear4bit):
        return [base.kept], [], 0, 0, ""
    state = base.weight.quant_state
    if not state.nested:
        return packed(base.weight, state.absmax, state)
    return packed(base.weight, state.absmax, state, state.offset.reshape(1), state.state2.absmax)


def packed(weight: torch.Tensor, absmax: torch.Tensor, state: QuantState, *second: torch.Tensor) -> Stored:
    """`second` of nested scales: the offset of each layer (N,), and the scales of scales."""
    if not second:
        return [weight], [absmax, state.code], state.blocksize, 0, state.quant_type
    scales = [absmax, state.code, *second, state.state2.code]
    return [weight], scales, state.blocksize, state.state2.blocksize, state.quant_type


def _matrices(
    stored: Stored, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], dtype: torch.dtype
) -> Sequence[torch.Tensor]:
    """Dequantise to (out, in) of each layer, in `dtype`, at once."""
    weights, scales, block, nested, kind = stored
    if not scales:
        return weights
    outs, inner = [len(second) for second in b], a[0].shape[1]
    absmax, code, *second = scales
    if second:
        offsets, absmax2, code2 = second
        absmax = dequantize_blockwise(absmax, QuantState(absmax2, code=code2, blocksize=nested, dtype=torch.float32))
        for part, offset in zip(absmax.split([-(-n * inner // block) for n in outs]), offsets, strict=True):
            part += offset
    state = QuantState(absmax, torch.Size((sum(outs), inner)), code, block, kind, dtype)
    return dequantize_4bit(weights[0], state).split(outs)


def _together(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(list(matrices))


@torch.library.custom_op("finetune::adapted_linears", mutates_args=())
def adapted_linears(
    x: torch.Tensor,
    dropped: torch.Tensor | None,
    weights: list[torch.Tensor],
    scales: list[torch.Tensor],
    block: int,
    nested: int,
    kind: str,
    biases: list[torch.Tensor],
    a: list[torch.Tensor],
    b: list[torch.Tensor],
    scalings: list[float],
) -> list[torch.Tensor]:
    """Return x·Wᵀ + bias + scaling · (x·Aᵀ)·Bᵀ, (…, out), of each layer, and at last x·Aᵀ of all, (T, Σr).

    x (…, in), `dropped` is x after dropout (None: no dropout), W from `stored_of`, A (r, in), B (out, r), bias (out,),
    or (0,) for none.
    """
    flat = x.flatten(0, -2)
    outs = []
    with torch.autocast(x.device.type, enabled=False):  # everything is in the dtype of `x`
        low = (flat if dropped is None else dropped.flatten(0, -2)) @ _together(a).T
        lows = low.split([len(first) for first in a], 1)
        matrices = _matrices((weights, scales, block, nested, kind), a, b, x.dtype)
        for matrix, bias, part, second, scaling in zip(matrices, biases, lows, b, scalings, strict=True):
            out = torch.nn.functional.linear(flat, matrix, bias if len(bias) else None)
            outs.append(out.addmm_(part, second.T, alpha=scaling).view(*x.shape[:-1], len(second)))
    return [*outs, low]


@adapted_linears.register_fake
def _(x, dropped, weights, scales, block, nested, kind, biases, a, b, scalings):  # noqa: ANN001, ANN202
    outs = [x.new_empty(*x.shape[:-1], len(second)) for second in b]
    return [*outs, x.new_empty(x.numel() // x.shape[-1], sum(len(first) for first in a))]


@torch.library.custom_op("finetune::adapted_linears_backward", mutates_args=())
def adapted_linears_backward(
    gradients: list[torch.Tensor],
    weights: list[torch.Tensor],
    scales: list[torch.Tensor],
    block: int,
    nested: int,
    kind: str,
    a: list[torch.Tensor],
    b: list[torch.Tensor],
    scalings: list[float],
    of_input: bool,
    apart: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of x (…, in), of `dropped` (…, in) if it is kept `apart`, and of x·Aᵀ (T, Σr).

    `gradients` are (…, out). Gradients that are not needed are empty. Without dropout A's part of x's gradient is added
    to the base's.
    """
    first = gradients[0]
    flats, shape = [g.flatten(0, -2) for g in gradients], (*first.shape[:-1], a[0].shape[1])
    given, dropped = first.new_empty(0), first.new_empty(0)
    with torch.autocast(first.device.type, enabled=False):
        lows = [(g @ second).mul_(s) for g, second, s in zip(flats, b, scalings, strict=True)]
        low = lows[0] if len(lows) == 1 else torch.cat(lows, 1)
        if of_input:
            matrices = _matrices((weights, scales, block, nested, kind), a, b, first.dtype)
            given = flats[0] @ matrices[0]
            for flat, matrix in zip(flats[1:], matrices[1:], strict=True):
                given.addmm_(flat, matrix)
            if not apart:
                given.addmm_(low, _together(a))
            given = given.view(shape)
        if apart:
            dropped = (low @ _together(a)).view(shape)
    return given, dropped, low


@adapted_linears_backward.register_fake
def _(gradients, weights, scales, block, nested, kind, a, b, scalings, of_input, apart):  # noqa: ANN001, ANN202
    first = gradients[0]
    shape, none = (*first.shape[:-1], a[0].shape[1]), (0,)
    made = [first.new_empty(shape if asked else none) for asked in (of_input, apart)]
    return *made, first.new_empty(first.numel() // first.shape[-1], sum(len(m) for m in a))


def _keep(ctx: _Context, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    x, dropped, weights, scales, block, nested, kind, _, a, b, scalings = inputs
    ctx.set_materialize_grads(False)  # x·Aᵀ has no gradient: do not allocate zeros
    ctx.save_for_backward(x if dropped is None else dropped, output[-1], *weights, *scales, *a, *b)
    ctx.counts, ctx.settings, ctx.scalings = [len(weights), len(scales), len(a)], (block, nested, kind), scalings


def _backward(ctx: _Context, gradients: list[torch.Tensor | None]) -> tuple[Any, ...]:
    given, low, *more = ctx.saved_tensors
    n, m, k = ctx.counts
    weights, scales, a, b = more[:n], more[n : n + m], more[n + m : n + m + k], more[n + m + k :]
    whole = [
        given.new_zeros(*given.shape[:-1], len(second)) if g is None else g.contiguous()
        for g, second in zip(gradients[:-1], b, strict=True)
    ]
    of_x, of_dropped, of_low = adapted_linears_backward(
        whole, weights, scales, *ctx.settings, a, b, ctx.scalings, *ctx.needs_input_grad[:2]
    )
    ranks = [len(first) for first in a]
    of_a = (of_low.T @ given.flatten(0, -2)).split(ranks)
    pairs = zip(whole, low.split(ranks, 1), ctx.scalings, strict=True)
    of_b = [(g.flatten(0, -2).T @ part).mul_(s) for g, part, s in pairs]
    given_back = (g if needed else None for g, needed in zip((of_x, of_dropped), ctx.needs_input_grad, strict=False))
    frozen = [None] * n, [None] * m, None, None, None, [None] * k  # weights to biases
    return *given_back, *frozen, list(of_a), of_b, None


adapted_linears.register_autograd(_backward, setup_context=_keep)
