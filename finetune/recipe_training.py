"""What a recipe says of the model: the base, how it is trained, proved, merged and published, and on what machine.

The sentence below a field is its documentation, as in recipe_data.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic.json_schema import SkipJsonSchema

from finetune.recipe_data import (
    HUB_NAME,
    REPOSITORY,
    Count,
    Fraction,
    NotNegative,
    Pattern,
    Positive,
    Revision,
    Section,
    refuse,
    resolve_path,
)

BUILTIN_MODELS = ("builtin:tiny-mistral",)
GgufKind = Literal[
    "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0",
    "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k",
]  # fmt: skip


class Model(Section):
    """The base model: a Hub name with an optional revision, a folder, or a builtin that is trained here."""

    id: Annotated[str, Field(min_length=1, max_length=400)]
    """OWNER/NAME on the Hub, a folder (/… or ./…), or builtin:tiny-mistral, which is trained here."""
    revision: Revision | None = None
    """A branch, tag or commit of the Hub; null takes the newest commit and pins it."""
    trust_remote_code: bool = False
    """Run Python that lies in the model's repository. Only for publishers you trust with this machine."""
    folder: SkipJsonSchema[Annotated[Path | None, Field(exclude=True)]] = None

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any, info: ValidationInfo) -> Any:  # noqa: ANN401 - raw YAML
        raw = {"id": value} if isinstance(value, str) else value
        if not isinstance(raw, dict) or not isinstance(raw.get("id"), str):
            return raw
        if info.context and "folder" in raw:  # only a file has a context
            refuse([(("folder",), "unknown field; write the folder as the model's id: /path or ./path")])
        name = raw["id"]
        if name.startswith("builtin:"):
            if name not in BUILTIN_MODELS:
                raise ValueError(f"no builtin model {name!r}; there is {', '.join(BUILTIN_MODELS)}")
            return raw
        if name.startswith(("/", "./", "~")) or "\\" in name or name.count("/") > 1:
            folder = resolve_path(name, info)
            return {**raw, "id": f"folder:{folder.name}", "folder": folder}
        if not re.fullmatch(HUB_NAME, name):
            raise ValueError(f"{name!r} is no Hub name (OWNER/NAME), no folder (/… or ./…) and no builtin")
        return raw

    @property
    def kind(self) -> Literal["builtin", "folder", "hub"]:
        """Where the weights come from."""
        if self.id.startswith("builtin:"):
            return "builtin"
        return "folder" if self.folder else "hub"


class Render(Section):
    """From messages to token ids and the label mask."""

    template: str = "auto"
    """The chat template: auto (the base's own), a name in recipes/templates, or a .jinja file beside the recipe."""
    max_length_tokens: Annotated[int, Field(ge=16, le=1_048_576)] = 2048
    """Tokens of a row, at most. GPU memory grows with it."""
    supervise: Literal["assistant", "last", "all"] = "assistant"
    """What is learned: every assistant turn, the last one only, or the questions as well."""
    system: Literal["merge", "refuse"] = "merge"
    """Where the template takes no system message: put it before the first user turn, or stop."""
    overlong: Literal["drop", "truncate"] = "truncate"
    """What happens to a row over max_length_tokens."""
    max_truncated_fraction: Fraction = 0.1
    """Stop (exit 3) where a larger share of the rows would be cut."""
    max_dropped_fraction: Fraction = 0.1
    """Stop (exit 3) where a larger share of the rows would be dropped."""
    verify_rows: Count = 200
    """Rows on which the template is proved to write what the base's own writes."""
    template_file: SkipJsonSchema[Annotated[Path | None, Field(exclude=True)]] = None

    @model_validator(mode="before")
    @classmethod
    def _template_path(cls, value: Any, info: ValidationInfo) -> Any:  # noqa: ANN401 - raw YAML
        if isinstance(value, dict) and info.context and "template_file" in value:
            refuse([(("template_file",), "unknown field; write the file as template: NAME.jinja")])
        if isinstance(value, dict) and isinstance(value.get("template"), str) and value["template"].endswith(".jinja"):
            try:
                path = resolve_path(value["template"], info)
            except ValueError as error:
                refuse([(("template",), f"found {value['template'][:60]!r}; {error}")])
                raise
            return {**value, "template": path.name, "template_file": path}
        return value


class Pack(Section):
    """Whole documents laid into rows of `length_tokens` (default: render.max_length_tokens), none seeing another."""

    method: Literal["bfd"] = "bfd"
    """Best fit decreasing: the longest document first, each into the fullest row that still has room."""
    length_tokens: Annotated[int, Field(ge=16)] | None = None
    """Tokens of a packed row; null takes render.max_length_tokens."""


class Lora(Section):
    """The adapter (arXiv:2106.09685)."""

    r: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank: the adapter's size and what it can hold."""
    alpha: Positive = 32
    """The change is scaled by alpha / r (by alpha / √r with rslora)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs set to zero while training."""
    targets: Literal["all-linear"] | list[str] | Pattern = "all-linear"
    """Which linear modules: all-linear, a list of names, or one expression for the whole module name. Not lm_head."""
    rslora: bool = False
    """Scale by alpha / √r, so that large ranks learn too (arXiv:2312.03732)."""
    dora: bool = False
    """Learn magnitudes beside directions (arXiv:2402.09353); slower."""
    rank_pattern: dict[str, Count] = {}
    """Another rank for modules whose name matches, as in {down_proj: 32}."""
    alpha_pattern: dict[str, Positive] = {}
    """Another alpha for modules whose name matches."""

    @field_validator("targets")
    @classmethod
    def _trainable(cls, targets: str | list[str]) -> str | list[str]:
        names = targets if isinstance(targets, list) else [targets]
        if not names:
            raise ValueError("an empty list trains nothing")
        expression = targets if isinstance(targets, str) and targets != "all-linear" else None
        if expression and re.fullmatch(r"\w+", expression):
            raise ValueError(f"one name is written as a list: [{expression}]")
        for whole, short, why in (
            ("lm_head", "lm_head", "TRL cannot train LoRA on lm_head with its chunked loss; leave it out"),
            ("model.embed_tokens", "embed_tokens", "LoRA on embed_tokens is not supported yet; leave it out"),
        ):
            if any(short in n for n in names) or (expression and re.fullmatch(expression, whole)):
                raise ValueError(why)
        return targets


