"""The 4-bit copy of a base: bitwise what quantising gives, made again where it is damaged, never where it is no use."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.models import loading
from finetune.models.device import Precision
from finetune.recipe import Quantization, Runtime
from finetune.utils.files import write_json
from tests.helpers.pinned import NF4, Base, adapted, evaluate, gradients
from tests.helpers.quantized import dequantized_weight, quantized_modules


@pytest.fixture
def base(make_base: Callable[..., Base]) -> Base:
    return make_base()


def kept(base: Base, said: list[str], **changes: Any) -> Base:
    model, folder, context = base
    runtime = Runtime(keep_quantized="always")
    return model, folder, dataclasses.replace(context, runtime=runtime, say=said.append, **changes)


def four_bits(model: Any) -> dict[str, torch.Tensor]:
    """Every stored tensor, scales and codes too, and what the layers multiply by."""
    found = dict(model.state_dict())
    for name, module in model.named_modules():
        if name in quantized_modules(model):
            found[f"{name} dequantised"] = dequantized_weight(module)
    return found


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("double", [False, True])
def test_a_copy_is_bitwise_what_quantising_gives(
    make_base: Callable[..., Base], kind: str, precision: Precision, double: bool
) -> None:
    base = make_base(kind=kind, tie_word_embeddings=kind == "qwen2")
    said: list[str] = []
    settings = Quantization(double=double)
    plain = loading.load_base(*base, settings, precision, "cpu")
    loading.load_base(*kept(base, said), settings, precision, "cpu")
    (base[1] / "model.safetensors").unlink()  # from now on there is only the copy
    copied = loading.load_base(*kept(base, said), settings, precision, "cpu")
    assert len(said) == 1 and "a 4-bit copy is kept" in said[0]
    first, second = four_bits(plain), four_bits(copied)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) and first[n].dtype == second[n].dtype for n in first)
    assert torch.equal(evaluate(plain), evaluate(copied))
    before, after = gradients(adapted(plain)), gradients(adapted(copied))
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert {type(m).__name__ for m in plain.modules()} == {type(m).__name__ for m in copied.modules()}


def test_other_settings_and_other_weights_are_other_copies(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.models import quantized_cache

    def place(settings: Quantization = NF4, dtype: str = "bf16") -> Path:
        return quantized_cache.locate(base[2].scratch, base[1], settings, dtype)[0]

    places = {place(), place(Quantization(double=False)), place(Quantization(type="fp4")), place(dtype="fp16")}
    write_json(base[1] / "base.json", {"id": "builtin:tiny-mistral", "revision": "a" * 40})
    places.add(place())
    monkeypatch.setattr(quantized_cache, "_PACKAGES", ("bitsandbytes", "torch"))
    places.add(place())
    assert len(places) == 6


@pytest.mark.parametrize("damage", ["bytes", "manifest", "missing"])
def test_a_damaged_copy_is_made_again_and_said(base: Base, damage: str) -> None:
    said: list[str] = []
    plain = four_bits(loading.load_base(*kept(base, said), NF4, "fp32", "cpu"))
    (folder,) = (base[2].scratch / "quantized").iterdir()
    file = folder / "model.safetensors"
    if damage == "bytes":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "manifest":
        (folder / "manifest.json").unlink()  # as a copy does that was cut off
    else:
        file.unlink()
    again = four_bits(loading.load_base(*kept(base, said), NF4, "fp32", "cpu"))
    assert all(torch.equal(plain[n], again[n]) for n in plain)
    assert "is stale" in said[1] and "is kept" in said[2]
    loading.load_base(*kept(base, said), NF4, "fp32", "cpu")
    assert len(said) == 3


def test_small_bases_other_ranks_and_full_disks_keep_no_copy(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil as disk
    from types import SimpleNamespace

    from finetune.models import quantized_cache

    said: list[str] = []
    loading.load_base(*base, NF4, "fp32", "cpu")  # auto
    loading.load_base(*kept(base, said, rank=1), NF4, "fp32", "cpu")
    loading.load_base(*kept(base, said), None, "fp32", "cpu")
    assert not (base[2].scratch / "quantized").exists() and not said
    monkeypatch.setattr(disk, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    loading.load_base(*kept(base, said), NF4, "fp32", "cpu")
    assert "no 4-bit copy is kept" in said[0]
    assert quantized_cache.wanted("auto", 7 * 10**9) and not quantized_cache.wanted("auto", 10**8)
    assert not quantized_cache.wanted("never", 7 * 10**9)


def test_what_a_dead_process_left_goes_and_only_copies_of_kept_bases_stay(base: Base) -> None:
    from finetune.models import quantized_cache

    loading.load_base(*kept(base, []), NF4, "fp32", "cpu")
    root = base[2].scratch / "quantized"
    (copy,) = root.iterdir()
    (root / "0123456789abcdef-999999999").mkdir()
    assert quantized_cache.unneeded(base[2].scratch, [base[1]]) == [root / "0123456789abcdef-999999999"]
    assert copy in quantized_cache.unneeded(base[2].scratch, [])
    quantized_cache.remove_unfinished(root)
    assert list(root.iterdir()) == [copy]
