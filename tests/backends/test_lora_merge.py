"""The merge against plain fp32 arithmetic, against peft, and against its own refusals."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.backends import merge_blocks
from finetune.backends.checkpoints import plan_shards, write_shards
from finetune.backends.lora_merge import plan_merge
from finetune.backends.merge_blocks import merged_pieces, merged_tensors
from finetune.backends.round_trip import RoundTrip
from finetune.errors import FinetuneError, InputError
from tests.tiny_models import VOCABULARY, load, save_adapter, save_tiny

State = dict[str, torch.Tensor]
PREFIX = "base_model.model."
KINDS: dict[str, dict[str, Any]] = {
    "mistral": {},
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True, "query_pre_attn_scalar": 16},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"layers.1.self_attn.q_proj": 8},
        "alpha_pattern": {r".*\.0\..*down_proj": 3, "down_proj": 5},
    },
    "dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["norm", "lm_head"]},
    "saved_embedding": {"modules_to_save": ["embed_tokens"]},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "embedding_dora": {"target_modules": ["embed_tokens", "v_proj"], "use_dora": True},
    "tokens": {"trainable_token_indices": [3, 70, 5]},
    "all_linear": {"target_modules": "all-linear"},
}


def read(folder: Path) -> State:
    return load_file(folder / "model.safetensors")


def tensors_of(adapter: Path) -> State:
    return {k.removeprefix(PREFIX): v for k, v in load_file(adapter / "adapter_model.safetensors").items()}


def write(base: Path, adapter: Path, out: Path) -> Path:
    """Merge in fp32 into a folder that transformers can load."""
    plan = plan_merge(base, adapter, "float32")
    out.mkdir()
    shards = plan_shards(plan.shapes, 10**9)
    write_shards(out, shards, merged_pieces(plan, [t.name for t in shards.tensors]))
    config = json.loads((base / "config.json").read_text())
    if plan.untie:
        config["tie_word_embeddings"] = False
    (out / "config.json").write_text(json.dumps(config))
    return out


def plain(base: State, adapter: State, scale: Callable[[str, int], float], tokens: list[int]) -> State:
    """The merged state, each rule written out once more: nothing here is shared with what is tested."""
    out = {name: value.double() for name, value in base.items()}
    if "lm_head.weight" not in out:
        out["lm_head.weight"] = out["model.embed_tokens.weight"].clone()
    for key, value in adapter.items():
        tensor = value.double()
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight")
            weight = out[f"{module}.weight"] + scale(module, len(value)) * (
                adapter[f"{module}.lora_B.weight"].double() @ tensor
            )
            if f"{module}.lora_magnitude_vector" in adapter:
                lengths = torch.sqrt((weight * weight).sum(dim=1))
                weight = (adapter[f"{module}.lora_magnitude_vector"].double() / lengths)[:, None] * weight
            out[f"{module}.weight"] = weight
        elif key.endswith(".lora_B.bias"):
            module = key.removesuffix(".lora_B.bias")
            rank = len(adapter[f"{module}.lora_A.weight"])
            out[f"{module}.bias"] = out[f"{module}.bias"] + scale(module, rank) * tensor
        elif key.endswith(".lora_embedding_A"):
            module = key.removesuffix(".lora_embedding_A")
            weight = out[f"{module}.weight"] + scale(module, len(value)) * (
                (adapter[f"{module}.lora_embedding_B"].double() @ tensor).T
            )
            if f"{module}.lora_magnitude_vector" in adapter:
                lengths = torch.sqrt((weight * weight).sum(dim=0))
                weight = adapter[f"{module}.lora_magnitude_vector"].double() / lengths * weight
            out[f"{module}.weight"] = weight
        elif key.endswith(".token_adapter.trainable_tokens_delta"):
            for row, token in enumerate(tokens):
                out[key.removesuffix(".token_adapter.trainable_tokens_delta") + ".weight"][token] = tensor[row]
        elif key in out or key.replace(".base_layer", "") in out:
            out[key.replace(".base_layer", "")] = tensor
    return out


def scale_of(variant: dict[str, Any]) -> Callable[[str, int], float]:
    def scale(module: str, rank: int) -> float:
        if "alpha_pattern" in variant and module.endswith("down_proj"):
            return 3 / rank if ".0." in module else 5 / rank
        return 12 / (rank**0.5 if variant.get("use_rslora") else rank)

    return scale


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_equals_plain_arithmetic_and_pefts_own_forward(tmp_path: Path, kind: str, variant: str) -> None:
    base = save_tiny(tmp_path / "base", kind, **KINDS[kind])
    model = save_adapter(base, tmp_path / "adapter", **VARIANTS[variant])
    merged = write(base, tmp_path / "adapter", tmp_path / "merged")

    state = read(merged)
    expected = plain(read(base), tensors_of(tmp_path / "adapter"), scale_of(VARIANTS[variant]), [3, 70, 5])
    if variant == "tokens":  # peft shares trained tokens with a tied head
        expected["lm_head.weight"] = expected["lm_head.weight"] if "lm_head.weight" in read(base) else torch.empty(0)
    for name, value in state.items():
        torch.testing.assert_close(
            value, expected[name].float(), rtol=2e-6, atol=1e-6, msg=lambda m, n=name: f"{n} {m}"
        )
    assert set(read(base)) <= set(state) <= set(expected)
    assert any(not torch.equal(state[n], v) for n, v in read(base).items())

    ids = torch.arange(40).reshape(2, 20) * 3 % VOCABULARY
    with torch.no_grad():
        ours, theirs = load(merged)(ids).logits, model(ids).logits
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    if KINDS[kind].get("tie_word_embeddings") and variant.startswith("embedding"):
        return  # peft merges into the tensor that the tied head shares, so its merge is not what it trained (0.21.2)
    with torch.no_grad():
        unloaded = model.merge_and_unload()
        torch.testing.assert_close(ours, unloaded(ids).logits, rtol=1e-4, atol=1e-4)
    for name, value in unloaded.state_dict().items():
        if name in state:
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "variant",
    [{"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}, {"bias": "all"}, {"bias": "lora_only"}],
    ids=str,
)
def test_biases(tmp_path: Path, variant: dict[str, Any]) -> None:
    base = save_tiny(tmp_path / "base", "qwen2")
    model = save_adapter(base, tmp_path / "adapter", **variant)
    state = read(write(base, tmp_path / "adapter", tmp_path / "merged"))
    expected = plain(read(base), tensors_of(tmp_path / "adapter"), scale_of(variant), [])
    for name, value in state.items():
        torch.testing.assert_close(value, expected[name].float(), rtol=2e-6, atol=1e-6)
    assert not torch.equal(
        state["model.layers.0.self_attn.q_proj.bias"], read(base)["model.layers.0.self_attn.q_proj.bias"]
    )
    ids = torch.arange(20)[None] % VOCABULARY
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "merged")(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_transposed_layers(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    for variant in ({}, {"use_dora": True}):
        adapter = tmp_path / f"adapter{len(variant)}"
        model = save_adapter(
            tmp_path / "base", adapter, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, **variant
        )
        merged = load(write(tmp_path / "base", adapter, tmp_path / f"merged{len(variant)}"))
        ids = torch.arange(20)[None]
        with torch.no_grad():
            torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


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
    right = plain(read(base), tensors_of(adapter), lambda _, rank: 12 / rank, [])
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
    with pytest.raises(InputError, match=r"nothing in the base takes .*layers\.9"):
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


def test_architectures_converted_on_load_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "moe", "mixtral", num_local_experts=2)
    with pytest.raises(InputError, match="converts the weights of mixtral"):
        plan_merge(base, pair[1], "float32")


def test_a_base_that_is_quantised_already_is_refused(pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    configure_base = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**configure_base, "quantization_config": {"bits": 4}}))
    with pytest.raises(InputError, match="itself quantised"):
        plan_merge(base, adapter, "float32")


def test_lora_bias_without_a_bias_in_the_base_is_refused(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    save_adapter(base, tmp_path / "adapter", lora_bias=True)
    with pytest.raises(InputError, match=r"proj\.bias, which the base does not have"):
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
    expected = plain(read(base), tensors_of(tmp_path / "adapter"), lambda _, rank: 12 / rank, [])
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
            monkeypatch.setattr(merge_blocks, "BLOCK_ELEMENTS", 10**9)
            whole = dict(merged_tensors(plan))
            monkeypatch.setattr(merge_blocks, "BLOCK_ELEMENTS", 300)
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
    monkeypatch.setattr(merge_blocks, "BLOCK_ELEMENTS", 300)
    count = torch.get_num_threads()
    runs = []
    for most in (1, 5):
        monkeypatch.setattr(merge_blocks, "MOST_THREADS", most)
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
    monkeypatch.setattr(merge_blocks, "BLOCK_ELEMENTS", 300)
    plan, before = plan_merge(base, adapter, "bfloat16"), threading.active_count()
    with pytest.raises(FinetuneError, match=r"layers\.1\.mlp\.down_proj\.weight is not finite"):
        list(merged_pieces(plan, plan.targets))
    stopped = merged_pieces(plan, plan.targets)
    next(stopped)
    stopped.close()
    assert threading.active_count() == before
