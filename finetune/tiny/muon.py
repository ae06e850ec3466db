"""The Muon optimiser for small weight matrices on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Muon:
    """Momentum orthogonalised by Newton-Schulz steps (https://kellerjordan.github.io/posts/muon/), for weight matrices.

    `torch.optim.Muon` always computes in bf16, one matrix at a time; here matrices of one shape are batched, in a dtype
    that is fast on the CPU. Measured against AdamW: docs/lab-notes.md.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], dtype: torch.dtype, momentum: float = 0.95) -> None:
        import torch

        shapes: dict[tuple[int, ...], list[torch.nn.Parameter]] = {}
        for parameter in parameters:
            shapes.setdefault(tuple(parameter.shape), []).append(parameter)
        self._groups = [(group, torch.zeros(len(group), *shape)) for shape, group in shapes.items()]
        self._dtype = dtype
        self._momentum = momentum

    def step(self, learning_rate: float) -> None:
        """Update from the gradients, scaled like AdamW's update (arXiv:2502.16982, 0.2 * sqrt(max(m, n)))."""
        import torch

        with torch.no_grad():
            for group, buffer in self._groups:
                gradient = torch.stack([gradient_of(p) for p in group])  # (N, m, n)
                buffer.lerp_(gradient, 1 - self._momentum)
                update = orthogonalized(gradient.lerp(buffer, self._momentum).to(self._dtype)).float()
                scale = learning_rate * 0.2 * max(update.shape[1:]) ** 0.5
                for parameter, change in zip(group, update, strict=True):
                    parameter.sub_(change, alpha=scale)


def gradient_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return the gradient. Raises ValueError if there is none."""
    if parameter.grad is None:
        raise ValueError("a parameter has no gradient: backward has to reach all of them")
    return parameter.grad


def orthogonalized(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Return the matrices (N, m, n) with all singular values near 1 (the coefficients target 0.5 to 1.5)."""
    import torch

    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT.contiguous() if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x
