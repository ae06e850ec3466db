"""The streamed model is the ordinary model, and holds one layer at a time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.context import Context
from finetune.errors import InputError
from finetune.merge.nf4_round_trip import RoundTrip
from finetune.merge.plan import plan_merge
from finetune.merge.unmerged import attach_empty
from finetune.models import loading
from finetune.models.layerwise import StreamedModel, decoder_layers, empty_model, final_hidden, head_logits
from finetune.recipe import Model, Quantization, Runtime, Tracking
from finetune.stages.merge import _anonymous_bytes
from finetune.utils.files import write_json
from tests.helpers.tiny_models import VOCABULARY, load, save_adapter, save_tiny

KINDS: dict[str, dict[str, Any]] = {
    "mistral": {},
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 3.0, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_the_ordinary_forward(tmp_path: Path, kind: str) -> None:
    base = save_tiny(tmp_path / "base", kind, **KINDS[kind])
    state = load_file(base / "model.safetensors")
    ids = (torch.arange(60).reshape(3, 20) * 7) % VOCABULARY
    model = load(base)
    with torch.no_grad():
        expected = model(ids).logits
    streamed = StreamedModel(empty_model(base), state.__getitem__)
    whole, short = streamed.hidden([ids, ids[:1, :7]])
    with streamed.head() as head:
        logits = head(whole.reshape(-1, whole.shape[-1])).reshape(expected.shape)
        torch.testing.assert_close(head(short[0]), expected[0, :7], rtol=0, atol=1e-5)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(head_logits(model, final_hidden(model, ids)[0]), expected[0], rtol=0, atol=1e-5)


def test_one_layer_is_in_place_at_a_time_and_each_weight_is_asked_for_once(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    state = load_file(base / "model.safetensors")
    model = empty_model(base)
    asked: list[str] = []

    def weights(name: str) -> torch.Tensor:
        asked.append(name)
        held = {int(n.split(".")[2]) for n, p in model.named_parameters() if ".layers." in n and not p.is_meta}
        assert held <= {int(name.split(".")[2]) - 1} if ".layers." in name else not held  # the next one is fetched
        return state[name]

    streamed = StreamedModel(model, weights)
    streamed.hidden([torch.zeros(2, 8, dtype=torch.int64), torch.ones(1, 3, dtype=torch.int64)])
    assert all(p.is_meta for p in model.parameters())
    with streamed.head():
        assert not model.lm_head.weight.is_meta
    assert all(p.is_meta for p in model.parameters())
    assert sorted(asked) == sorted(state)


def test_right_padding_changes_nothing_on_the_left(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    model = load(base)
    ids = torch.arange(3, 23)[None]
    padded = torch.cat([ids, torch.zeros(1, 12, dtype=torch.int64)], dim=1)
    torch.testing.assert_close(final_hidden(model, padded)[:, :20], final_hidden(model, ids), rtol=0, atol=1e-5)


def test_layers_come_in_order(tmp_path: Path) -> None:
    model = empty_model(save_tiny(tmp_path / "base"))
    assert decoder_layers(model) == [model.model.layers[0], model.model.layers[1]]


@pytest.mark.parametrize(
    ("kind", "variant"),
    [
        ("mistral", {}),
        ("mistral", {"modules_to_save": ["norm", "lm_head"]}),
        ("qwen2", {"use_dora": True}),
        ("qwen2", {"target_modules": ["embed_tokens", "v_proj"]}),
        ("qwen2", {"trainable_token_indices": [3, 70, 5]}),
        ("qwen2", {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}),
        ("qwen2", {"bias": "all"}),
        ("gemma2", {"modules_to_save": ["embed_tokens"]}),
    ],
    ids=str,
)
def test_the_trained_model_is_what_training_loads(tmp_path: Path, kind: str, variant: dict[str, Any]) -> None:
    base = save_tiny(tmp_path / "base", kind, dtype="bfloat16", **KINDS[kind])
    write_json(base / "base.json", {"id": "builtin:tiny-mistral", "revision": None, "dtype": "bfloat16"})
    save_adapter(base, tmp_path / "adapter", **variant)
    from peft import PeftModel

    ids = (torch.arange(40).reshape(2, 20) * 7) % VOCABULARY
    ctx = Context(scratch=tmp_path, runtime=Runtime(), tracking=Tracking())
    source = Model(id="builtin:tiny-mistral")
    attention = "eager" if kind == "gemma2" else "sdpa"  # transformers has no other for it
    loaded = loading.load_base(source, base, ctx, Quantization(), "fp32", "cpu", attention)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(loaded, tmp_path / "adapter").eval()(ids).logits

    plan = plan_merge(base, tmp_path / "adapter", "float32", RoundTrip("nf4", Quantization().double, "float32"))
    empty = empty_model(base)
    streamed = StreamedModel(empty, attach_empty(empty, tmp_path / "adapter", plan))
    whole = streamed.hidden([ids])[0]
    with streamed.head() as head:
        torch.testing.assert_close(head(whole.reshape(-1, 64)).reshape(expected.shape), expected, rtol=0, atol=1e-4)
    assert all(p.is_meta for p in empty.parameters())


def test_an_adapter_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    save_adapter(base, tmp_path / "adapter")
    plan = plan_merge(base, tmp_path / "adapter", "float32")
    path = tmp_path / "adapter/adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.other": torch.zeros(1)}, path)
    with pytest.raises(InputError, match=r"no module for the adapter tensor base_model\.model\.other"):
        attach_empty(empty_model(base), tmp_path / "adapter", plan)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_a_layer_held_is_given_back(tmp_path: Path) -> None:
    """glibc keeps freed blocks of under 32 MB: without asking for them each pass left 44 MB more behind."""
    shape = {"hidden_size": 1024, "intermediate_size": 1536, "num_hidden_layers": 12, "head_dim": 256}
    base = save_tiny(tmp_path / "base", num_hidden_layers=1)
    config = json.loads((base / "config.json").read_text())
    write_json(base / "config.json", {**config, **shape})
    model = empty_model(base)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    streamed = StreamedModel(model, lambda name: torch.full(shapes[name], 0.01, dtype=torch.bfloat16))
    ids = [torch.zeros(1, 8, dtype=torch.int64)]
    streamed.hidden(ids)  # whatever the first forward allocates for good
    before = _anonymous_bytes()
    streamed.hidden(ids)
    after = _anonymous_bytes()
    assert before is not None and after is not None and after - before < 20_000_000, after - before
