"""An axolotl file becomes a valid recipe, and every key is accounted for."""

import pytest
import yaml

from finetune.errors import InputError
from finetune.init import axolotl
from finetune.recipe.load import parse_recipe

QLORA = """
base_model: mistralai/Mistral-7B-v0.1
load_in_4bit: true
adapter: qlora
datasets:
  - {path: mhenrichsen/alpaca_2k_test, type: alpaca}
  - {path: ./mine.jsonl, ds_type: json, type: chat_template, field_messages: turns}
val_set_size: 0.1
sequence_len: 8192
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: [gate_proj, down_proj]
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
gradient_checkpointing: true
flash_attention: true
warmup_steps: 10
weight_decay: 0.0
rl: dpo
deepspeed: zero3.json
wandb_project:
"""


def test_every_key_is_translated_done_by_itself_or_listed(tmp_path):
    config = yaml.safe_load(QLORA)
    found = axolotl.translate(config, "mine")
    recipe = parse_recipe(axolotl.text(found), tmp_path / "mine.yaml")
    assert recipe.train.batch_rows == 8 and recipe.lora.r == 32 and recipe.lora.targets == ["gate_proj", "down_proj"]
    assert recipe.render.max_length_tokens == 8192 and recipe.split.eval_fraction == 0.1
    assert recipe.train.optimizer == "adamw_8bit" and recipe.train.precision == "auto" and recipe.quantization
    assert [s.source for s in recipe.data] == ["hub", "local"] and recipe.data[1].columns == {"messages": "turns"}
    assert set(found.lost) == {"rl", "deepspeed", "warmup_steps"}
    assert set(found.by_itself) == {"gradient_checkpointing", "flash_attention"}
    unset = {k for k in config if config[k] is not None} - set(found.lost) - set(found.by_itself)
    assert "rl" not in unset and "wandb_project" not in found.lost


@pytest.mark.parametrize(
    ("key", "value", "field", "becomes"),
    [
        ("adapter", "lora", "quantization", None),
        ("sample_packing", False, "pack", None),
        ("val_set_size", 0, "split", None),
        ("train_on_inputs", True, "render", {"max_length_tokens": 8192, "supervise": "all"}),
        ("lora_target_linear", True, "lora", None),
    ],
)
def test_switches(key, value, field, becomes):
    config = {**yaml.safe_load(QLORA), key: value}
    if key == "adapter":
        config.pop("load_in_4bit")
    recipe = axolotl.translate(config, "x").recipe
    assert field in recipe and (
        recipe[field] == becomes or (field == "lora" and recipe[field]["targets"] == "all-linear")
    )


@pytest.mark.parametrize("text", ["[]", "a: 1", "base_model: [", "\x00"])
def test_what_is_no_configuration_is_refused(text, tmp_path):
    (tmp_path / "a.yml").write_text(text)
    with pytest.raises(InputError, match="--from"):
        axolotl.read(tmp_path / "a.yml")
