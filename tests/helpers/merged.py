"""The tensors of a merge, without writing its files."""

from collections.abc import Iterator

import torch

from finetune.merge.blocks import _whole
from finetune.merge.plan import MergePlan


def merged_tensors(plan: MergePlan) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors under their names in the files, one in memory at a time."""
    for name in plan.targets:
        yield name, _whole(plan, name)
