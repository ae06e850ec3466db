"""Recipe sections about the model: base, training, certification, merge, runtime.

The string below a field is its documentation, as in recipe/data.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, model_validator
from pydantic.json_schema import SkipJsonSchema

from finetune.recipe.data import (
    ENDPOINT,
    HUB_NAME,
    Contradiction,
    Count,
    Fraction,
    NotNegative,
    Positive,
    Revision,
    Section,
    each_once,
    refuse,
    resolve_path,
    with_path,
)

BUILTIN_MODELS = ("builtin:tiny-mistral",)
TaskName = Annotated[str, Field(pattern=r"^\w[\w.+:-]*$", max_length=200)]
AnswerMetric = Literal["exact_match", "f1", "rouge_l", "bleu", "chrf", "json_valid", "tool_call_match"]


def _known_rope(value: dict[str, Any]) -> dict[str, Any]:
    """Check that `rope_type` is known to transformers and has the required factor."""
    kind = value.get("rope_type", value.get("type"))
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_type is {kind!r}; allowed: {', '.join(ROPE_TYPES)}")
    factor = value.get("factor")
    if kind != "longrope" and not (isinstance(factor, int | float) and factor >= 1):
        raise ValueError(f"{kind} needs a factor of at least 1, found {factor!r}")
    return {"rope_type": kind, **{name: v for name, v in value.items() if name != "type"}}


def _text_of_token(value: str) -> str:
    """Something to see."""
    if not value.strip():
        raise ValueError(f"found {value!r}; allowed is a text that is not only white space")
    return value


MOST_NEW_TOKENS = 10_000
NewToken = Annotated[str, Field(max_length=200), AfterValidator(_text_of_token)]
ROPE_TYPES = ("linear", "dynamic", "yarn", "llama3", "longrope")
RopeScaling = Annotated[dict[str, str | bool | int | float | list[float]], AfterValidator(_known_rope)]


class Model(Section):
    """The base model: a Hub name with an optional revision, a folder, or a builtin that is trained locally."""

    id: Annotated[str, Field(min_length=1, max_length=400)]
    """OWNER/NAME on the Hub, a folder (/… or ./…), or builtin:tiny-mistral, which is trained locally."""
    revision: Revision | None = None
    """A branch, tag or commit of the Hub; null pins the newest commit."""
    trust_remote_code: bool = False
    """Run Python code from the model's repository. Only for publishers you trust with this machine."""
    rope_scaling: RopeScaling | None = None
    """RoPE scaling in transformers' form: {rope_type: yarn, factor: 2, …}; used in training and in the merged model."""
    folder: SkipJsonSchema[Annotated[Path | None, Field(exclude=True)]] = None

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: object, info: ValidationInfo) -> object:
        raw = {"id": value} if isinstance(value, str) else value
        if not isinstance(raw, dict) or not isinstance(raw.get("id"), str):
            return raw
        if info.context and "folder" in raw:  # only a file has a context
            refuse([(("folder",), "unknown field; write the folder as the model's id: /path or ./path")])
        name = raw["id"]
        if name.startswith("builtin:"):
            if name not in BUILTIN_MODELS:
                raise ValueError(f"no builtin model {name!r}; allowed: {', '.join(BUILTIN_MODELS)}")
            return raw
        if name.startswith(("/", "./", "~")) or "\\" in name or name.count("/") > 1:
            folder = resolve_path(name, info)
            return {**raw, "id": f"folder:{folder.name}", "folder": folder}
        if not re.fullmatch(HUB_NAME, name):
            raise ValueError(f"found {name!r}; allowed: a Hub name (OWNER/NAME), a folder (/… or ./…) or a builtin")
        return raw

    @property
    def kind(self) -> Literal["builtin", "folder", "hub"]:
        """Return the source of the weights."""
        if self.id.startswith("builtin:"):
            return "builtin"
        return "folder" if self.folder else "hub"


class Tokens(Section):
    """Tokens added to the base's vocabulary: one id each, their rows of the embedding and the head trained."""

    add: Annotated[list[NewToken], Field(min_length=1, max_length=MOST_NEW_TOKENS), AfterValidator(each_once)]
    """Their texts, none of which the base has. In rows and in the template each is one id, wherever it stands."""
    special: bool = False
    """Whether they are control tokens, which decoding with skip_special_tokens leaves out."""


