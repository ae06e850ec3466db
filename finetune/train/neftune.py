"""Noise on the embeddings in training (NEFTune, Jain et al. 2023, arXiv:2310.05914).

transformers' hook scales the noise by the length of the tensor. In a packed row with several documents the noise would
be too small and depend on the packing: here it depends on each document's length.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@contextmanager
def noise(base: PreTrainedModel, alpha: float | None) -> Iterator[None]:
    """Add noise to the embeddings of `base` (a causal model) in training mode inside the block; the hook is removed
    at the end. No noise if `alpha` is None.
    """
    if alpha is None:
        yield
        return
    lengths: list[torch.Tensor] = []  # of the current batch

    def seen(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]) -> None:
        ids = named["input_ids"] if "input_ids" in named else arguments[0]
        lengths[:] = [document_lengths(ids, named.get("position_ids"), named.get("attention_mask"))]

    def add(module: torch.nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
        return output + uniform_noise(output, lengths[0], alpha) if base.training else output

    # peft calls the causal model's `forward` directly, without hooks; the decoder inside is called as a module
    hooks = [
        base.base_model.register_forward_pre_hook(seen, with_kwargs=True),
        base.get_input_embeddings().register_forward_hook(add),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def document_lengths(ids: torch.Tensor, positions: torch.Tensor | None, attention: torch.Tensor | None) -> torch.Tensor:
    """Return (B, T) fp32: the length of each token's document. Documents begin where `positions` are 0; without
    positions a row is one document whose length is given by `attention`.
    """
    import torch

    if positions is None:
        attention = torch.ones_like(ids) if attention is None else attention
        long = attention.sum(1, keepdim=True)
        return long.clamp(min=1).float().expand(ids.shape)
    document = (positions == 0).flatten().cumsum(0)
    # not bincount, which synchronises with the GPU to get the size of its result
    counts = torch.zeros(len(document) + 1, device=ids.device).index_add_(
        0, document, torch.ones_like(document).float()
    )
    return counts[document].view(positions.shape).expand(ids.shape)


def uniform_noise(output: torch.Tensor, lengths: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return (B, T, d) noise, uniform within ± alpha / √(length · d) with each token's document length."""
    import torch

    most = alpha / (lengths * output.shape[-1]).sqrt()
    return torch.empty_like(output).uniform_(-1, 1) * most.unsqueeze(-1).to(output.dtype)
