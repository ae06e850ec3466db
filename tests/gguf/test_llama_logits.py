"""llama.cpp's own logits of every architecture that is written, at values that are easily left out of a file.

The proof for those that transformers does not read back, and a second one for the others. Needs llama-cpp-python.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune.gguf import support
from finetune.utils.files import read_json
from tests.gguf.test_writer import write
from tests.helpers.tiny_models import load, save_tiny

TOKENS = 220
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 8}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"head_dim": 32, "sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", {**GEMMA, "num_hidden_layers": 6}),
    "gemma3 linear": (
        "gemma3_text",
        {
            **GEMMA, "num_hidden_layers": 6,
            "rope_parameters": {
                "full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        },
    ),
    "phi3": ("phi3", {"sliding_window": None}),
    "stablelm": ("stablelm", {"partial_rotary_factor": 0.5, "use_qkv_bias": True}),
    "stablelm parallel": ("stablelm", {"partial_rotary_factor": 0.25, "use_parallel_residual": True}),
    "starcoder2": ("starcoder2", {"use_bias": True, "sliding_window": None}),
    "olmo2": ("olmo2", {"num_key_value_heads": 2}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1,
            "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
        },
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 6}),
    "cohere2": ("cohere2", {"num_hidden_layers": 6, "sliding_window": 8, "logit_scale": 0.25}),
    "glm4": ("glm4", {"head_dim": 32, "partial_rotary_factor": 0.5}),
}  # fmt: skip
ROPES = {"linear": LINEAR, "yarn": YARN, "llama3": LLAMA3}
for _arch in {a.name: a for a in support.ARCHITECTURES.values()}.values():
    for _rope in (name for name in ROPES if name in _arch.ropes):
        _kind, _config = CASES[_arch.name]
        if _arch.name != "gemma3":  # which has them by kind of layer: above
            _share = {k: v for k, v in _config.items() if k == "partial_rotary_factor"}
            CASES[f"{_arch.name} {_rope}"] = (_kind, {**_config, "rope_parameters": {**ROPES[_rope], **_share}})


def config_of(folder: Path) -> support.Architecture:
    return support.of_config(read_json(folder / "config.json"))


def difference(folder: Path, path: Path) -> float:
    """The largest difference of llama.cpp's logits from transformers', as a share of the largest logit."""
    llama_cpp = pytest.importorskip("llama_cpp")
    ids = ((np.arange(TOKENS) * 37 + 11) % 120 + 3).tolist()
    options = {"n_ctx": 256, "n_batch": 256, "n_threads": 1, "verbose": False, "logits_all": True}
    model = llama_cpp.Llama(str(path), type_k=0, type_v=0, flash_attn=False, swa_full=True, **options)
    model.eval(ids)
    with torch.no_grad():
        expected = load(folder)(torch.tensor([ids])).logits[0].numpy()
    found = model.scores[:TOKENS]
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_the_same_logits(tmp_path: Path, name: str) -> None:
    pytest.importorskip("llama_cpp")
    kind, config = CASES[name]
    folder = save_tiny(tmp_path / "model", kind, **config)
    apart = difference(folder, write(folder, tmp_path / "x.gguf", "f32"))
    print(f"{name}: {apart:.2e}")
    assert apart < (1e-3 if config_of(folder).activation == support.GELU else 1e-4)  # its GELU is a table in f16


def test_every_architecture_is_compared() -> None:
    written = {support.ARCHITECTURES[c].name for c in support.ARCHITECTURES}
    assert written == {name.split()[0].replace("mistral", "llama") for name in CASES}


REFUSED: list[tuple[str, dict[str, Any], str]] = [  # what llama.cpp fails on when it loads, or computes otherwise
    ("olmo2", {"tie_word_embeddings": True}, "no olmo2 with tie_word_embeddings: true"),
    ("olmo2", {"attention_bias": True}, "no olmo2 with attention_bias: true"),
    ("stablelm", {"tie_word_embeddings": True}, "no stablelm with tie_word_embeddings: true"),
    ("starcoder2", {"use_bias": False}, "no starcoder2 with use_bias: false"),
    ("qwen3", {"attention_bias": True}, "no qwen3 with attention_bias: true"),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 0, 1, 0]}, "every 4th layer of a smollm3 to have no rotary"),
    (
        "smollm3",
        {"no_rope_layers": None, "no_rope_layer_interval": 2},
        "every 4th layer of a smollm3 to have no rotary",
    ),
    ("cohere2", {"layer_types": None, "sliding_window_pattern": 2}, "every 4th layer of a cohere2"),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 8}, "no smollm3 with use_sliding_window: true"),
    ("cohere2", {"layer_types": ["full_attention"] * 6}, "every 4th layer of a cohere2"),
    ("cohere2", {"tie_word_embeddings": False}, "no cohere2 with tie_word_embeddings: false"),
    ("gemma2", {"tie_word_embeddings": False}, "no gemma2 with tie_word_embeddings: false"),
    ("llama", {"hidden_act": "gelu"}, "silu in a llama, and this model has gelu"),
    ("qwen2", {"head_dim": 32}, "heads of 16 in a qwen2, and these have 32"),
    ("llama", {"rope_parameters": {**LLAMA3, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ("llama", {"rope_parameters": {**YARN, "beta_fast": 8}}, "yarn with beta_fast: 8"),
    ("qwen3", {"rope_parameters": {**YARN, "attention_factor": 1.0}}, "yarn with attention_factor: 1.0"),
    ("qwen2", {"rope_parameters": LLAMA3}, "qwen2 with rope_type llama3"),
    ("glm4", {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 2]}}, "glm4 with mrope_section"),
]


@pytest.mark.parametrize(("name", "change", "words"), REFUSED, ids=[f"{n}-{'-'.join(c)}" for n, c, _ in REFUSED])
def test_what_llama_cpp_cannot_hold_is_refused(name: str, change: dict[str, Any], words: str) -> None:
    kind, config = CASES[name]
    (class_name, *_) = (c for c, a in support.ARCHITECTURES.items() if a.name == name and "Mistral" not in c)
    plain = {**settings(kind, config), "architectures": [class_name]}
    assert support.problem(plain) is None
    assert words in str(support.problem({**plain, **change}))


def settings(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    """A config.json of the shape that `save_tiny` gives a model."""
    from transformers import AutoConfig

    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    shape |= {"head_dim": 16, "max_position_embeddings": 256}
    return dict(AutoConfig.for_model(kind, **{**shape, **config}).to_dict())


def test_a_window_that_llama_cpp_does_not_keep_is_said() -> None:
    window = {"sliding_window": 32}
    mistral = {**settings("mistral", window), "architectures": ["MistralForCausalLM"]}
    assert "in texts of more than 32 tokens" in support.window_note(mistral)
    assert support.window_note({**mistral, "sliding_window": None}) == ""
    assert support.window_note({**mistral, "sliding_window": 256}) == ""  # all the positions that it has
    qwen2 = {**settings("qwen2", window), "architectures": ["Qwen2ForCausalLM"]}
    assert support.window_note({**qwen2, "sliding_window": 32, "use_sliding_window": False}) == ""
    assert support.window_note({**mistral, "architectures": ["Cohere2ForCausalLM"]}) == ""  # which has windows
