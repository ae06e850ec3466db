"""The likelihood of tokens, made a few positions at a time, is that of whole logits."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from finetune.errors import FinetuneError
from finetune.eval import scoring
from finetune.tokenization.token_rows import TokenRow
from tests.helpers.tiny_models import VOCABULARY, load, save_tiny

KINDS = {
    "mistral": {},
    "gemma2": {"final_logit_softcapping": 2.0, "tie_word_embeddings": True},
    "cohere": {"logit_scale": 0.25, "tie_word_embeddings": True},
    "granite": {"logits_scaling": 3.0},
}


@pytest.fixture(scope="module")
def rows():
    generator = np.random.default_rng(3)
    found = []
    for i, n in enumerate((5, 23, 17)):
        ids = generator.integers(3, VOCABULARY, n)
        found.append(TokenRow(str(i), ids, generator.random(n) < 0.6))
    return found


def by_whole_logits(model, ids, attention, wanted):
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1]
    keep = wanted[:, 1:]
    return torch.nn.functional.cross_entropy(logits[keep].float(), ids[:, 1:][keep], reduction="none")


def assert_same(model, rows):
    batch = scoring.padded(rows)
    with torch.no_grad():
        found = scoring.token_nll(model, *batch)
    expected = by_whole_logits(model, *batch)
    assert len(found) == sum(int(r.mask[1:].sum()) for r in rows)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    return found


@pytest.mark.parametrize("positions", [1, 7, 1024])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_that_of_whole_logits_capped_or_scaled_as_the_model_does(tmp_path, monkeypatch, rows, kind, positions):
    monkeypatch.setattr(scoring, "POSITIONS", positions)
    model = load(save_tiny(tmp_path / "base", kind, **KINDS[kind]))
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda _, given, out: seen.append(out.shape[:-1].numel()))
    with torch.no_grad():
        scoring.token_nll(model, *scoring.padded(rows))
    assert max(seen) <= max(positions, len(rows))  # the model's own forward keeps one position a row
    assert_same(model, rows)


def test_a_head_that_was_trained_is_the_one_that_scores_and_the_bases_with_the_adapter_off(tmp_path, rows):
    torch.manual_seed(0)
    settings = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(load(save_tiny(tmp_path / "base")), settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    found = []
    for off in (contextlib.nullcontext(), model.disable_adapter()):
        with off:
            found.append(assert_same(model, rows))
    assert float((found[0] - found[1]).abs().max()) > 1e-2


def test_it_is_the_same_under_the_head_that_trl_puts_on_a_model_it_trains(tmp_path, rows):
    from trl.trainer.sft_trainer import add_fused_lm_head

    model = load(save_tiny(tmp_path / "base", "gemma2", **KINDS["gemma2"]))
    batch = scoring.padded(rows)
    expected = by_whole_logits(model, *batch)
    add_fused_lm_head(model)
    torch.testing.assert_close(assert_same(model, rows), expected, rtol=1e-6, atol=1e-6)


def test_rows_without_a_supervised_token_have_no_likelihood(tmp_path):
    model = load(save_tiny(tmp_path / "base"))
    row = TokenRow("0", np.arange(3, 9), np.zeros(6, dtype=bool))
    with torch.no_grad():
        assert scoring.token_nll(model, *scoring.padded([row])).numel() == 0


def test_a_model_that_goes_past_its_head_is_refused(tmp_path, rows):
    model = load(save_tiny(tmp_path / "base"))
    model.set_output_embeddings(torch.nn.Linear(64, VOCABULARY))
    model.get_output_embeddings = lambda: torch.nn.Linear(64, VOCABULARY)
    with torch.no_grad(), pytest.raises(FinetuneError, match="without calling its head"):
        scoring.token_nll(model, *scoring.padded(rows))
