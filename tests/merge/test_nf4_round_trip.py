"""The weights that went through 4 bits are those that training loads, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune.context import Context
from finetune.merge import blocks, nf4_round_trip
from finetune.merge.nf4_round_trip import RoundTrip
from finetune.merge.plan import plan_merge
from finetune.models import loading
from finetune.models.device import DTYPES
from finetune.recipe import Model, Quantization, Runtime, Tracking
from finetune.utils.files import write_json
from tests.helpers.merged import merged_tensors
from tests.helpers.quantized import dequantized_weight, quantized_modules
from tests.helpers.tiny_models import save_adapter, save_tiny


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_dequantised_base_is_what_training_loads(
    tmp_path: Path, kind: Any, double: bool, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_tiny(tmp_path / "base", "qwen2", dtype="bfloat16", tie_word_embeddings=True)
    write_json(base / "base.json", {"id": "builtin:tiny-mistral", "revision": None, "dtype": "bfloat16"})
    save_adapter(base, tmp_path / "adapter", size=0.0)  # B stays zero: the base comes through
    ctx = Context(scratch=tmp_path, runtime=Runtime(), tracking=Tracking())
    settings = Quantization(type=kind, double=double)
    model = loading.load_base(Model(id="builtin:tiny-mistral"), base, ctx, settings, precision, "cpu")
    layers = {n: m for n, m in model.named_modules() if n in quantized_modules(model)}
    monkeypatch.setattr(nf4_round_trip, "SLICE_ELEMENTS", 640)  # several slices even here, the last one short
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 1500)  # and several blocks
    plan = plan_merge(base, tmp_path / "adapter", "float32", RoundTrip(kind, double, DTYPES[precision]))
    assert {n for n, t in plan.targets.items() if t.round_trip} == {f"{n}.weight" for n in layers}
    original = load_file(base / "model.safetensors")
    for name, value in merged_tensors(plan):
        layer = layers.get(name.removesuffix(".weight"))
        if layer is not None and name.endswith(".weight"):
            assert torch.equal(value, dequantized_weight(layer)), name
            assert not torch.equal(value, original[name].float())
        else:
            assert torch.equal(value, original[name].float()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_quick_quantiser_is_bitsandbytes_own(dtype: torch.dtype) -> None:
    from bitsandbytes.functional import get_4bit_type, quantize_4bit

    torch.manual_seed(0)
    values = torch.randn(40, 192)
    code = get_4bit_type("nf4", device="cpu")
    values[0] = 0
    values[1] *= 1e-38
    values[2, :15] = (code[:-1] + code[1:]) / 2  # exactly between two codes
    values[2, 15:64] = 1
    values[3] = -values[2]
    expected, state = quantize_4bit(values.to(dtype), blocksize=64, compress_statistics=False, quant_type="nf4")
    packed, absmax = nf4_round_trip.quantize_nf4(values.to(dtype))
    assert torch.equal(packed, expected)
    assert torch.equal(absmax, state.absmax)
