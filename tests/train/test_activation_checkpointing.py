"""Every policy gives the same gradients, keeps what it says, and is not dropped on the way."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.errors import InputError
from finetune.estimate.activations import POLICIES
from finetune.recipe import Lora, Runtime
from finetune.train import activation_checkpointing
from tests.helpers.live_storage import LiveStorages
from tests.helpers.small_models import adapted, apply, config, quantized
from tests.helpers.trainings import build_trainer, documents, unpacked


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return adapted(quantized(config(64, 128, 4, 4, 2), tmp_path_factory.mktemp("base")), None, 0.0)


def gradients(model):
    ids = torch.arange(5, 69)[None]
    model.zero_grad(set_to_none=True)
    (-model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def attention_runs(model):
    """How often attention is computed in a forward and backward."""

    class Counted(TorchDispatchMode):
        runs = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.runs += func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
            return func(*args, **(kwargs or {}))

    with Counted() as seen:
        gradients(model)
    return seen.runs


@pytest.mark.parametrize("policy, runs", zip(POLICIES, [4, 5, 6, 4, 8, 8], strict=True))
def test_gradients_are_the_same_and_attention_runs_again_only_where_it_must(policy, runs, model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    apply(model, "none")
    expected = gradients(model)
    apply(model, policy)
    found = gradients(model)
    assert attention_runs(model) == runs
    apply(model, "none")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_trainer_is_told():
    assert activation_checkpointing.settings("none", "cpu") == (False, None)
    assert activation_checkpointing.settings("full", "cpu") == (True, {"use_reentrant": False})
    assert activation_checkpointing.settings("every_4", "cpu")[1]["every_n_layers"] == 4
    assert activation_checkpointing.settings("offload", "cuda")[1]["offload"]
    with pytest.raises(InputError, match="use full"):
        activation_checkpointing.settings("offload", "cpu")
    named = {activation_checkpointing.settings(p, "cuda")[0] for p in POLICIES if p != "none"}
    assert named == {True} and {Runtime(checkpointing=p).checkpointing for p in POLICIES} == set(POLICIES)


def test_trls_selective_is_still_dropped_with_an_adapter(load, base, tmp_path):
    """When this fails, keep_attention can go."""
    settings = {"use_reentrant": False, "selective": True}
    trainer = build_trainer(load(), base, unpacked(documents()), tmp_path, Lora(r=4))
    trainer.args.activation_checkpointing_kwargs = settings
    from trl.models import enable_selective_activation_checkpointing

    enable_selective_activation_checkpointing(trainer.model)
    trainer.model.activation_checkpointing_enable(activation_checkpointing_kwargs=dict(settings))
    layer = trainer.model.get_base_model().model.layers[0]
    assert "context_fn" not in layer._gradient_checkpointing_func.keywords


def test_storages_count_once_and_only_while_they_live():
    before = torch.ones(1000)
    with LiveStorages() as live:
        made = before * 2
        view = made[:10].view(2, 5)
        assert live.live == 4000
        again = made + 1
        assert (live.live, live.peak) == (8000, 8000)
        del again
        made.add_(1)
        before.mul_(3)
        assert live.live == 4000
        del made
        assert live.live == 4000  # the view holds it
        del view
    assert (live.live, live.peak) == (0, 8000)
