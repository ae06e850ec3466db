"""Compiled layers and kept 16-bit weights train what the plain layers train, with every proof on."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from finetune.backends import faster, models, out_of_memory
from finetune.errors import InputError
from finetune.recipe import Lora, Quantization, Runtime
from tests.backends.trainings import assert_close, documents, job, packed, trained


def asked(ctx, **runtime):
    lines = []
    return dataclasses.replace(ctx, runtime=Runtime(save_steps=100, **runtime), say=lines.append), lines


@pytest.mark.parametrize("double", [False, True])
def test_kept_weights_give_the_same_bits_forwards_and_backwards(load, double):
    plain, kept = load(Quantization(double=double)), load(Quantization(double=double))
    layers = [n for n, m in kept.named_modules() if isinstance(m, Linear4bit)]
    taken = faster.keep_dequantized(kept)
    assert taken == 4 * sum(plain.get_submodule(n).in_features * plain.get_submodule(n).out_features for n in layers)
    assert models.quantized_modules(kept) == set(layers)
    for name in layers:
        first, second = plain.get_submodule(name), kept.get_submodule(name)
        assert torch.equal(models.dequantized_weight(first), models.dequantized_weight(second))
        given = torch.randn(7, first.in_features, requires_grad=True)
        outputs = [layer(given) for layer in (first, second)]
        assert torch.equal(*outputs)
        gradients = [torch.autograd.grad(out.square().sum(), given)[0] for out in outputs]
        assert torch.equal(*gradients)


def test_a_training_with_kept_weights_is_the_plain_one_bit_by_bit_and_saves_no_more(load, base, ctx, tmp_path):
    rows = packed(documents(), tmp_path)
    kept, (own, lines) = load(), asked(ctx, cache_dequantized=True)
    before = list(kept.state_dict())
    faster.speed_up(kept, own)
    assert list(kept.state_dict()) == before and "kept in 16 bits" in lines[0]
    settings = {"lora": Lora(r=4, dropout=0.1)}
    one = trained(dataclasses.replace(job(tmp_path, "plain"), **settings), load(), base, rows, ctx)[1]
    two = trained(dataclasses.replace(job(tmp_path, "kept"), **settings), kept, base, rows, ctx)[1]
    assert all(torch.equal(one[n], two[n]) for n in one)
    out_of_memory.undress(kept)  # which puts back what was below the adapter
    assert any(isinstance(m, faster.KeptLinear4bit) for m in kept.modules())


def test_weights_of_another_type_than_the_computation_are_refused(load):
    model = load()
    layer = next(m for m in model.modules() if isinstance(m, Linear4bit))
    layer.compute_dtype = torch.bfloat16
    with pytest.raises(InputError, match="leave it out"):
        faster.keep_dequantized(model)


def test_nothing_is_done_that_was_not_asked_for(load, ctx):
    model, (own, lines) = load(), asked(ctx)
    kinds = [type(m) for m in model.modules()]
    faster.speed_up(model, own)
    assert [type(m) for m in model.modules()] == kinds and lines == []


@pytest.mark.slow
def test_a_training_of_compiled_layers_is_the_plain_one_and_layers_share_their_graphs(load, base, ctx, tmp_path):
    rows = packed(documents(), tmp_path)
    plain = trained(job(tmp_path, "plain"), load(), base, rows, ctx)[1]
    model = load()
    torch._dynamo.reset()
    assert faster.compile_layers(model, "eager") == len(model.model.layers)  # the graphs, without inductor's minutes
    compiled = trained(job(tmp_path, "compiled"), model, base, rows, ctx)[1]
    assert_close(plain, compiled)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= torch._dynamo.config.recompile_limit