class Render(Section):
    """From messages to token ids and the label mask."""

    template: str = "auto"
    """The chat template: auto (the base's own), a name in recipes/templates, or a .jinja file next to the recipe."""
    max_length_tokens: Annotated[int, Field(ge=16, le=1_048_576)] = 2048
    """Maximum tokens of a row. GPU memory grows with it."""
    supervise: Literal["assistant", "last", "all"] = "assistant"
    """Tokens with labels: every assistant turn, only the last one, or all turns."""
    system: Literal["merge", "refuse"] = "merge"
    """If the template has no system role: put the message before the first user turn, or stop."""
    overlong: Literal["drop", "truncate", "split"] = "truncate"
    """Handling of a row over max_length_tokens; split makes several rows of a raw text and truncates conversations."""
    max_truncated_fraction: Fraction = 0.1
    """Stop (exit 3) if a larger share of the rows would be truncated."""
    max_dropped_fraction: Fraction = 0.1
    """Stop (exit 3) if a larger share of the rows would be dropped."""
    max_unterminated_fraction: Fraction = 0.1
    """Stop (exit 3) if a larger share of the rows would have an answer without its end."""
    prove_rows: Count | Literal["all"] = "all"
    """Rows whose ids are compared with apply_chat_template: a number; all takes 200 (every text is proved)."""
    reasoning: Literal["auto", "keep", "last", "strip"] = "auto"
    """Reasoning in rows: as the template does, kept in every turn, kept in the last turn only, or removed."""
    template_file: SkipJsonSchema[Annotated[Path | None, Field(exclude=True)]] = None

    @model_validator(mode="before")
    @classmethod
    def _template_path(cls, value: object, info: ValidationInfo) -> object:
        how = "the file as template: NAME.jinja"
        return with_path(
            value, info, "template", "template_file", how=how, is_path=lambda name: name.endswith(".jinja")
        )


class Pack(Section):
    """Packing of whole documents into rows of `length_tokens`, without attention between documents."""

    method: Literal["bfd"] = "bfd"
    """Best fit decreasing: longest document first, each into the fullest row with enough space."""
    length_tokens: Annotated[int, Field(ge=16)] | None = None
    """Tokens of a packed row; null: render.max_length_tokens."""


class Quantization(Section):
    """4-bit storage of the frozen base in training (QLoRA, arXiv:2305.14314)."""

    type: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit data type: nf4 for normally distributed weights, or fp4."""
    double: bool = True
    """Double quantisation: scales in 8 bits, about 0.4 bits less per weight."""


class Train(Section):
    """Optimisation. Every value here changes the adapter; all others are in `runtime`."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    """Peak learning rate; about 2e-4 for LoRA on a 7B."""
    epochs: Positive = 1.0
    """Passes over the rows; fractions are allowed."""
    max_steps: Count | None = None
    """Optimiser steps instead of epochs; null uses epochs."""
    batch_rows: Count = 16
    """Rows per optimiser step over all GPUs (packed rows if pack is on)."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = "paged_adamw_8bit"
    """AdamW variant; 8bit stores the state in 8 bits, paged moves it to RAM if the GPU is full."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """Learning rate after the warm-up: constant, decaying to zero, or (wsd) constant with a decay at the end."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the steps at the end in which wsd decays (linearly); null: 0.1."""
    warmup_fraction: Fraction = 0.03
    """Share of the steps for the warm-up from zero."""
    weight_decay: NotNegative = 0.0
    """AdamW's weight decay of the adapter."""
    max_grad_norm: Positive = 1.0
    """Gradient clipping: maximum norm."""
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """AdamW's decay rate of squared gradients."""
    lora_plus_ratio: Annotated[float, Field(ge=1, le=1000)] | None = None
    """LoRA+ (arXiv:2402.12354): learning rate of B matrices / rate of the rest, for example 16; null: equal rates."""
    neftune_alpha: Annotated[float, Field(gt=0, le=1000)] | None = None
    """NEFTune (arXiv:2310.05914): noise of alpha / √(tokens · width) on the embeddings in training; null: no noise."""
    eval_steps: Count | None = None
    """Steps between measurements of the held-out loss (in metrics.jsonl); null: no measurements."""
    eval_rows: Count = 128
    """Maximum held-out rows per measurement."""
    keep_best: bool = False
    """Keep the adapter with the lowest held-out loss instead of the last one."""
    patience: Count | None = None
    """Stop after this many measurements without a lower held-out loss; null: no early stop."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Compute dtype: auto is bf16 on a GPU from Ampere on, else fp16; on a CPU fp32, or bf16 if a trial is faster."""

    def _contradictions(self) -> Iterator[Contradiction]:
        if self.schedule == "wsd" and self.warmup_fraction + (self.decay_fraction or 0.1) > 1:
            yield ("decay_fraction",), f"with warmup_fraction {self.warmup_fraction} it is more than all the steps"
        if self.schedule != "wsd" and self.decay_fraction is not None:
            yield ("decay_fraction",), f"only the schedule wsd has one, found {self.schedule}"
        for name, asked in (("keep_best", self.keep_best), ("patience", self.patience is not None)):
            if asked and self.eval_steps is None:
                yield (name,), "it needs train.eval_steps, the steps between measurements of the held-out loss"


