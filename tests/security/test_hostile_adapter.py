"""Adapters from somebody else that are to be merged or gone on from: one sentence soon, whatever their files say."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import InputError
from finetune.lora.resume import require_same
from finetune.merge import plan
from finetune.recipe import Lora
from finetune.utils.safetensors_io import read_file, read_folder
from tests.helpers.tiny_models import save_adapter
from tests.security.test_untrusted_base import plain as plain


@pytest.fixture
def adapter(plain: Path, tmp_path: Path) -> Path:
    """A sound adapter of `plain`, to spoil."""
    save_adapter(plain, tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(base: Path, adapter: Path, *words: str) -> None:
    """Merging ends in one short InputError."""
    with pytest.raises(InputError) as caught:
        plan.plan_merge(base, adapter, "float32")
    assert all(word in str(caught.value) for word in words) and len(str(caught.value)) < 1500, caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2", "int8", "int64", "bool"])
def test_tensors_that_are_no_floats_are_refused_before_anything_is_merged(
    kind: str, plain: Path, adapter: Path
) -> None:
    """One of them is enough: copied into a float weight it would give a model of other values without a word."""
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    save_file(tensors | {name: tensors[name].to(getattr(torch, kind))}, file)
    refused(plain, adapter, name, "allowed are BF16, F16, F32, F64")


@pytest.mark.parametrize(("kind", "fine"), [("float16", True), ("float8_e4m3fn", False), ("int8", False)])
def test_modules_to_save_in_another_type(kind: str, fine: bool, plain: Path, adapter: Path) -> None:
    """Half-precision copies beside fp32 factors are what people save; eight bits and integers are refused."""
    file = adapter / "adapter_model.safetensors"
    head = load_file(plain / "model.safetensors")["model.embed_tokens.weight"]
    key = "base_model.model.model.embed_tokens.weight"
    save_file(load_file(file) | {key: head.to(getattr(torch, kind))}, file)
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"modules_to_save": ["embed_tokens"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    if fine:
        assert plan.plan_merge(plain, adapter, "float32").targets["model.embed_tokens.weight"].changes
    else:
        refused(plain, adapter, key)


@pytest.mark.parametrize(
    "change",
    [
        {"lora_alpha": "x"}, {"r": "x"}, {"r": 0}, {"rank_pattern": 3}, {"alpha_pattern": ["x"]}, {"target_modules": 3},
        {"rank_pattern": {"(": 4}}, {"target_modules": "("}, {"modules_to_save": 3}, {"modules_to_save": [3]},
        {"layers_to_transform": "x"}, {"layers_to_transform": [None, "x"]}, {"trainable_token_indices": 3},
        {"r": 10**400}, {"lora_alpha": float("nan")}, {"lora_alpha": 1e308, "r": 1}, {"exclude_modules": {"a": 1}},
        {"base_model_name_or_path": {"a": 1}}, {"bias": ["x"]}, {"peft_type": ["LORA"]},
    ],
    ids=str,
)  # fmt: skip
def test_an_adapter_config_of_odd_values_is_one_sentence_or_merges(
    change: dict[str, Any], plain: Path, adapter: Path
) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    lora = Lora.model_validate({"start_from": str(adapter)}, context={"folder": adapter.parent})
    for work in (
        lambda: plan.plan_merge(plain, adapter, "float32"),
        lambda: require_same(lora, adapter, plain, "folder:x", trust_remote_code=False),
    ):
        try:
            work()
        except InputError as error:
            assert len(str(error)) < 3000


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern"])
def test_a_pattern_that_matches_without_end_is_stopped(
    field: str, plain: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "PLAN_SECONDS", 0.3)
    pattern = "([a-z_.0-9]+)+!"
    path = adapter / "adapter_config.json"
    change = {field: {pattern: 4} if field == "rank_pattern" else pattern}
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused(plain, adapter, "more than 0.3 s of CPU time")


def entry(shape: Any = (1,), offsets: Any = (0, 4), dtype: Any = "F32") -> dict[str, Any]:
    """A header of one tensor."""
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


HEADERS = (
    [], 3, None, "x", {"a": 3}, {"a": {}}, entry(3), entry(offsets=[0]), entry([-1], [4, 0]), entry(offsets=[-4, 0]),
    entry((), dtype=["F32"]), entry([2**80], [0, 2**82]), entry([True]), entry([1.0]), entry(["1"], ["0", "4"]),
)  # fmt: skip


@pytest.mark.parametrize("header", HEADERS, ids=str)
def test_a_damaged_header_of_weights_is_one_sentence(header: Any, tmp_path: Path) -> None:
    content = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(content)) + content + bytes(64))
    with pytest.raises(InputError, match=r"model\.safetensors"):
        read_file(tmp_path / "model.safetensors")


def test_a_deeply_nested_header_is_one_sentence(tmp_path: Path) -> None:
    content = b'{"a":' * 100_000
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(content)) + content)
    with pytest.raises(InputError, match="nested too deeply"):
        read_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize("index", [[], {}, {"weight_map": 3}, {"weight_map": {"a": ["b"]}}], ids=str)
def test_a_broken_index_is_one_sentence(index: Any, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError):
        read_folder(tmp_path)
