"""What a recipe says of the model: the base, how it is trained, proved, merged and published, and on what machine.

The sentence below a field is its documentation, as in recipe/data.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator
from pydantic.json_schema import SkipJsonSchema

from finetune.recipe.data import (
    HUB_NAME,
    REPOSITORY,
    Count,
    Fraction,
    NotNegative,
    Positive,
    Revision,
    Section,
    path_of,
    refuse,
    resolve_path,
)

BUILTIN_MODELS = ("builtin:tiny-mistral",)
AnswerMetric = Literal["exact_match", "f1", "rouge_l", "bleu", "chrf", "json_valid", "tool_call_match"]
GgufKind = Literal[
    "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0",
    "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k",
]  # fmt: skip


def _known_rope(value: dict[str, Any]) -> dict[str, Any]:
    """`rope_type` is one that transformers has, and the factor that it needs is there."""
    kind = value.get("rope_type", value.get("type"))
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_type is {kind!r}; allowed: {', '.join(ROPE_TYPES)}")
    factor = value.get("factor")
    if kind != "longrope" and not (isinstance(factor, int | float) and factor >= 1):
        raise ValueError(f"{kind} needs a factor of at least 1, found {factor!r}")
    return {"rope_type": kind, **{name: v for name, v in value.items() if name != "type"}}


ROPE_TYPES = ("linear", "dynamic", "yarn", "llama3", "longrope")
RopeScaling = Annotated[dict[str, str | bool | int | float | list[float]], AfterValidator(_known_rope)]


class Model(Section):
    """The base model: a Hub name with an optional revision, a folder, or a builtin that is trained here."""

    id: Annotated[str, Field(min_length=1, max_length=400)]
    """OWNER/NAME on the Hub, a folder (/… or ./…), or builtin:tiny-mistral, which is trained here."""
    revision: Revision | None = None
    """A branch, tag or commit of the Hub; null takes the newest commit and pins it."""
    trust_remote_code: bool = False
    """Run Python that lies in the model's repository. Only for publishers you trust with this machine."""
    rope_scaling: RopeScaling | None = None
    """Longer positions, as transformers spells them: {rope_type: yarn, factor: 2, …}; trained with and merged."""
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
    overlong: Literal["drop", "truncate", "split"] = "truncate"
    """What happens to a row over max_length_tokens; split makes several rows of raw text, and cuts conversations."""
    max_truncated_fraction: Fraction = 0.1
    """Stop (exit 3) where a larger share of the rows would be cut."""
    max_dropped_fraction: Fraction = 0.1
    """Stop (exit 3) where a larger share of the rows would be dropped."""
    max_unterminated_fraction: Fraction = 0.1
    """Stop (exit 3) where a larger share of the rows would hold an answer that was cut before its end."""
    prove_rows: Count | Literal["all"] = "all"
    """Rows whose ids are compared with apply_chat_template: a number; all takes 200 (every text is proved)."""
    reasoning: Literal["auto", "keep", "last", "strip"] = "auto"
    """Reasoning in rows: as the template writes it, kept in every turn, in the last turn only, or left out."""
    template_file: SkipJsonSchema[Annotated[Path | None, Field(exclude=True)]] = None

    @model_validator(mode="before")
    @classmethod
    def _template_path(cls, value: Any, info: ValidationInfo) -> Any:  # noqa: ANN401 - raw YAML
        if isinstance(value, dict) and info.context and "template_file" in value:
            refuse([(("template_file",), "unknown field; write the file as template: NAME.jinja")])
        if isinstance(value, dict) and isinstance(value.get("template"), str) and value["template"].endswith(".jinja"):
            path = path_of("template", value["template"], info)
            return {**value, "template": path.name, "template_file": path}
        return value


