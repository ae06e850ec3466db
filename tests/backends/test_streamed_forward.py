"""The streamed model is the ordinary model, and holds one layer at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune.backends.streamed_forward import StreamedModel, decoder_layers, empty_model, final_hidden, head_logits
from tests.tiny_models import VOCABULARY, load, save_tiny

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


def test_one_layer_is_held_at_a_time_and_each_weight_is_asked_for_once(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    state = load_file(base / "model.safetensors")
    model = empty_model(base)
    asked: list[str] = []

    def weights(name: str) -> torch.Tensor:
        asked.append(name)
        held = {n.split(".")[2] for n, p in model.named_parameters() if ".layers." in n and not p.is_meta}
        assert held <= {name.split(".")[2]} if ".layers." in name else not held
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