class Quantization(Section):
    """How the frozen base is stored while training (QLoRA, arXiv:2305.14314)."""

    type: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit code: nf4 for normally distributed weights, or fp4."""
    double: bool = True
    """Store the scales in 8 bits too: about 0.4 bits a weight less."""


class Train(Section):
    """The optimisation. Every figure here changes the adapter; what does not is in `runtime`."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    """The highest step size; a 7B takes about 2e-4 with LoRA."""
    epochs: Positive = 1.0
    """Passes over the rows; fractions are allowed."""
    max_steps: Count | None = None
    """Optimiser steps, in place of epochs; null goes by epochs."""
    batch_rows: Count = 16
    """Rows an optimiser step learns from, on however many GPUs (packed rows where pack is on)."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = "paged_adamw_8bit"
    """AdamW; 8bit stores its state in bytes, paged moves it to RAM when the GPU is full."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate goes on after the warm-up: unchanged, or falling to zero."""
    warmup_fraction: Fraction = 0.03
    """Share of the steps in which the learning rate rises from zero."""
    weight_decay: NotNegative = 0.0
    """AdamW's decay of the adapter's weights."""
    max_grad_norm: Positive = 1.0
    """Longer gradients are scaled down to this norm."""
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """AdamW's memory of squared gradients."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """What is computed in: auto takes bf16 where the GPU has it (Ampere and newer), else fp16; fp32 on a CPU."""


class Evaluate(Section):
    """What is measured on held-out rows after training."""

    max_rows: Count = 256
    """Held-out rows that are scored, at most."""
    generations: Annotated[int, Field(ge=0, le=10_000)] = 32
    """Held-out prompts that are answered, to see whether answers end; 0 answers none."""
    batch_tokens: Count = 4096
    """Tokens scored at once, padding included: memory against speed."""


class Certify(Section):
    """How near the merged model must come to what was trained."""

    base: Literal["auto", "original", "dequantized"] = "auto"
    """Which weights the adapter is merged into: the published ones, those seen in training, or the measured better."""
    tokens: Annotated[int, Field(ge=64)] = 8192
    """Held-out tokens that are compared, about."""
    min_agreement: Fraction = 0.75
    """Stop (exit 3) where merged and trained model agree on a smaller share of the likeliest next tokens."""
    max_perplexity_ratio: Annotated[float, Field(ge=1, le=10)] = 1.1
    """Stop (exit 3) where the merged model's perplexity is more than this many times the trained one's."""


class Merge(Section):
    """How the merged model is written."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """The type of its weights; auto takes what the base is stored in."""
    max_shard_bytes: Annotated[int, Field(ge=1_000_000)] = 5_000_000_000
    """Bytes of a safetensors file, at most (one tensor may be larger)."""


class Export(Section):
    """Other formats of the merged model."""

    gguf: Annotated[list[GgufKind], Field(min_length=1)]
    """GGUF files for llama.cpp and Ollama, one a kind; the Modelfile names the first. q…_k… need llama-quantize."""
    perplexity_rows: Annotated[int, Field(ge=0)] = 256
    """Held-out rows on which the merged model and each file of it are scored, at most; 0 scores none."""


class Publish(Section):
    """Where `finetune publish` pushes, and what."""

    repo: Annotated[str, Field(pattern=REPOSITORY, max_length=200)] | None = None
    """OWNER/NAME of the repository; null asks for --repo."""
    what: Annotated[list[Literal["adapter", "merged", "gguf", "dataset"]], Field(min_length=1)] = ["adapter"]
    """What is pushed: the first to `repo`, each other to the same name with its kind behind it."""
    private: bool = True
    """Whether a repository that is made is private."""
    license: str | None = None
    """The licence the cards name (apache-2.0); while null, what comes of a no-derivatives one is refused (exit 3)."""
    samples: Annotated[int, Field(ge=0, le=10)] = 3
    """Held-out prompts that a model card shows with the answers of base and adapter; 0 shows none."""


class Runtime(Section):
    """How the work is done on this machine. Nothing here changes a result, so nothing here enters a key."""

    micro_batch_rows: Count | Literal["auto"] = "auto"
    """Rows on a GPU at once; must divide train.batch_rows. The rest is accumulated."""
    checkpointing: Literal["auto", "none", "full"] = "auto"
    """Recompute activations rather than hold them: less memory, a third more work. auto does so for large bases."""
    save_steps: Count = 50
    """Optimiser steps between checkpoints."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2  # the older one goes before the newer one is marked complete
    """Checkpoints that stay on disk while training."""
    workers: Count | Literal["auto"] = "auto"
    """Reserved: nothing reads it yet."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""
    memory_budget_gb: Positive | None = None
    """GPU memory that `finetune plan` counts with, in 10⁹ bytes; null takes all of the device."""


class Tracking(Section):
    """Where the curves go, beside metrics.jsonl, which is always written."""

    wandb: bool = False
    """Send them to Weights & Biases."""
    wandb_project: str = "finetune"
    """The project's name there."""
    tensorboard: bool = False
    """Write TensorBoard event files."""
