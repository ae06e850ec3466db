"""Every policy gives the same gradients, keeps what it says, and is not dropped on the way."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.errors import InputError
from finetune.estimate.activations import OFFLOAD_BUFFERS, POLICIES
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


def test_offloading_by_trl_gives_the_same_gradients_where_streams_do_nothing(model, monkeypatch):
    """TRL's code on a CPU that stands for the GPU: what is kept of a layer is its input, copied and read back once."""
    from trl.models.activation_offloading import OffloadActivations, get_act_offloading_ctx_manager

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)
    monkeypatch.setattr(torch.cpu.Stream, "synchronize", lambda stream: None, raising=False)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    apply(model, "full")
    expected = gradients(model)
    context = get_act_offloading_ctx_manager(model, use_pin_memory=False)
    activation_checkpointing.buffer_twice(SimpleNamespace(maybe_activation_offload_context=context, model=model))
    assert isinstance(context, OffloadActivations) and context.max_fwd_stash_size == OFFLOAD_BUFFERS == 2
    copies, waiting, original = [], [], torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda given, **how: copies.append(given.shape) or original(given, **how))
    read, pack, handle = [], context.pack_hook, context.unpack_hook
    context.pack_hook = lambda tensor: [pack(tensor), waiting.append(len(context.fwd_stash))][0]
    context.unpack_hook = lambda number: read.append(number) or handle(number)
    for _ in range(2):  # the second step begins as clean as the first
        with context:
            found = gradients(model)
        assert copies.count(torch.Size([1, 64, 64])) >= 4 and max(waiting) <= 2
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    apply(model, "none")


def test_what_trainer_is_told():
    assert activation_checkpointing.settings("none", "cpu") == (False, None)
    assert activation_checkpointing.settings("full", "cpu") == (True, {"use_reentrant": False})
    assert activation_checkpointing.settings("every_4", "cpu")[1]["every_n_layers"] == 4
    assert activation_checkpointing.settings("offload", "cuda") == activation_checkpointing.settings("full", "cuda")
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
