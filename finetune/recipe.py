"""The recipe: every field a person may write, its range and its default.

All models are frozen and refuse unknown fields. Validation touches no GPU, network or environment, and nothing is
written back afterwards: what can be derived is a property. Local paths are kept out of dumps (`exclude=True`), because
a stage's key is made of what a file holds, never of where it lies. Reading YAML is `recipe_file.py`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
HubId = Annotated[str, Field(pattern=r"^[\w][\w.-]*(/[\w][\w.-]*)?$", max_length=200)]
Revision = Annotated[str, Field(pattern=r"^[\w][\w./-]*$", max_length=200)]
Format = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "llama2_text", "text"]


class Section(BaseModel):
    """Common to every part of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), populate_by_name=True)


def resolve_path(value: str, info: ValidationInfo) -> Path:
    """A path of the recipe as an absolute one: beside the recipe first, else under the working directory.

    A relative path may not climb out with `..`: a recipe somebody sends you must not read your other folders.
    """
    path = Path(value).expanduser()
    if path.is_absolute():
        return path
    if ".." in path.parts:
        raise ValueError("a relative path stays inside the recipe's folder; write an absolute path for any other place")
    context = info.context or {}
    beside = Path(context.get("folder", ".")).absolute() / path
    return beside if beside.exists() else Path(context.get("working_folder", ".")).absolute() / path


class Model(Section):
    """The base model: a Hub name with an optional revision, a folder, or a builtin that is trained here."""

    id: Annotated[str, Field(min_length=1, max_length=400)]
    revision: Revision | None = None
    trust_remote_code: bool = False
    folder: Annotated[Path | None, Field(exclude=True)] = None

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any, info: ValidationInfo) -> Any:  # noqa: ANN401 - raw YAML
        raw = {"id": value} if isinstance(value, str) else value
        if not isinstance(raw, dict) or not isinstance(raw.get("id"), str):
            return raw
        name = raw["id"]
        if name.startswith("builtin:"):
            if name not in BUILTIN_MODELS:
                raise ValueError(f"no builtin model {name!r}; there is {', '.join(BUILTIN_MODELS)}")
            return raw
        if name.startswith(("/", "./", "~")) or "\\" in name or name.count("/") > 1:
            folder = resolve_path(name, info)
            return {**raw, "id": f"folder:{folder.name}", "folder": folder}
        if not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", name):
            raise ValueError(f"{name!r} is no Hub name (OWNER/NAME), no folder (/… or ./…) and no builtin")
        return raw

    @property
    def kind(self) -> Literal["builtin", "folder", "hub"]:
        """Where the weights come from."""
        if self.id.startswith("builtin:"):
            return "builtin"
        return "folder" if self.folder else "hub"


BUILTIN_MODELS = ("builtin:tiny-mistral",)


class _SourceFields(Section):
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    columns: dict[str, str] = {}
    take: Count | None = None
    skip: Annotated[int, Field(ge=0)] = 0


class HubSource(_SourceFields):
    """A dataset on the Hugging Face Hub."""

    source: Literal["hub"]
    id: HubId
    config: str | None = None
    split: str = "train"
    revision: Revision | None = None
    streaming: bool = False
    format: Format = "auto"

    @property
    def label(self) -> str:
        """The source's name in row ids."""
        return self.id


class LocalSource(_SourceFields):
    """A jsonl, json, csv or parquet file, plain or as .gz or .zst."""

    source: Literal["local"]
    path: Annotated[Path, BeforeValidator(lambda v, i: resolve_path(v, i) if isinstance(v, str) else v)] = Field(
        exclude=True
    )
    format: Format = "auto"

    @property
    def label(self) -> str:
        """The source's name in row ids."""
        return self.path.name


class PydocSource(_SourceFields):
    """Instruction rows made from the documentation of the Python that runs this."""

    source: Literal["pydoc"]
    format: Literal["messages"] = "messages"

    @property
    def label(self) -> str:
        """The source's name in row ids."""
        return "pydoc"


