"""Translate an axolotl configuration into a recipe; keys without a counterpart are listed, never dropped silently.

The keys are those of axolotl's documented configuration (https://docs.axolotl.ai/docs/config-reference.html).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from finetune.errors import InputError
from finetune.recipe.data import HUB_NAME
from finetune.utils.format import first_line
from finetune.utils.links import read_regular

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
    out = Translated({"schema": 1, "name": name})
    special: dict[str, Callable[[Translated, Mapping[str, Any]], None]] = {
        "base_model": _model, "revision_of_model": _nothing, "trust_remote_code": _nothing, "datasets": _datasets,
        "adapter": _adapter, "load_in_4bit": _nothing, "load_in_8bit": _nothing, "lora_target_linear": _targets,
        "lora_target_modules": _targets, "micro_batch_size": _batch, "gradient_accumulation_steps": _nothing,
        "sample_packing": _packing, "val_set_size": _held_out, "lr_scheduler": _schedule, "optimizer": _optimizer,
        "bf16": _precision, "fp16": _precision, "warmup_steps": _warmup, "train_on_inputs": _supervise,
        "chat_template": _template, "chat_template_jinja": _nothing, "wandb_project": _wandb,
    }  # fmt: skip
    for key, value in config.items():
        if value is None or value == "" or value == []:
            continue
        if key in special:
            special[key](out, config)
        elif key in BY_ITSELF:
            out.by_itself[key] = BY_ITSELF[key]
        elif key not in SAME:
            out.lost[key] = "no counterpart"
        if key in SAME:
            out.put(SAME[key], float(value) if key in FLOATS else value)
    if "gradient_accumulation_steps" in config and "micro_batch_size" not in config:
        out.lost["gradient_accumulation_steps"] = "without micro_batch_size; set train.batch_rows"
    if config.get("chat_template_jinja"):
        out.lost["chat_template_jinja"] = "save it as NAME.jinja and set render.template: NAME.jinja"
    return out


def _nothing(out: Translated, config: Mapping[str, Any]) -> None:
    """A key that another one's translation reads."""


def _model(out: Translated, config: Mapping[str, Any]) -> None:
    model: dict[str, Any] = {"id": str(config["base_model"])}
    if config.get("revision_of_model"):
        model["revision"] = config["revision_of_model"]
    if config.get("trust_remote_code"):
        model["trust_remote_code"] = True
    out.put("model", model if len(model) > 1 else model["id"])


def _datasets(out: Translated, config: Mapping[str, Any]) -> None:
    out.put("data", [source for item in config["datasets"] for source in _source(out, item)])


def _source(out: Translated, item: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    import re

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
    kind = config["adapter"]
    if kind not in ("lora", "qlora"):
        out.lost["adapter"] = f"{kind}: only LoRA and QLoRA are trained here"
    elif kind == "lora" and not config.get("load_in_4bit"):
        out.put("quantization", None)
        if config.get("load_in_8bit"):
            out.lost["load_in_8bit"] = "a frozen base is in 4 or 16 bits here; quantization: null is 16"


def _targets(out: Translated, config: Mapping[str, Any]) -> None:
    named = config.get("lora_target_modules")
    if config.get("lora_target_linear") or named == "all-linear":
        out.put("lora.targets", "all-linear")
    elif named:
        out.put("lora.targets", named)


def _batch(out: Translated, config: Mapping[str, Any]) -> None:
    out.put("train.batch_rows", int(config["micro_batch_size"]) * int(config.get("gradient_accumulation_steps") or 1))


def _packing(out: Translated, config: Mapping[str, Any]) -> None:
    if not config["sample_packing"]:
        out.put("pack", None)


def _held_out(out: Translated, config: Mapping[str, Any]) -> None:
    share = float(config["val_set_size"])
    if share == 0:
        out.put("split", None)
    elif share < 1:
        out.put("split.eval_fraction", min(share, 0.5))
    else:
        out.put("split", {"eval_fraction": 0.5, "max_eval_rows": math.floor(share)})


def _schedule(out: Translated, config: Mapping[str, Any]) -> None:
    kind = str(config["lr_scheduler"])
    if kind in SCHEDULES:
        out.put("train.schedule", SCHEDULES[kind])
    else:
        out.lost["lr_scheduler"] = f"{kind}: train.schedule has constant, linear, cosine, wsd"


def _optimizer(out: Translated, config: Mapping[str, Any]) -> None:
    kind = str(config["optimizer"])
    if kind in OPTIMIZERS:
        out.put("train.optimizer", OPTIMIZERS[kind])
    else:
        out.lost["optimizer"] = f"{kind}: train.optimizer has {', '.join(sorted(set(OPTIMIZERS.values())))}"


def _precision(out: Translated, config: Mapping[str, Any]) -> None:
    for key in ("bf16", "fp16"):
        if config.get(key) in (True, "full"):
            out.put("train.precision", key)
            return


def _warmup(out: Translated, config: Mapping[str, Any]) -> None:
    steps = config.get("max_steps")
    if steps:
        out.put("train.warmup_fraction", round(min(1.0, int(config["warmup_steps"]) / int(steps)), 4))
    else:
        out.lost["warmup_steps"] = f"{config['warmup_steps']} steps: set train.warmup_fraction, a share of all steps"


def _supervise(out: Translated, config: Mapping[str, Any]) -> None:
    if config["train_on_inputs"]:
        out.put("render.supervise", "all")


def _template(out: Translated, config: Mapping[str, Any]) -> None:
    from finetune.utils.resources import resource

    name = str(config["chat_template"])
    if name in ("tokenizer_default", "jinja"):
        return
    if resource("templates", f"{name}.jinja"):
        out.put("render.template", name)
    else:
        out.lost["chat_template"] = f"{name}: set render.template to a name in recipes/templates or a .jinja file"


def _wandb(out: Translated, config: Mapping[str, Any]) -> None:
    out.put("tracking.wandb", True)


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
