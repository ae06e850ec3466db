"""Layers that receive the same tensor share one operator, are found by a trial, and compute what each does alone."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from torch import nn

from finetune.lora import fused_linear, shared_inputs
from finetune.recipe import Lora
from finetune.train import oom
from tests.helpers import small_models
from tests.helpers.trainings import assert_close, documents, job, packed, trained

LAYERS = 2
QKV, MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
FAMILIES = {
    "llama": {}, "mistral": {"sliding_window": None}, "qwen2": {}, "gemma": {"head_dim": 32}, "qwen3": {"head_dim": 32},
    "phi3": {"pad_token_id": 0},
}  # fmt: skip


def tiny(kind, folder, hidden=256, layers=LAYERS, **settings):
    from transformers import AutoConfig

    sizes = {
        "hidden_size": hidden, "intermediate_size": 256, "num_hidden_layers": layers, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": small_models.VOCABULARY, **FAMILIES[kind],
    }  # fmt: skip
    return small_models.quantized(AutoConfig.for_model(kind, **sizes), folder, **settings)


def dressed(model, targets=None, **settings):
    """With fused adapters whose B is not zero."""
    model = small_models.adapted(model, targets, 0.0, fused=True, **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.05)
    return model


def shared(model):
    return shared_inputs.share_inputs(model, contextlib.nullcontext())


def names(model):
    """Last names of the layers of each group, in the order in which they are called."""
    seen = {}
    for name, module in model.named_modules():
        if group := getattr(module, "group", None):
            seen.setdefault(id(group), []).append((module.number, name.rpartition(".")[2]))
    return {tuple(n for _, n in sorted(group)) for group in seen.values()}


def step(model):
    """Loss and gradients."""
    model.zero_grad(set_to_none=True)
    ids = torch.arange(5, 37)[None]
    loss = -model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs.sum()
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


@pytest.fixture
def dequantised(monkeypatch):
    """Counts them."""
    calls, original = [], fused_linear.dequantize_4bit
    monkeypatch.setattr(fused_linear, "dequantize_4bit", lambda *given: calls.append(1) or original(*given))
    return calls


def assert_same(first, second, tolerance=1e-5):
    assert first.keys() == second.keys() and len(first) > 1
    for name, expected in first.items():
        assert (second[name] - expected).norm() <= tolerance * expected.norm(), name


def test_the_operator_is_its_formula_to_the_last_places_of_fp64():
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    outs, ranks, scalings = [5, 3, 4], [2, 0, 3], [0.5, 0.0, 2.0]
    x, matrices = drawn(2, 4, 6).requires_grad_(), [drawn(n, 6) for n in outs]
    biases = [drawn(5), drawn(0), drawn(4)]
    a = [drawn(r, 6).requires_grad_() for r in ranks]
    b = [drawn(n, r).requires_grad_() for n, r in zip(outs, ranks, strict=True)]
    *found, low = fused_linear.adapted_linears(x, None, matrices, [], 0, 0, "", biases, a, b, scalings)
    expected = [
        nn.functional.linear(x, m, bias if len(bias) else None) + s * (x @ first.T) @ second.T
        for m, bias, first, second, s in zip(matrices, biases, a, b, scalings, strict=True)
    ]
    assert low.shape == (8, 5)
    weights, learned = [drawn(2, 4, n) for n in outs], [x, a[0], a[2], b[0], b[2]]
    for used, of in (((0, 2), [x]), ((0, 1, 2), learned)):  # a result that is not used has no gradient
        losses = (sum((o[i] * weights[i]).sum() for i in used) for o in (found, expected))
        one, two = (torch.autograd.grad(loss, of, retain_graph=True) for loss in losses)
        assert all(torch.allclose(f, e, rtol=1e-12, atol=1e-12) for f, e in zip(one, two, strict=True))
    assert all(torch.allclose(f, e, rtol=1e-12, atol=1e-12) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "gemma", "qwen3"])
def test_four_dequantisations_instead_of_seven_and_the_same_loss_and_gradients(kind, tmp_path, dequantised):
    model = dressed(tiny(kind, tmp_path, double=kind != "llama"))
    alone = step(model)
    assert len(dequantised) == 2 * 7 * LAYERS - 3  # forward and backward; the embeddings need no gradient
    assert shared(model) == (2 * LAYERS, None)
    assert names(model) == {QKV, MLP}
    dequantised.clear()
    together = step(model)
    assert len(dequantised) == 2 * 4 * LAYERS - 1
    assert_same(alone, together)
    shared_inputs.dissolve(model)
    assert names(model) == set()
    assert_same(alone, step(model), 0)


@pytest.mark.parametrize(("kind", "sizes"), [("phi3", {}), ("llama", {"double": True, "hidden": 64})], ids=str)
def test_what_is_one_matrix_already_or_cannot_be_joined_has_no_group(kind, sizes, tmp_path):
    """Scales of scales are for 256 scales: 32 x 64 weights have 32."""
    assert shared(dressed(tiny(kind, tmp_path, **sizes))) == ((0, None) if kind == "phi3" else (LAYERS, None))


@pytest.mark.parametrize("policy", ["full", "selective", "every_2"])
def test_recomputation_does_not_change_the_gradients(policy, tmp_path):
    model = dressed(tiny("mistral", tmp_path))
    alone = step(model)
    shared(model)
    small_models.apply(model, policy)
    assert_same(alone, step(model))


@pytest.mark.parametrize(
    ("targets", "settings", "groups"),
    [
        (["q_proj", "v_proj", "up_proj"], {}, [QKV, MLP]),
        (["q_proj", "o_proj"], {}, [QKV]),
        (["down_proj"], {}, []),
        (None, {"use_rslora": True, "rank_pattern": {"k_proj": 2}}, [QKV, MLP]),
        (None, {"use_dora": True}, []),
    ],
    ids=str,
)  # fmt: skip
def test_any_mix_of_adapters(targets, settings, groups, tmp_path):
    model = dressed(tiny("qwen2", tmp_path), targets, **settings)
    alone = step(model)
    shared(model)
    assert names(model) == set(groups)
    assert_same(alone, step(model))
    with model.disable_adapter(), torch.no_grad():
        model(input_ids=torch.arange(5, 9)[None])  # each alone, by peft


def test_the_trial_leaves_adapters_mode_and_generators_alone_and_bases_can_be_had_back(tmp_path):
    model = dressed(tiny("llama", tmp_path))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    state = torch.get_rng_state()
    shared(model)
    assert model.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters() if n in before)
    whole = model.get_base_model()
    oom.remove_adapters(whole)
    assert names(whole) == set()


def test_a_wrong_result_dissolves_the_groups_and_is_said(monkeypatch, load, base, ctx, tmp_path):
    rows, lines = packed(documents(), tmp_path), []
    settings = {"lora": Lora(r=4, dropout=0.0), "fused_adapters": True}
    own = dataclasses.replace(ctx, say=lines.append)
    plain = trained(dataclasses.replace(job(tmp_path, "plain"), lora=settings["lora"]), load(), base, rows, own)[1]
    result, found = trained(dataclasses.replace(job(tmp_path, "good"), **settings), load(), base, rows, own)
    assert names(result.model) and not any("not fused" in line for line in lines)
    assert_close(plain, found)
    operator = fused_linear.adapted_linears

    def wrong(*given):
        outs = operator(*given)
        return [outs[0], *outs[2:-1], outs[1], outs[-1]] if len(given[8]) > 2 else outs

    monkeypatch.setattr(fused_linear, "adapted_linears", wrong)
    result, found = trained(dataclasses.replace(job(tmp_path, "wrong"), **settings), load(), base, rows, own)
    assert names(result.model) == set() and sum("not fused" in line and "% off" in line for line in lines) == 1
    assert_close(plain, found)


def test_dropout_keeps_each_layer_alone(monkeypatch, load, base, ctx, tmp_path):
    monkeypatch.setattr(shared_inputs, "share_inputs", lambda *_: pytest.fail("was called"))
    settings = {"lora": Lora(r=4, dropout=0.1), "fused_adapters": True}
    trained(dataclasses.replace(job(tmp_path, "dropped"), **settings), load(), base, packed(documents(), tmp_path), ctx)


class Changing(nn.Module):
    """Two layers that get the same object, which is another value the second time."""

    def __init__(self, layers):
        super().__init__()
        self.first, self.second = layers

    def forward(self, x):
        y = x + 0
        first = self.first(y)
        return first + self.second(y.mul_(2))


def test_a_tensor_that_changes_between_two_layers_is_not_the_same(tmp_path):
    attention = dressed(tiny("llama", tmp_path)).get_base_model().model.layers[0].self_attn
    module = Changing([attention.k_proj, attention.v_proj])
    calls = shared_inputs._Calls(module)
    module(torch.randn(1, 3, 256))
    assert [len(c) for c in calls.seen.values()] == [2] and calls.groups() == []


def test_compiled_layers_keep_the_operators_whole_and_share_one_graph_for_each_length_and_one_for_all(tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = dressed(tiny("mistral", tmp_path, layers=4))
    alone = step(model)
    shared(model)
    for layer in model.get_base_model().model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    assert_same(alone, step(model), 1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # the first layer's input needs no gradient
    for tokens in (16, 40, 24):
        ids = torch.arange(5, 5 + tokens)[None]
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
