"""A tiny base as the base stage pins it, and what is looked at when it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.context import Context
from finetune.recipe import Model, Quantization, Runtime, Tracking
from finetune.utils.files import write_json
from tests.helpers.tiny_models import VOCABULARY, save_tiny

NF4 = Quantization()
Base = tuple[Model, Path, Context]


@pytest.fixture
def make_base(tmp_path: Path) -> Callable[..., Base]:
    def make(**config: Any) -> Base:
        folder = save_tiny(tmp_path / "base", **{"intermediate_size": 128, **config})
        write_json(folder / "base.json", {"id": "builtin:tiny-mistral", "kind": "builtin", "revision": None})
        context = Context(scratch=tmp_path / "scratch", runtime=Runtime(), tracking=Tracking(), device="cpu")
        return Model.model_validate("builtin:tiny-mistral"), folder, context

    return make


def batch() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))


def adapted(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    ids = batch()
    model(input_ids=ids, labels=ids).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def evaluate(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=batch()).logits