Source = Annotated[HubSource | LocalSource | PydocSource, Discriminator("source")]


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return pattern


Pattern = Annotated[str, BeforeValidator(lambda v: _compiles(v) if isinstance(v, str) else v)]


class Ingest(Section):
    """How strict reading is."""

    max_refused_fraction: Fraction = 0.01


class Filter(Section):
    """Which rows are kept; every other row goes to rejects.parquet with its reason."""

    max_length_tokens: Count | None = None
    count: Literal["raw", "rendered"] = "raw"
    min_user_characters: Annotated[int, Field(ge=0)] = 1
    max_user_characters: Count | None = None
    min_assistant_characters: Annotated[int, Field(ge=0)] = 1
    max_assistant_characters: Count | None = None
    alternate: bool = True
    drop_matching: list[Pattern] = []
    keep_matching: list[Pattern] = []


class Dedup(Section):
    """Exact duplicates, then near-duplicates by cosine."""

    exact: bool = True
    embedding: Annotated[str, Field(min_length=1)] | None = "lsa"
    field: Literal["instruction", "output", "both"] = "output"
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.95
    keep: Annotated[str, Field(pattern=r"^(longest|first|column:.+)$")] = "longest"
    max_dropped_fraction: Fraction = 0.9


class Decontaminate(Section):
    """Drop training rows that share text with evaluation data."""

    against: Annotated[list[Source], Field(min_length=1)]
    ngram: Annotated[int, Field(ge=5, le=50)] = 13


class Sample(Section):
    """Which of the curated rows are used: all of them, n at random, or the k with most tokens."""

    top_k: Count | None = None
    random: Count | None = None

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if self.top_k and self.random:
            raise ValueError("top_k and random are two different rules: keep one")
        return self


class Split(Section):
    """The held-out share, taken by whole near-duplicate groups."""

    eval_fraction: Annotated[float, Field(gt=0, le=0.5)] = 0.05
    max_eval_rows: Count = 1000
    group_threshold: Annotated[float, Field(gt=0, le=1)] = 0.9


class Render(Section):
    """From messages to token ids and the label mask."""

    template: str = "auto"
    max_length_tokens: Annotated[int, Field(ge=16, le=1_048_576)] = 2048
    supervise: Literal["assistant", "last", "all"] = "assistant"
    system: Literal["merge", "refuse"] = "merge"
    overlong: Literal["drop", "truncate"] = "truncate"
    max_truncated_fraction: Fraction = 0.1
    max_dropped_fraction: Fraction = 0.1
    verify_rows: Count = 200
    template_file: Annotated[Path | None, Field(exclude=True)] = None

    @model_validator(mode="before")
    @classmethod
    def _template_path(cls, value: Any, info: ValidationInfo) -> Any:  # noqa: ANN401 - raw YAML
        if isinstance(value, dict) and isinstance(value.get("template"), str) and value["template"].endswith(".jinja"):
            path = resolve_path(value["template"], info)
            return {**value, "template": path.name, "template_file": path}
        return value


class Pack(Section):
    """Whole documents laid into rows of `length_tokens` (default: render.max_length_tokens), none seeing another."""

    method: Literal["bfd"] = "bfd"
    length_tokens: Annotated[int, Field(ge=16)] | None = None


class Lora(Section):
    """The adapter."""

    r: Annotated[int, Field(ge=1, le=1024)] = 16
    alpha: Positive = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Literal["all-linear"] | list[str] | Pattern = "all-linear"
    rslora: bool = False
    dora: bool = False
    rank_pattern: dict[str, Count] = {}
    alpha_pattern: dict[str, Positive] = {}

    @field_validator("targets")
    @classmethod
    def _no_lm_head(cls, targets: str | list[str]) -> str | list[str]:
        names = targets if isinstance(targets, list) else [targets]
        if not names:
            raise ValueError("an empty list trains nothing")
        if any("lm_head" in n for n in names):
            raise ValueError("TRL cannot train LoRA on lm_head with its chunked loss; leave it out")
        if any("embed_tokens" in n for n in names):
            raise ValueError("LoRA on embed_tokens is not supported yet; leave it out")
        return targets


