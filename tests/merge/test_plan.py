"""The merge against its own refusals, and against mistakes that must be seen; beside peft's: test_merge_beside_peft."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter

from finetune.errors import FinetuneError, InputError
from finetune.merge import blocks
from finetune.merge.blocks import merged_pieces, merged_tensor
from finetune.merge.nf4_round_trip import RoundTrip
from finetune.merge.plan import plan_merge
from tests.helpers.merge_reference import (
    PREFIX,
    VARIANTS,
    State,
    assert_as_near,
    plain,
    plain_with_addends,
    read,
    scale_of,
    tensors_of,
    write,
)
from tests.helpers.merged import merged_tensors
from tests.helpers.tiny_models import load, save_adapter, save_tiny


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base = save_tiny(tmp_path / "base")
    save_adapter(base, tmp_path / "adapter")
    return base, tmp_path / "adapter"


def edit(adapter: Path, change: Callable[[State], State | None]) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(change(tensors) or tensors, path)


def configure(adapter: Path, **values: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def difference(first: Path, second: Path) -> float:
    a, b = read(first), read(second)
    return max(float((a[n] - b[n]).abs().max()) for n in a)


def test_a_wrong_alpha_is_seen(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    right = plain(read(base), tensors_of(adapter), lambda _, rank: 12 / rank)
    configure(adapter, lora_alpha=13)
    state = read(write(base, adapter, tmp_path / "merged"))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(state, {n: right[n].float() for n in state}, rtol=2e-6, atol=1e-6)


def test_a_missing_module_is_refused(pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    edit(adapter, lambda t: {k: v for k, v in t.items() if "layers.1.self_attn.q_proj" not in k})
    with pytest.raises(InputError, match=r"layers.1.self_attn.q_proj has no tensors in the adapter"):
        plan_merge(base, adapter, "float32")


def test_a_transposed_b_is_refused(pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    edit(adapter, lambda t: {k: v.T.contiguous() if "lora_B" in k else v for k, v in t.items()})
    with pytest.raises(InputError, match=r"with rank 4 they must be \(4, in\) and \(out, 4\)"):
        plan_merge(base, adapter, "float32")


def test_a_transposed_square_b_is_seen(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    save_adapter(base, tmp_path / "adapter", r=64, target_modules=["q_proj"])
    right = write(base, tmp_path / "adapter", tmp_path / "right")
    edit(tmp_path / "adapter", lambda t: {k: v.T.contiguous() if "lora_B" in k else v for k, v in t.items()})
    assert difference(right, write(base, tmp_path / "adapter", tmp_path / "wrong")) > 1e-2


def test_half_a_module_and_strange_tensors_are_refused(pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    edit(adapter, lambda t: {k: v for k, v in t.items() if "layers.1.self_attn.q_proj.lora_B" not in k})
    with pytest.raises(InputError, match=r"q_proj needs \['a', 'b'\], found \['a'\]"):
        plan_merge(base, adapter, "float32")
    edit(adapter, lambda t: {**t, PREFIX + "model.layers.9.self_attn.q_proj.lora_A.weight": torch.zeros(4, 64)})
    with pytest.raises(InputError, match=r"no module for the adapter tensor .*layers\.9"):
        plan_merge(base, adapter, "float32")


def test_an_extra_module_is_refused(pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    configure(adapter, target_modules=["q_proj"])
    with pytest.raises(InputError, match="has tensors that target_modules does not name"):
        plan_merge(base, adapter, "float32")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"init_lora_weights": "pissa"}, "'pissa'"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "'olora'"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "'loftq'"),
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"r": 8}, "with rank 8"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    pair: tuple[Path, Path], values: dict[str, object], words: str
) -> None:
    base, adapter = pair
    configure(adapter, **values)
    with pytest.raises(InputError, match=words):
        plan_merge(base, adapter, "float32")


def test_tensors_keep_the_names_of_the_base_where_transformers_renames_and_converts_them(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "mixtral", num_local_experts=2)
    save_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    plan = plan_merge(base, tmp_path / "adapter", "float32")
    assert set(plan.targets) == set(load_file(base / "model.safetensors"))
    changed = {name for name, target in plan.targets.items() if target.changes}
    assert changed == {f"model.layers.{i}.self_attn.{m}_proj.weight" for i in (0, 1) for m in "qv"}
    state = load(base).state_dict()  # whose experts are fused
    fused = [name for name in state if "experts" in name]
    assert len(fused) == 4 and not set(fused) & set(plan.targets)
    assert all(
        torch.equal(merged_tensor(plan, name), state[name]) for name in [*fused, "model.layers.0.mlp.gate.weight"]
    )


def test_only_a_conversion_of_an_adapted_tensor_is_refused(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = pair
    weights = load_file(base / "model.safetensors")
    named = dict(weights)
    for layer in (0, 1):  # a checkpoint that holds what the model splits
        name = f"model.layers.{layer}.mlp.{{}}_proj.weight".format
        named[name("gate_up")] = torch.cat([named.pop(name("gate")), named.pop(name("up"))])
    save_file(named, base / "model.safetensors")
    rule = WeightConverter("mlp.gate_up_proj", ["mlp.gate_proj", "mlp.up_proj"], [Chunk(dim=0)])
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [rule])
    plan = plan_merge(base, adapter, "float32")
    name = "model.layers.1.mlp.up_proj.weight"
    assert name not in plan.targets and torch.equal(merged_tensor(plan, name), weights[name])
    config = {**json.loads((adapter / "adapter_config.json").read_text()), "target_modules": ["up_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    factors = load_file(adapter / "adapter_model.safetensors")
    moved = {k.replace("down_proj", "up_proj"): v.T for k, v in factors.items() if "down_proj" in k}
    a, b = ".lora_A.weight", ".lora_B.weight"
    swapped = {k.replace(a, "?").replace(b, a).replace("?", b): v.contiguous() for k, v in moved.items()}
    save_file(swapped, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"up_proj\.weight, which transformers converts on load \(from .*gate_up_proj"):
        plan_merge(base, adapter, "float32")


def test_parts_beside_the_model_are_carried_and_unused_parts_of_it_are_refused(pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    weights = load_file(base / "model.safetensors")
    save_file({**weights, "mtp.norm.weight": torch.ones(3)}, base / "model.safetensors")
    plan = plan_merge(base, adapter, "float32")
    assert not plan.targets["mtp.norm.weight"].changes and plan.stored.unused == ("mtp.norm.weight",)
    for name in ("model.norm.bias", "model.layers.2.mlp.up_proj.weight", "model.layers.0.other.weight"):
        save_file({**weights, name: torch.ones(3)}, base / "model.safetensors")
        with pytest.raises(InputError, match=f"the weights hold {name}"):
            plan_merge(base, adapter, "float32")


def test_a_base_that_is_quantised_already_is_refused(pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    configure_base = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**configure_base, "quantization_config": {"bits": 4}}))
    with pytest.raises(InputError, match="itself quantised"):
        plan_merge(base, adapter, "float32")


def test_lora_bias_without_a_bias_in_the_base_is_refused(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    save_adapter(base, tmp_path / "adapter", lora_bias=True)
    with pytest.raises(InputError, match=r"proj\.bias, which neither the base nor the merged model has"):
        plan_merge(base, tmp_path / "adapter", "float32")


def test_values_that_are_not_finite_are_refused(pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    edit(
        adapter, lambda t: {k: v * float("nan") if "layers.0.self_attn.q_proj.lora_A" in k else v for k, v in t.items()}
    )
    plan = plan_merge(base, adapter, "float32")
    with pytest.raises(FinetuneError, match=r"layers\.0\.self_attn\.q_proj\.weight is not finite"):
        list(merged_tensors(plan))


def test_the_sum_is_rounded_once(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", dtype="bfloat16")
    save_adapter(base, tmp_path / "adapter")
    expected = plain(read(base), tensors_of(tmp_path / "adapter"), lambda _, rank: 12 / rank)
    for name, value in merged_tensors(plan_merge(base, tmp_path / "adapter", "bfloat16")):
        assert value.dtype == torch.bfloat16
        apart = (value.view(torch.int16).int() - expected[name].float().bfloat16().view(torch.int16).int()).abs()
        assert int(apart.max()) <= 1  # fp32 against fp64 before the one rounding: a tie may fall the other way
        assert float((apart > 0).float().mean()) < 1e-3


@pytest.mark.parametrize("variant", ["lora", "dora", "embedding", "embedding_dora", "tokens", "saved_embedding"])
def test_blocks_of_rows_in_threads_give_what_the_whole_gives(
    tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_tiny(tmp_path / "base", "qwen2", dtype="bfloat16")
    save_adapter(base, tmp_path / "adapter", **VARIANTS[variant])
    for trip in (None, RoundTrip("nf4", True, "bfloat16"), RoundTrip("nf4", False, "float32")):
        for dtype in ("bfloat16", "float32"):
            plan = plan_merge(base, tmp_path / "adapter", dtype, trip)
            monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 10**9)
            whole = dict(merged_tensors(plan))
            monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 300)
            pieces: dict[str, list[torch.Tensor]] = {}
            for name, piece in merged_pieces(plan, plan.targets):
                pieces.setdefault(name, []).append(piece.clone())  # its memory is used again
            assert list(pieces) == list(plan.targets)
            assert sum(len(p) > 1 for p in pieces.values()) > 4
            assert all(sum(map(len, p)) == len(whole[n]) for n, p in pieces.items())
            for name, parts in pieces.items():
                # the library that multiplies may take another kernel for another number of rows
                torch.testing.assert_close(torch.cat(parts), whole[name], rtol=8e-3, atol=1e-6)


def test_threads_and_their_number_change_no_bit(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_merge(*pair, "bfloat16")
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 300)
    count = torch.get_num_threads()
    runs = []
    for most in (1, 5):
        monkeypatch.setattr(blocks, "MOST_THREADS", most)
        runs.append([(name, piece.clone()) for name, piece in merged_pieces(plan, plan.targets)])
    assert [n for n, _ in runs[0]] == [n for n, _ in runs[1]]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(*runs, strict=True))
    assert torch.get_num_threads() == count


def test_a_module_left_out_is_seen(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    right = write(base, adapter, tmp_path / "right")
    edit(adapter, lambda t: {k: v * 0 if "layers.1.self_attn.q_proj.lora_B" in k else v for k, v in t.items()})
    assert difference(right, write(base, adapter, tmp_path / "wrong")) > 1e-2


def test_a_broken_block_is_named_and_the_threads_end(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = pair
    edit(adapter, lambda t: {k: v / 0 if "layers.1.mlp.down_proj.lora_B" in k else v for k, v in t.items()})
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 300)
    plan, before = plan_merge(base, adapter, "bfloat16"), threading.active_count()
    with pytest.raises(FinetuneError, match=r"layers\.1\.mlp\.down_proj\.weight is not finite"):
        list(merged_pieces(plan, plan.targets))
    stopped = merged_pieces(plan, plan.targets)
    next(stopped)
    stopped.close()
    assert threading.active_count() == before


def whole(pieces: Iterable[tuple[str, torch.Tensor]]) -> State:
    """Tensors put together from their pieces, whose memory is used again."""
    parts: dict[str, list[torch.Tensor]] = {}
    for name, piece in pieces:
        assert piece.device.type == "cpu"
        parts.setdefault(name, []).append(piece.clone())
    return {name: torch.cat(found) for name, found in parts.items()}


@pytest.mark.parametrize("device", ["cpu", "cpu:0", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("variant", ["lora", "dora", "lora_bias", "embedding", "embedding_dora", "tokens"])
def test_products_made_on_a_device_are_those_of_the_cpu(
    tmp_path: Path, variant: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cpu:0 is the CPU under a name that torch copies to and back from, as it does for a GPU: bitwise equal."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    base, adapter = save_tiny(tmp_path / "base", "qwen2"), tmp_path / "adapter"
    save_adapter(base, adapter, **VARIANTS[variant])
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 300)
    exact, addends = plain_with_addends(read(base), tensors_of(adapter), scale_of(VARIANTS[variant]))
    for dtype in ("bfloat16", "float32"):
        plan = plan_merge(base, adapter, dtype)
        expected = whole(merged_pieces(plan, plan.targets))
        found = whole(merged_pieces(plan, plan.targets, device))
        if device == "cuda":
            assert_as_near(found, expected, exact, addends)
        else:
            assert all(torch.equal(found[name], value) for name, value in expected.items())
