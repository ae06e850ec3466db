"""Translate an axolotl configuration into a recipe; keys without a counterpart are listed, never dropped silently.

The keys are those of axolotl's documented configuration (https://docs.axolotl.ai/docs/config-reference.html).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from finetune.errors import InputError
from finetune.recipe.data import HUB_NAME
from finetune.utils.format import first_line
from finetune.utils.links import read_regular
from finetune.utils.resources import resource

MOST_BYTES = 200_000
# axolotl's key -> section and field of a recipe, where the value is the same
SAME = {
    "sequence_len": "render.max_length_tokens",
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_modules_to_save": "lora.modules_to_save",
    "peft_use_dora": "lora.dora",
    "peft_use_rslora": "lora.rslora",
    "learning_rate": "train.learning_rate",
    "num_epochs": "train.epochs",
    "max_steps": "train.max_steps",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm",
    "adam_beta2": "train.adam_beta2",
    "warmup_ratio": "train.warmup_fraction",
    "neftune_noise_alpha": "train.neftune_alpha",
    "loraplus_lr_ratio": "train.lora_plus_ratio",
    "eval_steps": "train.eval_steps",
    "early_stopping_patience": "train.patience",
    "load_best_model_at_end": "train.keep_best",
    "save_steps": "runtime.save_steps",
    "save_total_limit": "runtime.keep_checkpoints",
    "seed": "seed",
    "hub_model_id": "publish.repo",
    "wandb_project": "tracking.wandb_project",
    "torch_compile": "runtime.compile",
}
FLOATS = {"learning_rate", "num_epochs", "lora_alpha", "lora_dropout", "weight_decay", "max_grad_norm", "warmup_ratio"}
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant",
             "warmup_stable_decay": "wsd"}  # fmt: skip
OPTIMIZERS = {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "adamw_bnb_8bit": "adamw_8bit",
              "adamw_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit",
              "paged_adamw_32bit": "paged_adamw_32bit"}  # fmt: skip
TYPES = {"alpaca": "alpaca", "chat_template": "auto", "sharegpt": "sharegpt", "completion": "text"}
# What this pipeline does by itself, so that the key needs no counterpart.
BY_ITSELF = {
    "gradient_checkpointing": "runtime.checkpointing: auto takes the fastest that fits",
    "gradient_checkpointing_kwargs": "runtime.checkpointing: auto takes the fastest that fits",
    "flash_attention": "the fastest attention that passes its self-test is chosen",
    "sdp_attention": "the fastest attention that passes its self-test is chosen",
    "xformers_attention": "the fastest attention that passes its self-test is chosen",
    "tf32": "chosen by the device",
    "pad_to_sequence_len": "packed rows need no padding",
    "eval_sample_packing": "held-out rows are scored one by one",
    "dataset_prepared_path": "every stage is kept in the store",
    "output_dir": "--artifacts and --scratch",
    "group_by_length": "packing makes it needless",
    "logging_steps": "every step is logged",
    "strict": "a recipe is always checked strictly",
    "model_type": "read from the base's config",
    "tokenizer_type": "read from the base",
    "dataset_processes": "chosen by the machine",
    "resume_from_checkpoint": "a run always resumes from its last complete checkpoint",
    "auto_resume_from_checkpoints": "a run always resumes from its last complete checkpoint",
    "bnb_config_kwargs": "nf4 with double quantization is the default",
}

TRANSLATED = frozenset(  # by the functions below, some of them together
    "base_model revision_of_model trust_remote_code datasets sample_packing val_set_size train_on_inputs adapter "
    "load_in_4bit load_in_8bit lora_target_linear lora_target_modules micro_batch_size gradient_accumulation_steps "
    "lr_scheduler optimizer bf16 fp16 warmup_steps chat_template chat_template_jinja".split()
)


@dataclass
class Translated:
    """The recipe as nested mappings, what is done without a field, and the keys without counterpart with the reason."""

    recipe: dict[str, Any] = field(default_factory=dict)
    by_itself: dict[str, str] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)

    def put(self, path: str, value: object) -> None:
        """Set a field by its dotted path."""
        *sections, name = path.split(".")
        at = self.recipe
        for section in sections:
            at = at.setdefault(section, {})
        at[name] = value


def read(path: Path) -> dict[str, Any]:
    """Return the mapping in an axolotl YAML file. Raises InputError if it is none."""
    try:
        text = read_regular(path, MOST_BYTES + 1)
    except OSError as error:
        raise InputError(f"--from {path}: cannot be read: {error.strerror}") from None
    if len(text) > MOST_BYTES:
        raise InputError(f"--from {path}: larger than {MOST_BYTES:,} bytes; is it an axolotl configuration?")
    try:
        value = yaml.safe_load(text.decode("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"--from {path}: no YAML: {first_line(error)}") from None
    if not isinstance(value, dict) or "base_model" not in value:
        raise InputError(f"--from {path}: no axolotl configuration: it has no base_model")
    return {str(key): inner for key, inner in value.items()}


def translate(config: Mapping[str, Any], name: str) -> Translated:
    """Return the recipe for `config`. Every key of `config` is in the recipe, in `by_itself` or in `lost`."""
    config = {key: value for key, value in config.items() if value not in (None, "", [])}
    out = Translated({"schema": 1, "name": name})
    for part in (_model, _rows, _adapter, _steps, _template):
        part(out, config)
    for key, value in config.items():
        if key in SAME:
            out.put(SAME[key], float(value) if key in FLOATS else value)
        elif key in BY_ITSELF:
            out.by_itself[key] = BY_ITSELF[key]
        elif key not in TRANSLATED:
            out.lost[key] = "no counterpart"
    return out


def _model(out: Translated, config: Mapping[str, Any]) -> None:
    model: dict[str, Any] = {"id": str(config["base_model"])}
    if config.get("revision_of_model"):
        model["revision"] = config["revision_of_model"]
    if config.get("trust_remote_code"):
        model["trust_remote_code"] = True
    out.put("model", model if len(model) > 1 else model["id"])


def _rows(out: Translated, config: Mapping[str, Any]) -> None:
    if "datasets" in config:
        out.put("data", [source for item in config["datasets"] for source in _source(out, item)])
    if not config.get("sample_packing", True):
        out.put("pack", None)
    if "val_set_size" in config:
        share = float(config["val_set_size"])
        if share == 0:
            out.put("split", None)
        elif share < 1:
            out.put("split.eval_fraction", min(share, 0.5))
        else:
            out.put("split", {"eval_fraction": 0.5, "max_eval_rows": math.floor(share)})
    if config.get("train_on_inputs"):
        out.put("render.supervise", "all")


def _source(out: Translated, item: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    path = str(item.get("path", ""))
    files = item.get("data_files")
    local = files or path.startswith((".", "/", "~")) or not re.fullmatch(HUB_NAME, path) or Path(path).exists()
    kind = str(item.get("type", "chat_template")) if not isinstance(item.get("type"), dict) else "own"
    source: dict[str, Any] = {}
    format_ = TYPES.get(kind.partition(":")[0].partition(".")[0])
    if format_ is None:
        out.lost[f"datasets.{path}.type"] = f"{kind}: set format and columns of this source"
    elif format_ != "auto":
        source["format"] = format_
    columns = {}
    if format_ == "auto" and item.get("field_messages") not in (None, "messages", "conversations"):
        columns["messages"] = item["field_messages"]
    if format_ == "text" and item.get("field") not in (None, "text"):
        columns["text"] = item["field"]
    if columns:
        source["columns"] = columns
    known = {"path", "type", "data_files", "split", "revision", "name", "field_messages", "field", "ds_type",
             "message_property_mappings"}  # fmt: skip
    for key in item:
        if key not in known:
            out.lost[f"datasets.{path}.{key}"] = "no counterpart"
    if local:
        for file in [files] if isinstance(files, str) else files or [path]:
            yield {"source": "local", "path": str(file), **source}
        return
    hub = {"config": item.get("name"), "split": item.get("split"), "revision": item.get("revision")}
    yield {"source": "hub", "id": path, **{k: v for k, v in hub.items() if v}, **source}


def _adapter(out: Translated, config: Mapping[str, Any]) -> None:
    kind, named = config.get("adapter", "qlora"), config.get("lora_target_modules")
    if kind not in ("lora", "qlora"):
        out.lost["adapter"] = f"{kind}: only LoRA and QLoRA are trained here"
    elif kind == "lora" and not config.get("load_in_4bit"):
        out.put("quantization", None)
        if config.get("load_in_8bit"):
            out.lost["load_in_8bit"] = "a frozen base is in 4 or 16 bits here; quantization: null is 16"
    if config.get("lora_target_linear") or named == "all-linear":
        out.put("lora.targets", "all-linear")
    elif named:
        out.put("lora.targets", named)


def _steps(out: Translated, config: Mapping[str, Any]) -> None:
    accumulated, steps = config.get("gradient_accumulation_steps"), config.get("max_steps")
    if "micro_batch_size" in config:
        out.put("train.batch_rows", int(config["micro_batch_size"]) * int(accumulated or 1))
    elif accumulated is not None:
        out.lost["gradient_accumulation_steps"] = "without micro_batch_size; set train.batch_rows"
    for key, field_, values in (("lr_scheduler", "schedule", SCHEDULES), ("optimizer", "optimizer", OPTIMIZERS)):
        kind = str(config.get(key))
        if kind in values:
            out.put(f"train.{field_}", values[kind])
        elif key in config:
            out.lost[key] = f"{kind}: train.{field_} has {', '.join(sorted(set(values.values())))}"
    precision = next((key for key in ("bf16", "fp16") if config.get(key) in (True, "full")), None)
    if precision is not None:
        out.put("train.precision", precision)
    warmup = config.get("warmup_steps")
    if warmup is not None and steps:
        out.put("train.warmup_fraction", round(min(1.0, int(warmup) / int(steps)), 4))
    elif warmup is not None:
        out.lost["warmup_steps"] = f"{warmup} steps: set train.warmup_fraction, a share of all steps"
    if "wandb_project" in config:
        out.put("tracking.wandb", True)


def _template(out: Translated, config: Mapping[str, Any]) -> None:
    name = str(config.get("chat_template", "jinja"))
    if resource("templates", f"{name}.jinja"):
        out.put("render.template", name)
    elif name not in ("tokenizer_default", "jinja"):
        out.lost["chat_template"] = f"{name}: set render.template to a name in recipes/templates or a .jinja file"
    if "chat_template_jinja" in config:
        out.lost["chat_template_jinja"] = "save it as NAME.jinja and set render.template: NAME.jinja"


def text(translated: Translated) -> str:
    """The recipe as YAML, one section a line."""
    lines = []
    for key, value in translated.recipe.items():
        if key == "data":
            lines += ["data:", *(f"  - {_flow(source)}" for source in value)]
        else:
            lines.append(f"{key}: {_flow(value)}")
    return "\n".join(lines) + "\n"


def _flow(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000).removesuffix("...\n").strip()
