"""Our Muon takes the steps that torch's takes."""

from __future__ import annotations

import pytest
import torch

from finetune.tiny.muon import Muon, orthogonalized


def test_orthogonalized_matrices_have_singular_values_near_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 16, 40), (2, 40, 16), (1, 16, 16)):
        values = torch.linalg.svdvals(orthogonalized(torch.randn(shape, generator=generator)))
        assert values.shape == (shape[0], 16)
        assert 0.3 < values.min()
        assert values.max() < 1.3


def test_muon_agrees_with_torch() -> None:
    """torch's computes in bf16, so the two agree to its precision."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(24, 64)), torch.nn.Parameter(torch.randn(64, 24))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    before = [p.detach().clone() for p in ours]
    reference = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    muon = Muon(ours, torch.float32)
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape)
            other.grad = mine.grad.clone()
        muon.step(0.1)
        reference.step()
    for mine, other, old in zip(ours, theirs, before, strict=True):
        assert (mine - other).norm() < 0.03 * (other - old).norm()


def test_a_matrix_that_backward_did_not_reach_is_an_error() -> None:
    with pytest.raises(ValueError, match="no gradient"):
        Muon([torch.nn.Parameter(torch.zeros(2, 2))], torch.float32).step(0.1)
