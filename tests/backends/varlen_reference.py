"""Variable-length attention in plain torch, of the contract of torch.nn.attention.varlen.varlen_attn, for a CPU."""

from __future__ import annotations

import inspect
import math

import torch

from finetune.backends import attention

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
    left, right = window_size
    outputs = []
    for start, stop in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        q, k, v = (t[start:stop].float().transpose(0, 1) for t in (query, key, value))  # (heads, n, D)
        k, v = (t.repeat_interleave(heads // t.shape[0], dim=0) for t in (k, v))
        behind = torch.arange(stop - start)[:, None] - torch.arange(stop - start)[None, :]
        hidden = torch.zeros_like(behind, dtype=torch.bool)
        hidden |= (behind > left) if left >= 0 else hidden
        hidden |= (-behind > right) if right >= 0 else hidden
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(hidden, -math.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs).to(query.dtype)


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


def register() -> str:
    """Make it an attention of transformers; its name."""
    attention.register(NAME, kernel())
    return NAME