class Quantization(Section):
    """How the frozen base is stored while training (QLoRA, arXiv:2305.14314)."""

    type: Literal["nf4", "fp4"] = "nf4"
    double: bool = True


class Train(Section):
    """The optimisation. Every figure here changes the adapter; what does not is in `runtime`."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    epochs: Positive = 1.0
    max_steps: Count | None = None
    batch_rows: Count = 16
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = "paged_adamw_8bit"
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_fraction: Fraction = 0.03
    weight_decay: NotNegative = 0.0
    max_grad_norm: Positive = 1.0
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"


class Evaluate(Section):
    """What is measured on held-out rows after training."""

    max_rows: Count = 256
    generations: Annotated[int, Field(ge=0, le=10_000)] = 32
    batch_tokens: Count = 4096


class Certify(Section):
    """How near the merged model must come to what was trained."""

    base: Literal["auto", "original", "dequantized"] = "auto"
    tokens: Annotated[int, Field(ge=64)] = 8192
    min_agreement: Fraction = 0.75
    max_perplexity_ratio: Annotated[float, Field(ge=1, le=10)] = 1.1


class Merge(Section):
    """How the merged model is written."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    max_shard_bytes: Annotated[int, Field(ge=1_000_000)] = 5_000_000_000


class Export(Section):
    """Other formats of the merged model."""

    gguf: Annotated[list[Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]], Field(min_length=1)]


class Publish(Section):
    """Where `finetune publish` pushes, and what."""

    repo: HubId | None = None
    what: Annotated[list[Literal["adapter", "merged"]], Field(min_length=1)] = ["adapter"]
    private: bool = True
    license: str | None = None


class Runtime(Section):
    """How the work is done on this machine. Nothing here changes a result, so nothing here enters a key."""

    micro_batch_rows: Count | Literal["auto"] = "auto"
    checkpointing: Literal["auto", "none", "full"] = "auto"
    save_steps: Count = 50
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2  # the older one goes before the newer one is marked complete
    workers: Count | Literal["auto"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    memory_budget_gb: Positive | None = None


class Tracking(Section):
    """Where the curves go, beside metrics.jsonl, which is always written."""

    wandb: bool = False
    wandb_project: str = "finetune"
    tensorboard: bool = False


class Recipe(Section):
    """One fine-tuning run, from rows to a certified merged model."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    name: Annotated[str, Field(pattern=r"^[\w][\w.-]*$", max_length=80)]
    model: Model
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    data: Annotated[list[Source], Field(min_length=1)]
    ingest: Ingest = Ingest()
    filter: Filter | None = Filter()
    dedup: Dedup | None = Dedup()
    decontaminate: Decontaminate | None = None
    sample: Sample | None = None
    split: Split | None = Split()
    render: Render = Render()
    pack: Pack | None = Pack()
    lora: Lora = Lora()
    quantization: Quantization | None = Quantization()
    train: Train = Train()
    evaluate: Evaluate | None = Evaluate()
    certify: Certify | None = Certify()
    merge: Merge | None = Merge()
    export: Export | None = None
    publish: Publish = Publish()
    runtime: Runtime = Runtime()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        micro, batch = self.runtime.micro_batch_rows, self.train.batch_rows
        if micro != "auto" and batch % micro:
            raise ValueError(
                f"runtime.micro_batch_rows {micro} does not divide train.batch_rows {batch}; "
                f"take one of {', '.join(str(d) for d in range(1, batch + 1) if batch % d == 0)}"
            )
        if self.pack and self.pack.length_tokens and self.pack.length_tokens < self.render.max_length_tokens:
            raise ValueError(
                f"pack.length_tokens {self.pack.length_tokens} is under render.max_length_tokens "
                f"{self.render.max_length_tokens}: a whole document would not fit a row"
            )
        return self
