"""What only a GPU can show. Skips itself without CUDA."""

import dataclasses

import pytest
import torch

from finetune.models.attention import LEAST_CAPABILITY, is_varlen
from tests.e2e.conftest import make_workspace

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def test_the_whole_recipe_on_a_gpu_in_the_precision_of_its_generation(tmp_path):
    workspace = make_workspace(tmp_path / "work")

    @dataclasses.dataclass(frozen=True)
    class OnGpu(type(workspace)):
        def environment(self, **more):
            settings = super().environment(**more)
            settings.pop("CUDA_VISIBLE_DEVICES")
            return settings

    workspace = OnGpu(workspace.folder)
    workspace.run("run", "small.yaml")
    metrics = workspace.show()["stages"]["train"]["metrics"]
    assert metrics["precision"] == ("bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16")
    assert metrics["device"] == torch.cuda.get_device_name()
    assert is_varlen(metrics["attention"]) == (torch.cuda.get_device_capability() >= LEAST_CAPABILITY)
    assert metrics["loss"] < metrics["first_loss"]