class Pack(Section):
    """Whole documents laid into rows of `length_tokens` (default: render.max_length_tokens), none seeing another."""

    method: Literal["bfd"] = "bfd"
    """Best fit decreasing: the longest document first, each into the fullest row that still has room."""
    length_tokens: Annotated[int, Field(ge=16)] | None = None
    """Tokens of a packed row; null takes render.max_length_tokens."""


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
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """How the rate goes on after the warm-up: unchanged, falling to zero, or (wsd) unchanged and falling at the end."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the steps, at the end, in which wsd's rate falls (linearly); null takes 0.1."""
    warmup_fraction: Fraction = 0.03
    """Share of the steps in which the learning rate rises from zero."""
    weight_decay: NotNegative = 0.0
    """AdamW's decay of the adapter's weights."""
    max_grad_norm: Positive = 1.0
    """Longer gradients are scaled down to this norm."""
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """AdamW's memory of squared gradients."""
    lora_plus_ratio: Annotated[float, Field(ge=1, le=1000)] | None = None
    """LoRA+ (arXiv:2402.12354): B matrices learn at so many times the rate of the rest, say 16; null: at the same."""
    neftune_alpha: Annotated[float, Field(gt=0, le=1000)] | None = None
    """NEFTune (arXiv:2310.05914): noise of alpha / √(tokens · width) on the embeddings in training; null adds none."""
    eval_steps: Count | None = None
    """Steps between measurements of the held-out loss, which metrics.jsonl takes down; null measures none."""
    eval_rows: Count = 128
    """Held-out rows that are measured each time, at most."""
    keep_best: bool = False
    """Take the adapter with the lowest held-out loss instead of the last one."""
    patience: Count | None = None
    """Stop after so many measurements in a row without a lower held-out loss; null never does."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """What is computed in: auto takes bf16 where the GPU has it (Ampere and newer), else fp16; fp32 on a CPU."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        refuse([*self._contradictions()])
        return self

    def _contradictions(self) -> Iterator[tuple[tuple[str], str]]:
        if self.schedule == "wsd" and self.warmup_fraction + (self.decay_fraction or 0.1) > 1:
            yield (
                ("decay_fraction",),
                f"with warmup_fraction {self.warmup_fraction} it is more than all the steps",
            )
        if self.schedule != "wsd" and self.decay_fraction is not None:
            yield ("decay_fraction",), f"only the schedule wsd has one, and this is {self.schedule}"
        for name, asked in (("keep_best", self.keep_best), ("patience", self.patience is not None)):
            if asked and self.eval_steps is None:
                yield (name,), "it needs train.eval_steps, the steps between measurements of the held-out loss"


class Evaluate(Section):
    """What is measured on held-out rows after training."""

    max_rows: Count = 256
    """Held-out rows that are scored, at most."""
    generations: Annotated[int, Field(ge=0, le=10_000)] = 32
    """Held-out prompts that are answered, to see whether answers end; 0 answers none."""
    metrics: list[AnswerMetric] = []
    """How near those answers come to the held-out ones, base beside adapter; rouge_l, bleu, chrf: pip '.[metrics]'."""
    batch_tokens: Count = 4096
    """Tokens scored at once, padding included: memory against speed."""
    tasks: list[Annotated[str, Field(pattern=r"^\w[\w.+:-]*$", max_length=200)]] = []
    """Benchmarks for base and adapter: tasks, groups or tags of lm-evaluation-harness (pip install '.[harness]')."""
    task_folder: str | None = None
    """A folder with task files of your own, beside the recipe; the data they name may lie in it, and is in the key."""
    tasks_limit: Count | None = None
    """Documents of each task, at most, for a trial; null takes all."""
    task_path: SkipJsonSchema[Annotated[Path | None, Field(exclude=True)]] = None

    @model_validator(mode="before")
    @classmethod
    def _task_folder(cls, value: Any, info: ValidationInfo) -> Any:  # noqa: ANN401 - raw YAML
        if isinstance(value, dict) and info.context and "task_path" in value:
            refuse([(("task_path",), "unknown field; write the folder as task_folder: NAME")])
        if isinstance(value, dict) and isinstance(value.get("task_folder"), str) and "task_path" not in value:
            path = path_of("task_folder", value["task_folder"], info)
            return {**value, "task_folder": path.name, "task_path": path}
        return value

    @model_validator(mode="after")
    def _answers_to_measure(self) -> Self:
        if self.metrics and not self.generations:
            refuse([(("metrics",), "they measure answers, and generations is 0; set it to the number of answers")])
        return self

    @field_validator("tasks", "metrics")
    @classmethod
    def _each_once(cls, tasks: list[str]) -> list[str]:
        if twice := [t for i, t in enumerate(tasks) if t in tasks[:i]]:
            raise ValueError(f"{twice[0]} is listed twice; keep one")
        return tasks