class LanguageModel(Section):
    """A language model that writes or judges text: one behind an OpenAI-compatible server, or a local one."""

    endpoint: Annotated[str, Field(pattern=ENDPOINT, max_length=400)] | None = None
    """Address of an OpenAI-compatible API, as http://127.0.0.1:8000/v1; key: FINETUNE_API_KEY and FINETUNE_API_HOST."""
    name: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """The model's name at the endpoint."""
    local: Model | None = None
    """A model loaded here instead: OWNER/NAME on the Hub, a folder (/… or ./…), or the recipe's own builtin base."""
    license: str | None = None
    """Licence or terms of its answers, for the card; null: the licence of a local Hub model, else unknown."""
    concurrency: Annotated[int, Field(ge=1, le=1024)] = 8
    """Requests to the endpoint at once."""
    timeout_seconds: Positive = 120.0
    """Time after which a request is given up and tried again."""

    def _contradictions(self) -> Iterator[Contradiction]:
        if (self.endpoint is None) == (self.local is None):
            what = "both are there; keep one" if self.local else "neither is there"
            yield (), f"endpoint (with name) or local says where the model is; {what}"
        elif self.endpoint is not None and self.name is None:
            yield ("name",), "missing; the endpoint needs the model's name there"
        elif self.local is not None and self.name is not None:
            yield ("name",), "only an endpoint has names; remove it"
        if self.local is not None and (self.local.trust_remote_code or self.local.rope_scaling):
            yield ("local",), "trust_remote_code and rope_scaling are not used for writing; serve it (endpoint)"

    @property
    def without_speed(self) -> LanguageModel:
        """This model without the settings that change no text."""
        quiet = ("license", "concurrency", "timeout_seconds")
        return self.model_copy(update={name: type(self).model_fields[name].default for name in quiet})

    @property
    def label(self) -> str:
        """The model's name in reports and cards."""
        return self.name or (self.local.id if self.local else "")


class Judge(Section):
    """Pairwise judgement of base and adapter by a language model, each pair in both orders."""

    model: LanguageModel
    """The judging model."""
    rows: Count = 100
    """Held-out prompts whose two answers are compared, at most; they are answered even where generations is fewer."""
    max_new_tokens: Count = 512
    """Tokens of a verdict with its reasons, at most."""


