"""Noise on the embeddings while training (NEFTune, Jain et al. 2023, arXiv:2310.05914).

transformers' own hook scales the noise by the length of the tensor. A packed row holds several documents, whose noise
would then be too small and change with what they are packed with: here each document's own length counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@contextmanager
def noise(base: Any, alpha: float | None) -> Iterator[None]:  # noqa: ANN401 - PreTrainedModel
    """Within the block the embeddings of `base` (a causal model) carry noise in training mode; afterwards no hook is
    left. None adds none.
    """
    if alpha is None:
        yield
        return
    lengths: list[torch.Tensor] = []  # of the batch that is under way

    def seen(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:  # noqa: ANN401
        ids = named["input_ids"] if "input_ids" in named else arguments[0]
        lengths[:] = [document_lengths(ids, named.get("position_ids"), named.get("attention_mask"))]

    def add(module: torch.nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
        return output + uniform_noise(output, lengths[0], alpha) if base.training else output

    # peft calls the causal model's `forward` directly, past its hooks; the decoder below it is called as a module
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
    """(B, T) fp32: for each token the length of its document. Documents begin where `positions` are 0; without
    positions a row is one document, as long as `attention` says.
    """
    import torch

    if positions is None:
        attention = torch.ones_like(ids) if attention is None else attention
        long = attention.sum(1, keepdim=True)
        return long.clamp(min=1).float().expand(ids.shape)
    document = (positions == 0).flatten().cumsum(0)
    # not bincount, which makes the processor wait for a GPU to know how long its result is
    counts = torch.zeros(len(document) + 1, device=ids.device).index_add_(
        0, document, torch.ones_like(document).float()
    )
    return counts[document].view(positions.shape).expand(ids.shape)


def uniform_noise(output: torch.Tensor, lengths: torch.Tensor, alpha: float) -> torch.Tensor:
    """(B, T, d) noise, uniform within ± alpha / √(length · d) of each token's document."""
    import torch

    most = alpha / (lengths * output.shape[-1]).sqrt()
    return torch.empty_like(output).uniform_(-1, 1) * most.unsqueeze(-1).to(output.dtype)
