"""Whether documents can be packed, and which attention a base takes, from a tiny copy of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from finetune.models import attention, trial
from finetune.utils.files import read_json, write_json
from tests.helpers import families, varlen_reference

PACKED = {"llama": "sdpa", "gemma2": "eager", "gptj": "eager", "mixtral": "sdpa", "gemma3": "sdpa"}
NOT_PACKED = {"falcon": "see each other", "mpt": "see each other", "lfm2": "fails on packed rows"}


def config_of(family: str, folder: Path) -> Path:
    model = families.build(family)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", PACKED)
def test_documents_are_packed_where_none_sees_another(family: str, tmp_path: Path) -> None:
    folder, state = config_of(family, tmp_path), torch.get_rng_state()
    assert trial.try_architecture(folder) == trial.Facts(None, PACKED[family])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", NOT_PACKED)
def test_they_are_not_where_one_does(family: str, tmp_path: Path) -> None:
    why = trial.try_architecture(config_of(family, tmp_path)).packing
    assert why is not None and NOT_PACKED[family] in why and str(tmp_path) not in why


def test_a_transformers_that_forgets_where_documents_end_is_caught(tmp_path: Path) -> None:
    """transformers 5.23 makes gpt-oss' masks without `position_ids`."""
    why = trial.try_architecture(config_of("gpt_oss", tmp_path)).packing
    assert why is not None and "see each other" in why


@pytest.mark.parametrize(("family", "suits"), [("llama", True), ("qwen3", True), ("mistral", True), ("granite", True)])
def test_a_variable_length_kernel_suits_plain_softmax(family: str, suits: bool, tmp_path: Path) -> None:
    off = trial.deviation(config_of(family, tmp_path), varlen_reference.register())
    assert (off <= trial.TOLERANCE["fp32"]) == suits


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "falcon", "llama4 text"])
def test_it_suits_none_whose_attention_is_more_or_never_calls_it(family: str, tmp_path: Path) -> None:
    name = varlen_reference.register()
    try:
        off = trial.deviation(config_of(family, tmp_path), name)
    except (*trial.FAILURES, attention.FinetuneError):
        return
    assert off > trial.TOLERANCE["fp32"]


def test_a_copy_is_small_and_keeps_every_kind_of_layer(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "gemma3_text", hidden_size=3840, intermediate_size=15360, num_hidden_layers=48, num_attention_heads=16,
        num_key_value_heads=8, head_dim=256, vocab_size=262208, sliding_window=1024,
    )  # fmt: skip
    config.architectures = ["Gemma3ForCausalLM"]
    config.save_pretrained(tmp_path)
    copied = trial.tiny_copy(tmp_path)
    assert sum(p.numel() for p in copied.parameters()) < 1_000_000
    assert set(copied.config.layer_types) == {"sliding_attention", "full_attention"}
    assert copied.config.sliding_window == trial.WINDOW < min(trial.DOCUMENTS[:2])
    assert trial.try_architecture(tmp_path).packing is None


def test_a_configuration_that_cannot_be_built_is_not_packed(tmp_path: Path) -> None:
    path = config_of("llama", tmp_path) / "config.json"
    write_json(path, {**read_json(path), "hidden_act": "no such function"})
    why = trial.try_architecture(tmp_path).packing
    assert why is not None and "cannot be tried" in why


def test_memory_that_runs_out_is_no_verdict_on_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the trial finds is kept with the base: every later run would believe it."""
    folder = config_of("llama", tmp_path)

    def refuse(*given: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(trial, "_logits", refuse)
    for work in (trial._attention, lambda *given: trial._packing(given[0], "sdpa", given[1])):
        with pytest.raises(MemoryError):
            work(folder, False)


def test_the_trial_needs_no_temporary_folder_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = config_of("llama", tmp_path)
    before = sorted(folder.iterdir())
    monkeypatch.setattr("tempfile.tempdir", "/proc/nowhere")
    assert trial._quantized(folder, "sdpa", False) is None
    assert sorted(folder.iterdir()) == before
