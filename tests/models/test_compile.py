"""Compiled layers and kept dequantised weights train what the plain layers train, with every proof on."""

from __future__ import annotations

import dataclasses
import os

import pyarrow.parquet as pq
import pytest
import torch
from bitsandbytes.nn import Linear4bit

from finetune.models import compile as models_compile
from finetune.models import loading
from finetune.recipe import Lora, Quantization, Runtime
from finetune.train import oom, recipe_trainer
from tests.helpers import varlen_reference
from tests.helpers.quantized import dequantized_weight, quantized_modules
from tests.helpers.trainings import assert_close, documents, job, packed, trained


def asked(ctx, **runtime):
    lines = []
    return dataclasses.replace(ctx, runtime=Runtime(save_steps=100, **runtime), say=lines.append), lines


@pytest.fixture
def plain(load, monkeypatch):
    """A function that loads the base as a machine without free memory does."""

    def loaded(*given):
        with monkeypatch.context() as patch:
            patch.setattr(loading, "available_memory", lambda world: None)
            return load(*given)

    return loaded


def kept_layers(model):
    return [n for n, m in model.named_modules() if isinstance(m, models_compile.KeptLinear4bit)]


@pytest.mark.parametrize("double", [False, True])
def test_kept_weights_give_the_same_bits_forwards_and_backwards(load, plain, double):
    without, kept = plain(Quantization(double=double)), load(Quantization(double=double))
    layers = [n for n, m in without.named_modules() if isinstance(m, Linear4bit)]
    assert kept_layers(kept) == layers and kept_layers(without) == []
    assert quantized_modules(kept) == set(layers)
    for name in layers:
        first, second = without.get_submodule(name), kept.get_submodule(name)
        assert torch.equal(dequantized_weight(first), dequantized_weight(second))
        given = torch.randn(7, first.in_features, requires_grad=True)
        outputs = [layer(given) for layer in (first, second)]
        assert torch.equal(*outputs)
        gradients = [torch.autograd.grad(out.square().sum(), given)[0] for out in outputs]
        assert torch.equal(*gradients)


def test_a_training_with_kept_weights_is_the_plain_one_bit_by_bit_and_saves_no_more(load, plain, base, ctx, tmp_path):
    rows = packed(documents(), tmp_path)
    kept, without = load(), plain()
    assert list(kept.state_dict()) == list(without.state_dict())
    settings = {"lora": Lora(r=4, dropout=0.1)}
    one = trained(dataclasses.replace(job(tmp_path, "plain"), **settings), without, base, rows, ctx)[1]
    two = trained(dataclasses.replace(job(tmp_path, "kept"), **settings), kept, base, rows, ctx)[1]
    assert all(torch.equal(one[n], two[n]) for n in one)
    oom.remove_adapters(kept)  # which puts back what was below the adapter
    assert kept_layers(kept)


def test_weights_are_kept_within_a_share_of_the_free_memory_and_in_their_own_dtype(plain):
    model = plain()
    sizes = [m.in_features * m.out_features for _, m in model.named_modules() if isinstance(m, Linear4bit)]
    enough = int(4 * sum(sizes) / models_compile.KEPT_SHARE) + 4
    for memory in (None, 0, enough - 8):
        assert models_compile.keep_dequantized(model, memory) == 0 and kept_layers(model) == []
    other = next(m for m in model.modules() if isinstance(m, Linear4bit))
    other.compute_dtype = torch.bfloat16  # would be rounded
    size = other.in_features * other.out_features
    assert models_compile.keep_dequantized(model, enough) == 4 * (sum(sizes) - size)
    assert len(kept_layers(model)) == len(sizes) - 1


def test_nothing_is_done_that_was_not_asked_for(load, ctx):
    model, (own, lines) = load(), asked(ctx)
    kinds = [type(m) for m in model.modules()]
    models_compile.speed_up(model, own, False)
    assert [type(m) for m in model.modules()] == kinds and lines == [] and not models_compile.is_compiled(model)


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_where_compiling_fails_the_training_is_the_plain_one_and_one_line_says_so(
    when, load, base, ctx, tmp_path, monkeypatch
):
    from torch._dynamo.backends.common import aot_autograd

    monkeypatch.setattr(recipe_trainer, "in_pieces", lambda _: False)  # what is compiled is not divided either

    def broken(graph, inputs):
        raise RuntimeError("no C compiler\nand more")

    def outcome(folder, backend):
        model, lines = load(), []
        if backend:
            models_compile.compile_layers(model, lines.append, backend)
            assert models_compile.is_compiled(model)
        found = trained(job(tmp_path, folder, max_steps=2), model, base, rows, ctx)[1]
        assert not models_compile.is_compiled(model)
        return found, lines

    rows = packed(documents(), tmp_path)
    torch._dynamo.reset()
    halves = {"fw_compiler": lambda graph, inputs: graph.forward, "bw_compiler": broken}
    plain, failed = outcome("plain", None), outcome("failed", broken if when == "forward" else aot_autograd(**halves))
    assert all(torch.equal(plain[0][n], failed[0][n]) for n in plain[0])
    assert len(failed[1]) == 1 and "uncompiled" in failed[1][0] and "no C compiler" in failed[1][0]


def test_what_is_compiled_is_kept_in_scratch_unless_the_machine_says_where(load, ctx, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    for place in (ctx.scratch.absolute() / "compiled", ctx.scratch / "elsewhere"):
        if place.name == "elsewhere":
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(place))
        model, (own, lines) = load(), asked(ctx)
        models_compile.speed_up(model, own, True)
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(place) and len(lines) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("attention", "fused"), [("sdpa", False), ("varlen", False), ("varlen", True)])
def test_compiled_layers_train_as_plain_ones_and_lengths_share_graphs(
    attention, fused, load, base, ctx, tmp_path, monkeypatch
):
    """Each micro-batch has another number of tokens and documents; the varlen kernel is one operator, as a GPU's is."""
    rows = packed(documents(60), tmp_path)
    name = varlen_reference.register(as_operator=True) if attention == "varlen" else attention
    lengths = pq.read_table(rows)["seq_lengths"].to_pylist()
    assert len({sum(row) for row in lengths}) > 8 and len({max(row) for row in lengths}) > 4

    def outcome(folder, compiled):
        model = load(attention=name)
        if compiled:
            layers = models_compile.compile_layers(
                model, pytest.fail, "eager"
            )  # the graphs, without inductor's minutes
            assert layers == len(model.model.layers)
        own = dataclasses.replace(job(tmp_path, folder, max_steps=2), fused_adapters=fused and compiled)
        return trained(own, model, base, rows, ctx)[1]

    most = models_compile.GRAPHS
    monkeypatch.setattr(models_compile, "GRAPHS", 50)  # what is asked of it and not what it is held to
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert_close(outcome("plain", False), outcome("compiled", True))
    assert not torch._dynamo.utils.counters["graph_break"]
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= most