class Evaluate(Section):
    """Evaluation on held-out rows after training."""

    max_rows: Count = 256
    """Maximum held-out rows scored."""
    generations: Annotated[int, Field(ge=0, le=10_000)] = 32
    """Held-out prompts answered, to check whether answers end; 0: none."""
    metrics: Annotated[list[AnswerMetric], AfterValidator(each_once)] = []
    """Metrics of those answers, for base and adapter; rouge_l, bleu and chrf need the extra `metrics`."""
    batch_tokens: Count = 4096
    """Tokens per batch, with padding; a trade-off of memory and speed."""
    tasks: Annotated[list[TaskName], AfterValidator(each_once)] = []
    """Benchmarks for base and adapter: tasks, groups or tags of lm-evaluation-harness (pip install '.[harness]')."""
    task_folder: str | None = None
    """A folder with your own task files, next to the recipe; data files in it are part of the key."""
    tasks_limit: Count | None = None
    """Maximum documents per task, for a trial; null: all."""
    judge: Judge | None = None
    """A language model that compares the answers of base and adapter; null: none."""
    task_path: SkipJsonSchema[Annotated[Path | None, Field(exclude=True)]] = None

    @model_validator(mode="before")
    @classmethod
    def _task_folder(cls, value: object, info: ValidationInfo) -> object:
        return with_path(value, info, "task_folder", "task_path", how="the folder as task_folder: NAME")

    def _contradictions(self) -> Iterator[Contradiction]:
        if self.metrics and not self.generations:
            yield ("metrics",), "they need answers, but generations is 0; set it to the number of answers"

    @property
    def with_slow_judge(self) -> Evaluate:
        """This section with the judge's speed at its defaults, which changes no verdict. It enters the stage's key."""
        judge = self.judge and self.judge.model_copy(update={"model": self.judge.model.without_speed})
        return self.model_copy(update={"judge": judge})


class Certify(Section):
    """Required agreement of the merged model with the trained one."""

    base: Literal["auto", "original", "dequantized"] = "auto"
    """Weights to merge into: the original ones, those of training (dequantized), or the better of those that pass."""
    tokens: Annotated[int, Field(ge=64)] = 8192
    """Held-out tokens read; if fewer than half are compared (long prompts), up to four times as many."""
    min_agreement: Fraction = 0.75
    """Stop (exit 3) if merged and trained model agree on a smaller share of the likeliest next tokens."""
    max_perplexity_ratio: Annotated[float, Field(ge=1, le=10)] = 1.1
    """Stop (exit 3) if the merged model's perplexity / the trained model's is larger."""


class Merge(Section):
    """Format of the merged model."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """dtype of its weights; auto: the base's stored dtype."""
    max_shard_bytes: Annotated[int, Field(ge=1_000_000)] = 5_000_000_000
    """Maximum bytes of a safetensors file (one tensor may be larger)."""


class Runtime(Section):
    """Settings for this machine. They change no result, so they are not part of a key."""

    micro_batch_rows: Count | Literal["auto"] = "auto"
    """Rows per forward on a GPU; must divide train.batch_rows, which is reached by accumulation."""
    checkpointing: Literal["auto", "none", "every_4", "every_2", "selective", "full", "offload"] = "auto"
    """Recompute no layer, 1 in 4, 1 in 2, all but attention, all (offload: inputs in RAM); auto: fastest that fits."""
    save_steps: Count = 50
    """Optimiser steps between checkpoints."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2  # the older one goes before the newer is complete
    """Checkpoints kept on disk during training."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto uses a GPU if there is one."""
    watchdog: bool = True
    """Stop a training whose loss stays above its level, or whose gradient stays zero."""
    keep_quantized: Literal["auto", "always", "never"] = "auto"
    """Keep a 4-bit copy of the base in scratch for faster restarts; auto: for bases of 2 GB or more."""
    compile: bool = False
    """Compile each decoder layer: 30 s at the start, steps a fifth shorter (7B on an H200)."""
    fused_adapters: Literal["auto", "on", "off"] = "auto"
    """Fuse adapters with their 4-bit layers: faster for large micro-batches; auto decides."""
    workers: Count | Literal["auto"] = "auto"
    """Processes that filter, embed (lsa, model2vec), render, pack; auto: one a processor (here from 50,000 rows on)."""
    memory_budget_gb: Positive | None = None
    """GPU memory assumed by `finetune plan`, in 10⁹ bytes; null: all of the device."""

    def _contradictions(self) -> Iterator[Contradiction]:
        if self.compile and self.checkpointing == "offload":
            yield ("compile",), "torch cannot compile with runtime.checkpointing offload; remove one of them"
