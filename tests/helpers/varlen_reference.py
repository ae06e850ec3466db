"""Variable-length attention in plain torch, of the contract of torch.nn.attention.varlen.varlen_attn, for a CPU."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch

from finetune.models import attention

NAME = "varlen_reference"


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Query (T, H, D), key and value (T, K, D): each document by itself, in fp32, each query head with its group.

    Raises ValueError for what the kernel would take without a word, and read past a document for.
    """
    total, heads, size = query.shape
    if not enable_gqa and key.shape[1] != heads:
        raise ValueError("other numbers of heads without enable_gqa")
    for bounds, longest in ((cu_seq_q, max_q), (cu_seq_k, max_k)):
        if bounds.dtype != torch.int32 or int(bounds[0]) != 0 or int(bounds[-1]) != total:
            raise ValueError(f"bounds {bounds.tolist()} of {bounds.dtype} for {total} tokens")
        if int(bounds.diff().max()) > longest:
            raise ValueError(f"a document is longer than {longest}")
    scale = size**-0.5 if scale is None else scale
    outputs = []
    for (q, k, v), hidden, _ in _documents(query, key, value, cu_seq_q, window_size):
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(hidden, -math.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs).to(query.dtype)


def _documents(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, window: tuple[int, int]
) -> Iterator[tuple[list[torch.Tensor], torch.Tensor, slice]]:
    """Of each document: q, k, v (heads, n, D) in fp32, which of its tokens do not see which (n, n), where it lies."""
    left, right = window
    for start, stop in pairwise(bounds.tolist()):
        parts = [t[start:stop].float().transpose(0, 1) for t in (query, key, value)]
        parts = [t.repeat_interleave(query.shape[1] // t.shape[0], dim=0) for t in parts]
        behind = torch.arange(stop - start)[:, None] - torch.arange(stop - start)[None, :]
        hidden = torch.zeros_like(behind, dtype=torch.bool)
        hidden |= (behind > left) if left >= 0 else hidden
        hidden |= (-behind > right) if right >= 0 else hidden
        yield parts, hidden, slice(start, stop)


def of_torch_2_10(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
) -> torch.Tensor:
    """The same as torch 2.10 has it: no scale, no window, as many key heads as query heads."""
    window = (-1, 0) if is_causal else (-1, -1)
    return varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window)


def of_torch_2_11(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """The same as torch 2.11 has it: without enable_gqa."""
    return varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


VERSIONS = {"2.10": of_torch_2_10, "2.11": of_torch_2_11, "2.12": varlen_attn}


def kernel(version: str = "2.12") -> attention.Kernel:
    """The reference as `attention` adapts torch's function of that version."""
    function = VERSIONS[version]
    return attention.adapted(function, inspect.signature(function).parameters)


def _sides(window: int | None) -> tuple[int, int]:
    return (-1 if window is None else window - 1, 0)


@torch.library.custom_op("finetune_tests::varlen", mutates_args=())
def _operator(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    return varlen_attn(
        query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=_sides(window), enable_gqa=True
    )


@_operator.register_fake
def _(query: torch.Tensor, *rest: object) -> torch.Tensor:
    return torch.empty_like(query)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.rest = inputs[4:]


@torch.library.custom_op("finetune_tests::varlen_gradients", mutates_args=())
def _gradients(
    out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gradients = [torch.zeros_like(t) for t in (query, key, value)]
    for (q, k, v), hidden, place in _documents(query, key, value, bounds, _sides(window)):
        share = (q @ k.transpose(1, 2) * scale).masked_fill(hidden, -math.inf).softmax(-1)  # (heads, n, n)
        given = out[place].float().transpose(0, 1)
        of_share = given @ v.transpose(1, 2)
        of_scores = share * (of_share - (of_share * share).sum(-1, keepdim=True)) * scale
        found = (of_scores @ k, of_scores.transpose(1, 2) @ q, share.transpose(1, 2) @ given)
        for whole, part in zip(gradients, found, strict=True):
            grouped = part.unflatten(0, (whole.shape[1], -1)).sum(1)  # query heads of one key head
            whole[place] = grouped.transpose(0, 1).to(whole.dtype)
    first, second, third = gradients
    return first, second, third


@_gradients.register_fake
def _(out: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty_like(t) for t in inputs[:3])


_operator.register_autograd(
    lambda ctx, out: (*_gradients(out, *ctx.saved_tensors, *ctx.rest), *[None] * 4), setup_context=_keep
)


def register(*, as_operator: bool = False) -> str:
    """Make it an attention of transformers; its name. As an operator torch.compile looks at it from outside, as it does
    at torch's own.
    """
    attention.register(NAME, _operator if as_operator else kernel())
    return NAME
