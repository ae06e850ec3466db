"""The form in which a recipe's sections enter the key of a stage, stable when fields are added or renamed.

Schema 1 hashed every field of a spec. Fields that were added later enter a key only when they differ from their
default, so that artifacts made before the field existed keep their keys. A renamed field keeps its old name in the key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

SCHEMA_1: Mapping[str, str] = {  # class (for a stage's spec: STAGE.Spec) -> its fields when schema 1 was released
    "Certify": "base tokens min_agreement max_perplexity_ratio",
    "Decontaminate": "against ngram embedding_threshold",
    "Dedup": "exact minhash embedding field threshold keep max_dropped_fraction",
    "Echo": "rule",
    "Evaluate": "max_rows generations batch_tokens tasks task_folder tasks_limit",
    "Export": "gguf perplexity_rows",
    "Filter": (
        "max_length_tokens min_length_tokens count min_user_characters max_user_characters "
        "min_assistant_characters max_assistant_characters alternate drop_matching keep_matching rules"
    ),
    "HubSource": "weight rows columns take skip source id config split revision streaming format",
    "Ingest": "max_refused_fraction",
    "LanguageRule": "rule languages min_confidence min_characters",
    "Links": "rule max_share",
    "LocalSource": "weight rows columns take skip source format",
    "Lora": ("r alpha dropout targets rslora dora rank_pattern alpha_pattern last_layers modules_to_save start_from"),
    "Merge": "dtype max_shard_bytes",
    "MinHash": "threshold ngram",
    "Model": "id revision trust_remote_code",
    "Own": "rule function",
    "Pack": "method length_tokens",
    "PydocSource": "weight rows columns take skip source format",
    "Quantization": "type double",
    "Refusals": "rule phrases",
    "Render": (
        "template max_length_tokens supervise system overlong max_truncated_fraction max_dropped_fraction "
        "max_unterminated_fraction prove_rows"
    ),
    "Rendering": "template merge_system",
    "Repetition": "rule max_duplicate_lines max_top_ngram min_words",
    "Sample": "top_k by random diverse clusters",
    "Split": "eval_fraction max_eval_rows group_threshold",
    "Symbols": "rule max_symbols max_digits min_characters",
    "Train": (
        "learning_rate epochs max_steps batch_rows optimizer schedule decay_fraction warmup_fraction "
        "weight_decay max_grad_norm adam_beta2 lora_plus_ratio neftune_alpha eval_steps eval_rows keep_best "
        "patience precision"
    ),
    "Truncated": "rule min_characters",
    "Turns": "rule min_turns max_turns",
    "base.Spec": "model seed",
    "certify.Spec": "seed model quantization precision merge_dtype certify",
    "decontaminate.Spec": "section embedding",
    "dedup.Spec": "exact minhash field threshold keep max_dropped_fraction",
    "embed.Spec": "embedding field",
    "evaluate.Spec": "seed model quantization precision evaluate",
    "export.Spec": "export tokens",
    "filter.Spec": "rules rendering",
    "ingest.Spec": "data max_refused_fraction",
    "merge.Spec": "model quantization merge",
    "pack.Spec": "method length_tokens",
    "sample.Spec": "seed weights rows top_k by random diverse clusters",
    "split.Spec": "seed split",
    "train.Spec": "seed model lora quantization train",
}
RENAMED: Mapping[tuple[str, str], str] = {("Dedup", "jaccard"): "minhash"}  # (class, field) -> name in schema 1
RENAMED_CLASSES: Mapping[str, str] = {"Jaccard": "MinHash"}  # class -> its name in schema 1


def key_form(section: BaseModel) -> dict[str, Any]:
    """Return `section` (a spec, or a section inside one) as the JSON that enters a stage's key.

    Fields that are excluded from dumps (local paths) are left out; so are fields that schema 1 did not have and that
    hold their default.
    """
    names = [_key_name(c) for c in type(section).__mro__ if issubclass(c, BaseModel)]
    first = {field for name in names for field in SCHEMA_1.get(name, "").split()}
    dumped = section.model_dump(mode="json")
    form: dict[str, Any] = {}
    for field, info in type(section).model_fields.items():
        if info.exclude:
            continue
        now = getattr(section, field)
        old_name = next((RENAMED[name, field] for name in names if (name, field) in RENAMED), field)
        if old_name in first or now != info.get_default(call_default_factory=True):
            form[old_name] = _value_form(now) if _has_sections(now) else dumped[field]
    return form


def _value_form(value: object) -> object:
    if isinstance(value, BaseModel):
        return key_form(value)
    if isinstance(value, Mapping):
        return {name: _value_form(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_value_form(inner) for inner in value]
    return value


def _key_name(section: type) -> str:
    name = RENAMED_CLASSES.get(section.__name__, section.__name__)
    return f"{section.__module__.rpartition('.')[2]}.Spec" if name == "Spec" else name


def _has_sections(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(_has_sections(inner) for inner in value.values())
    if isinstance(value, (list, tuple)):
        return any(_has_sections(inner) for inner in value)
    return isinstance(value, BaseModel)
