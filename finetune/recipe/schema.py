"""The recipe: all fields, their ranges and defaults.

All models are frozen and refuse unknown fields. Validation uses no GPU, network or environment, and nothing is written
back afterwards: derived values are properties. Local paths are excluded from dumps (`exclude=True`), because a stage's
key depends on a file's content, never on its path. `recipe/load.py` reads YAML; the sections are in the other
modules of `recipe/`, and are imported from here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from finetune.recipe.data import (
    PAIR_FORMATS,
    RECIPE_NAME,
    Contradiction,
    Decontaminate,
    Dedup,
    Ingest,
    Sample,
    Section,
    Source,
    Split,
    used_once,
)
from finetune.recipe.filters import Filter
from finetune.recipe.lora import Lora
from finetune.recipe.outlets import Export, Publish, Tracking
from finetune.recipe.preference import Preference
from finetune.recipe.synthetic import Generate
from finetune.recipe.training import (
    Certify,
    Evaluate,
    Merge,
    Model,
    Pack,
    Quantization,
    Render,
    Runtime,
    Tokens,
    Train,
)


class Recipe(Section):
    """One fine-tuning run, from rows to a certified merged model."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    """The version of this format."""
    name: Annotated[str, Field(pattern=RECIPE_NAME, max_length=80)]
    """The recipe's name; runs are in artifacts/runs/NAME."""
    model: Model
    """The base model: OWNER/NAME on the Hub, a folder (/… or ./…), builtin:tiny-mistral, or {id: …, revision: …}."""
    tokens: Tokens | None = None
    """Tokens to add to the base's vocabulary; null adds none."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of every random choice."""
    generate: Generate | None = None
    """Rows written by a language model, one more source behind `data`; null writes none."""
    data: Annotated[list[Source], Field(min_length=1)] = Field(default=[])
    """Where the rows come from, one after the other; none are needed with generate, or with train: null."""
    eval_data: Annotated[list[Source], Field(min_length=1)] | None = None
    """Your own held-out rows: never trained on, and no training row repeats one; `split` is then null by default."""
    ingest: Ingest = Ingest()
    """Limits on rows that cannot be read."""
    filter: Filter | None = Filter()
    """Rules for keeping rows; null keeps all."""
    dedup: Dedup | None = Dedup()
    """Dropping of duplicate rows; null drops none."""
    decontaminate: Decontaminate | None = None
    """Evaluation data that no training row may share text with; null compares with none."""
    sample: Sample | None = None
    """Selection of curated rows; null uses all."""
    split: Split | None = Split()
    """The held-out rows; null holds out nothing, so nothing is evaluated or certified."""
    render: Render = Render()
    """From messages to token ids and labels."""
    pack: Pack | None = Pack()
    """Packing of several documents into one row, without attention between them; null trains on unpacked rows."""
    lora: Lora = Lora()
    """The adapter."""
    quantization: Quantization | None = Quantization()
    """4-bit storage of the frozen base during training; null keeps it in 16 or 32 bits."""
    train: Train | None = Train()
    """The optimisation; null imports the adapter of lora.start_from, or (with preference) begins with a new one."""
    preference: Preference | None = None
    """Preference tuning (DPO or KTO) of the trained adapter; null does none."""
    evaluate: Evaluate | None = Evaluate()
    """Evaluation after training; null skips it."""
    certify: Certify | None = Certify()
    """Required agreement of the merged with the trained model; null merges without certification."""
    merge: Merge | None = Merge()
    """Settings of the merged model; null keeps only the adapter."""
    export: Export | None = None
    """Other formats of the merged model; null writes none."""
    publish: Publish = Publish()
    """Target and contents of `finetune publish`."""
    runtime: Runtime = Runtime()
    """Settings for this machine; they change no result."""
    tracking: Tracking = Tracking()
    """Experiment tracking."""

    @property
    def training(self) -> Train:
        """Return the train section, or its defaults if train is null."""
        return self.train or Train()

    @property
    def alignment(self) -> Train:
        """Return the settings of preference training: rate, length and batch of `preference`, the rest of `train`."""
        assert self.preference is not None  # noqa: S101 - callers ask only with the section
        sft_only = ("lora_plus_ratio", "neftune_alpha", "eval_steps", "eval_rows", "keep_best", "patience")
        own = {name: getattr(self.preference, name) for name in ("learning_rate", "epochs", "max_steps")}
        own["batch_rows"] = self.preference.batch_pairs
        return self.training.model_copy(update={name: getattr(Train(), name) for name in sft_only} | own)

    @model_validator(mode="before")
    @classmethod
    def _split_default(cls, value: object) -> object:
        """Set split to null if the recipe has eval_data and no split."""
        if isinstance(value, dict) and value.get("eval_data") and "split" not in value:
            return {**value, "split": None}
        return value

    @property
    def has_rows(self) -> bool:
        """Return whether there are rows to train on: read, or generated."""
        return bool(self.data) or self.generate is not None

    @property
    def holds_out(self) -> bool:
        """Return whether there are held-out rows to evaluate on."""
        return self.split is not None or self.eval_data is not None

    def _contradictions(self) -> Iterator[Contradiction]:
        yield from self._sizes()
        yield from self._trained_from()
        yield from self._asked_and_not_made()
        yield from used_once(("eval_data",), self.eval_data or [], "held-out rows")
        yield from self._apart()

    def _sizes(self) -> Iterator[Contradiction]:
        micro, batch, longest = self.runtime.micro_batch_rows, self.training.batch_rows, self.render.max_length_tokens
        if micro != "auto" and batch % micro:
            fits = ", ".join(str(d) for d in range(1, min(batch, 4096) + 1) if batch % d == 0)
            why = f"{micro} does not divide train.batch_rows {batch}; take one of {fits}"
            yield ("runtime", "micro_batch_rows"), why
        if self.pack and self.pack.length_tokens and self.pack.length_tokens < longest:
            why = f"{self.pack.length_tokens} is less than render.max_length_tokens {longest}"
            yield ("pack", "length_tokens"), f"{why}: a whole document would not fit a row"

    def _apart(self) -> Iterator[Contradiction]:
        against = self.decontaminate.against if self.decontaminate else []
        for place, sources in (("data", self.data), ("eval_data", self.eval_data), ("decontaminate.against", against)):
            for number, source in enumerate(sources or []):
                if source.format in PAIR_FORMATS:
                    why = f"rows of format {source.format} belong under preference.data"
                    yield (*place.split("."), number, "format"), why
        if self.tokens is not None and self.preference is not None:
            why = "new tokens (tokens.add) cannot be trained on preferences yet: TRL's reference copy leaves out their "
            way = "rows; train with tokens.add first, merge, and name the merged folder as model here"
            yield ("preference",), why + way
        judge = self.evaluate.judge if self.evaluate else None
        for at, asked in ((("generate", "model"), self.generate), (("evaluate", "judge", "model"), judge)):
            local = asked.model.local if asked else None
            if local is not None and local.kind == "builtin" and self.model.id != local.id:
                yield (*at, "local"), f"{local.id} is trained by the base stage only: it needs model: {local.id}"

    def _trained_from(self) -> Iterator[Contradiction]:
        if not self.has_rows and self.train is not None:
            yield ("data",), "missing; name one source or more (only a recipe with train: null goes without)"
        if not self.has_rows and self.eval_data and self.split is not None:
            yield ("split",), "there is no data to hold rows out of: eval_data is held out whole; leave split out"
        if self.train is None and self.lora.start_from is None and self.preference is None:
            yield ("train",), "null imports the adapter of lora.start_from, which is null; set it, or train: {}"
        if self.train is None and self.lora.start_from is None and self.preference is not None:
            for name in ("dora", "modules_to_save"):
                if getattr(self.lora, name):
                    why = "with train: null preference training begins at zero, and this begins at the base's values"
                    yield ("lora", name), f"{why}; drop it, or name an adapter in lora.start_from"
        if self.lora.start_run == (self.name, None):
            why = f"found {self.name}, this recipe itself, whose newest run changes"
            yield ("lora", "start_from"), f"{why}; name one run, {self.name}@RUN (`finetune runs` lists them)"

    def _asked_and_not_made(self) -> Iterator[Contradiction]:
        if self.merge is None and self.export is not None:
            yield ("export",), "it needs the merged model, but merge is null; set export: null, or merge: {}"
        if self.merge is None and "merged" in self.publish.what:
            yield ("publish", "what"), "found merged, but merge is null; publish the adapter, or set merge: {}"
        made: list[str] = list(self.export.hf) if self.export else []
        if self.export and self.export.gguf:
            made.append("gguf")
        for kind in self.publish.what:
            if kind not in ("adapter", "merged", "dataset", *made):
                asked = "gguf: [q8_0]" if kind == "gguf" else f"hf: [{kind}]"
                why = "export is null" if self.export is None else "export does not name it"
                yield ("publish", "what"), f"found {kind}, but {why}; set export: {{{asked}}}, or remove {kind}"
        if self.quantization is None and self.certify and self.certify.base == "dequantized":
            yield ("certify", "base"), "quantization is null, so nothing is dequantized; set it to original"
        if self.quantization is None and self.runtime.keep_quantized == "always":
            yield ("runtime", "keep_quantized"), "quantization is null, so there is no 4-bit copy; set it to auto"
        if self.sample and self.sample.diverse and (self.dedup is None or self.dedup.embedding is None):
            yield ("sample", "diverse"), "it needs the vectors of dedup.embedding, which is off"
        if not self.holds_out and self.training.eval_steps is not None:
            yield ("train", "eval_steps"), "it needs held-out rows, but split is null; set split: {}"
        if self.runtime.device == "cpu" and self.training.precision == "fp16":
            yield ("train", "precision"), "fp16 needs a GPU, but runtime.device is cpu; allowed: auto, fp32, bf16"