class Certify(Section):
    """How near the merged model must come to what was trained."""

    base: Literal["auto", "original", "dequantized"] = "auto"
    """Which weights the adapter is merged into: the published ones, those seen in training, or the measured better."""
    tokens: Annotated[int, Field(ge=64)] = 8192
    """Held-out tokens that are read; where fewer than half are compared (long prompts), up to four times as many."""
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
    """Held-out rows to score merged model and files on, at most (0: none); from 200 M parameters on, certify.tokens."""


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
    samples: Annotated[int, Field(ge=0, le=10)] | None = None
    """Held-out prompts a model card shows with both answers; null: 3, and none if any source is a local file."""


class Runtime(Section):
    """How the work is done on this machine. Nothing here changes a result, so nothing here enters a key."""

    micro_batch_rows: Count | Literal["auto"] = "auto"
    """Rows on a GPU at once; must divide train.batch_rows. The rest is accumulated."""
    checkpointing: Literal["auto", "none", "every_4", "every_2", "selective", "full", "offload"] = "auto"
    """Recompute no layer, 1 in 4, 1 in 2, all but attention, all (offload: inputs in RAM); auto: fastest that fits."""
    save_steps: Count = 50
    """Optimiser steps between checkpoints."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2  # the older one goes before the newer one is marked complete
    """Checkpoints that stay on disk while training."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""
    watchdog: bool = True
    """Stop a training whose loss leaves its level for several steps, or whose gradient stays zero."""
    keep_quantized: Literal["auto", "always", "never"] = "auto"
    """Keep a 4-bit copy of the base in scratch, so that a restart reads that; auto does for bases of 2 GB or more."""
    compile: bool = False
    """Have torch compile each decoder layer: half a minute at the start, a fifth less time a step (7B on an H200)."""
    cache_dequantized: bool = False
    """Keep 4-bit weights in 16 bits as well: 2 bytes a parameter more; gains where few tokens are computed at once."""
    fused_adapters: Literal["auto", "on", "off"] = "auto"
    """Add adapters' products inside their 4-bit layers' own: faster where a GPU has much to do, as auto knows."""
    memory_budget_gb: Positive | None = None
    """GPU memory that `finetune plan` counts with, in 10⁹ bytes; null takes all of the device."""

    @model_validator(mode="after")
    def _traceable(self) -> Self:
        if self.compile and self.checkpointing == "offload":
            refuse([(("compile",), "torch cannot compile what runtime.checkpointing offload moves to RAM; drop one")])
        return self


class Tracking(Section):
    """Where the curves go, beside metrics.jsonl, which is always written."""

    wandb: bool = False
    """Send them to Weights & Biases."""
    wandb_project: str = "finetune"
    """The project's name there."""
    wandb_rows: Annotated[int, Field(ge=0, le=10_000)] = 0
    """Training rows that are sent there as a table, from the first; 0 sends none."""
    wandb_data: bool = False
    """Send the training rows there as an artifact, as they are trained on (packed, if they are)."""
    tensorboard: bool = False
    """Write TensorBoard event files."""
