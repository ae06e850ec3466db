"""An adapter inside its 4-bit layer computes what peft's does, and is not used where it would not be the same."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from torch import nn

from finetune.lora import fused_linear
from finetune.models import compile as models_compile
from finetune.recipe import Lora
from finetune.train import oom
from tests.helpers.trainings import assert_close, documents, job, packed, trained

INNER, OUTER, TOKENS = 64, 128, 6


class Block(nn.Module):
    """One 4-bit layer, found by name."""

    def __init__(self, *, double: bool, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        plain = nn.Linear(INNER, OUTER, bias=bias).to(dtype)
        self.proj = Linear4bit(INNER, OUTER, bias, dtype, compress_statistics=double, quant_type="nf4")
        self.proj.load_state_dict(plain.state_dict())
        self.proj.to("cpu")
        self.proj.support_avx512bf16_for_cpu = False
        self.is_loaded_in_4bit = True
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


def adapted(fused, *, double=False, bias=False, dtype=torch.float32, kept=False, device="cpu", **lora):
    """The block with an adapter whose matrices are not zero."""
    block = Block(double=double, bias=bias, dtype=dtype).to(device)
    if kept:
        models_compile.keep_dequantized(block, 1 << 40)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["proj"], **lora)
    if fused:
        fused_linear.use(config)
    model = get_peft_model(block, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
                if "magnitude" not in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    return model.train()


def passed(model, dtype=torch.float32, *, of_input=True, enabled=False):
    """Output and gradients by name, of the input too."""
    torch.manual_seed(2)
    device = next(model.parameters()).device.type
    x = torch.randn(2, TOKENS // 2, INNER).to(device, dtype).requires_grad_(of_input)
    with torch.autocast(device, dtype if enabled else torch.bfloat16, enabled=enabled):
        out = model(x)
    assert out.dtype == dtype
    out.float().square().sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"output": out.detach(), **({"input": x.grad} if of_input else {}), **found}


def assert_same(first, second, tolerance):
    assert first.keys() == second.keys()
    for name, expected in first.items():
        off = (second[name].float() - expected.float()).norm() / expected.float().norm()
        assert off < tolerance, (name, off)


def layer_of(model):
    return next(m for m in model.modules() if isinstance(m, fused_linear.FusedLinear4bit))


@pytest.mark.parametrize("settings", [{}, {"double": True}, {"bias": True}, {"kept": True}], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_outputs_and_gradients_are_those_of_peft(settings, dropout):
    plain, fused = (passed(adapted(f, lora_dropout=dropout, **settings)) for f in (False, True))
    assert {"output", "input"} < plain.keys() and len(plain) == 4
    assert_same(plain, fused, 1e-5)


def test_in_16_bits_it_is_as_near_to_fp32_as_peft_is():
    exact = passed(adapted(False))
    half = {"dtype": torch.bfloat16}
    plain, fused = (passed(adapted(f, **half), torch.bfloat16, enabled=True) for f in (False, True))
    assert {g.dtype for n, g in fused.items() if "lora" in n} == {torch.float32}
    for name, expected in exact.items():
        off = [float((found[name].float() - expected).norm() / expected.norm()) for found in (plain, fused)]
        assert off[1] < 1.5 * off[0] + 1e-3, (name, off)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", [{}, {"double": True}, {"kept": True}, {"lora_dropout": 0.5}], ids=str)
def test_on_a_gpu_too(settings, dtype):
    plain, fused = (
        passed(adapted(f, dtype=dtype, device="cuda", **settings), dtype, enabled=True) for f in (False, True)
    )
    assert_same(plain, fused, 0.02)


def test_an_fp32_stream_over_a_16_bit_layer_goes_through_peft(monkeypatch):
    """What is trained whole makes the stream fp32."""
    monkeypatch.setattr(fused_linear, "adapted_linears", lambda *_: pytest.fail("was called"))
    passed(adapted(True, dtype=torch.bfloat16), torch.float32, enabled=True)


def test_an_input_that_needs_no_gradient_gets_none():
    plain, fused = (passed(adapted(f), of_input=False) for f in (False, True))
    assert_same(plain, fused, 1e-5)


def test_what_is_not_one_plain_adapter_goes_through_peft(monkeypatch):
    called = []
    operator = fused_linear.adapted_linears
    monkeypatch.setattr(fused_linear, "adapted_linears", lambda *given: called.append(1) or operator(*given))
    model = adapted(True)
    passed(model)
    assert called == [1]
    with model.disable_adapter():
        model(torch.randn(1, INNER))
    assert called == [1]
    assert_same(passed(adapted(False, use_dora=True)), passed(adapted(True, use_dora=True)), 1e-5)
    assert called == [1]
    layer_of(model).merge()
    model(torch.randn(1, INNER))
    assert called == [1]


def test_peft_passes_the_layer_on_and_a_full_gpu_can_take_it_out():
    """`_register_custom_module` is peft's own and experimental: this tells when it changes."""
    model = adapted(True)
    assert isinstance(layer_of(model).get_base_layer(), Linear4bit)
    assert "lora_A" in "".join(model.state_dict())
    oom.remove_adapters(model)
    assert type(model.get_submodule("base_model.model.proj")) is Linear4bit


@pytest.mark.parametrize(
    ("asked", "precision", "environment", "worth", "expected"),
    [
        ("auto", "bf16", {}, True, True),
        ("auto", "fp16", {}, True, True),
        ("auto", "bf16", {}, False, False),
        ("auto", "fp32", {}, True, False),
        ("auto", "bf16", {"ACCELERATE_USE_FSDP": "true"}, True, False),
        ("off", "bf16", {}, True, False),
        ("on", "fp32", {}, False, True),
    ],
)
def test_where_it_is_used(asked, precision, environment, worth, expected):
    assert fused_linear.wanted(asked, precision, environment, worth=worth) == expected


@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_a_training_is_that_of_peft(checkpointing, load, base, ctx, tmp_path):
    rows = packed(documents(), tmp_path)
    settings = {"lora": Lora(r=4, dropout=0.1), "checkpointing": checkpointing}
    plain = trained(dataclasses.replace(job(tmp_path, "plain"), **settings), load(), base, rows, ctx)[1]
    settings["fused_adapters"] = True
    result, fused = trained(dataclasses.replace(job(tmp_path, "fused"), **settings), load(), base, rows, ctx)
    assert any(isinstance(m, fused_linear.FusedLinear4bit) for m in result.model.modules())
    assert_close(plain, fused)


def test_a_compiled_layer_keeps_the_operator_whole():
    torch._dynamo.reset()
    plain, model = passed(adapted(False)), adapted(True)
    model.compile(backend="aot_eager", fullgraph=True)
    assert_same(plain, passed(model), 1e-5)
