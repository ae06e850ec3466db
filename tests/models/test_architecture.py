"""What is known of an architecture without asking transformers is what transformers answers; peft's rules likewise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.merge.adapter_config import AdapterConfig
from finetune.models import skeleton
from finetune.models.architecture import KNOWN, known_layout, known_modules, modules_of
from finetune.models.layerwise import empty_model
from tests.helpers.tiny_models import save_tiny
from tests.stages.finished import finish

SMALL = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {}),
    "mistral tied": ("mistral", {"tie_word_embeddings": True}),
    "llama": ("llama", {}),
    "llama biased": ("llama", {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 3}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"tie_word_embeddings": True}),
    "gemma2 biased": ("gemma2", {"tie_word_embeddings": False, "attention_bias": True}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_known_is_what_transformers_says(tmp_path: Path, name: str) -> None:
    kind, config = CONFIGS[name]
    base = save_tiny(tmp_path, kind, **SMALL, **config)
    path = base / "config.json"
    tied = config.get("tie_word_embeddings", False)
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": tied}))  # as on the Hub
    known = skeleton._known(json.loads(path.read_text()))
    asked = skeleton._asked(base, False, True)
    assert known is not None
    assert (known.parameters, known.quantized) == (asked.parameters, asked.quantized)
    assert (known.tied, known.input_embedding) == (asked.tied, asked.input_embedding)
    holding = {m: k for m, k in asked.kinds.items() if any(p.startswith(f"{m}.") for p in asked.parameters)}
    assert known.kinds == {**holding, "lm_head": "linear"}  # what holds no tensor (rotary tables) is left out


@pytest.mark.parametrize("name", CONFIGS)
def test_the_modules_that_are_known_are_those_of_the_class(tmp_path: Path, name: str) -> None:
    kind, config = CONFIGS[name]
    base = save_tiny(tmp_path, kind, **SMALL, **config)
    tied = config.get("tie_word_embeddings", False)
    known = known_modules({**json.loads((base / "config.json").read_text()), "tie_word_embeddings": tied})
    assert known is not None
    asked = modules_of(empty_model(base))
    assert [sorted(part) for part in (asked.every, asked.linear, asked.own)] == [
        list(part) for part in (known.every, known.linear, known.own)
    ]


def test_every_known_architecture_is_compared() -> None:
    assert {kind for kind, _ in CONFIGS.values()} == set(KNOWN)


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["LlamaForSequenceClassification"]},
        {"model_type": "mistral"},
        {"model_type": "phi"},
        {"auto_map": {}},
        {"tie_word_embeddings": None},
        {"num_hidden_layers": None},
    ],
    ids=str,
)
def test_whatever_is_left_open_is_for_transformers(change: dict[str, Any]) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}
    config["tie_word_embeddings"] = False
    assert known_layout(config) is not None
    assert known_layout({**config, **change}) is None


MODULES = [
    *(f"model.layers.{i}.{m}" for i in (0, 1, 11) for m in ("self_attn.q_proj", "mlp.down_proj", "mlp.my_q_proj")),
    "lm_head", "model.embed_tokens", "q_proj", "layers.1.q_proj", "model.layers.1.experts.0.q_proj", "model.norm",
]  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ""},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "(layers|h)"},
        {"target_modules": ["q_proj", "model.layers.1.mlp.down_proj", "lm_head"]},
        {"target_modules": r".*\.1\..*_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1, 11]},
        {"target_modules": ["q_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj"], "layers_to_transform": []},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "experts"},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "layers_pattern": ["blocks", "layers"]},
        {"target_modules": ["q_proj", "down_proj"], "exclude_modules": ["mlp.down_proj", "layers.0.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "down_proj"], "exclude_modules": r".*\.11\..*"},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head", "layers.1"]},
    ],
    ids=str,
)
def test_the_modules_an_adapter_names_are_those_that_peft_finds(fields: dict[str, Any]) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    ours, theirs = AdapterConfig.of(fields), LoraConfig(**fields)
    found = {m: ours.targets(m) for m in MODULES}
    assert found == {m: bool(check_target_module_exists(theirs, m)) for m in MODULES}


def test_defaults_are_pefts() -> None:
    from dataclasses import asdict

    from peft import LoraConfig

    theirs = LoraConfig().to_dict()
    ours = {k: v for k, v in asdict(AdapterConfig()).items() if k != "target_modules"}
    assert ours == {name: theirs[name] for name in ours}
    assert AdapterConfig.of(theirs) == AdapterConfig()


def test_a_merge_imports_no_more_than_torch(tmp_path: Path) -> None:
    """transformers, peft and bitsandbytes took most of the time of a merge in a process of its own."""
    inputs = {name: str(path) for name, path in finish(tmp_path).items()}
    config = Path(inputs["base"]) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": False}))
    program = f"""
import sys
from pathlib import Path
from finetune.context import Context
from finetune.recipe import Recipe, Runtime, Tracking
from finetune.stages import merge
raw = {{"name": "x", "model": "builtin:tiny-mistral", "data": [{{"source": "pydoc"}}]}}
out = Path({str(tmp_path / "out")!r})
out.mkdir()
ctx = Context(scratch=out, runtime=Runtime(), tracking=Tracking(), device="cpu")
merge.run(merge.spec(Recipe.model_validate(raw)), {{k: Path(v) for k, v in {inputs!r}.items()}}, out, ctx)
print([m for m in ("transformers", "peft", "bitsandbytes", "accelerate", "scipy", "pandas") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
    assert (tmp_path / "out/model.safetensors").is_file()
