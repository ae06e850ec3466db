"""Recipe section of preference tuning after SFT: pairs, loss, duration.

The sentence below a field is its documentation, as in recipe/data.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, get_args

from pydantic import Field

from finetune.recipe.data import Contradiction, Count, Fraction, Positive, Section, Source, used_once

# TRL 1.16: DPOConfig.loss_type and KTOConfig.loss_type
DpoLoss = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
KtoLoss = Literal["kto", "apo_zero_unpaired"]
Loss = Literal[DpoLoss, KtoLoss]
LOSSES: dict[str, tuple[str, ...]] = {"dpo": get_args(DpoLoss), "kto": get_args(KtoLoss)}
SMOOTHED = ("robust", "exo_pair")  # the losses that read label_smoothing


class Preference(Section):
    """Preference tuning after SFT, on pairs of a better and a worse answer (DPO) or on judged answers (KTO)."""

    data: Annotated[list[Source], Field(min_length=1)]
    """Where the pairs come from: sources as under `data`, of the format preference or kto."""
    eval_data: Annotated[list[Source], Field(min_length=1)] | None = None
    """Your own held-out pairs: no training pair has the prompt of one; null holds out a share of `data`."""
    eval_fraction: Annotated[float, Field(gt=0, le=0.5)] = 0.05
    """Share of the pairs that is held out, at most, by whole near-duplicate groups of the prompt."""
    max_eval_pairs: Count = 1000
    """Pairs that are held out, at most."""
    repeats: Literal["pair", "prompt"] = "pair"
    """Pairs dropped as repeats: the same prompt with the same answers, or every further pair of a prompt."""
    method: Literal["dpo", "kto"] = "dpo"
    """DPO learns from pairs; KTO from single answers with a label, so it takes each pair apart."""
    loss: Loss | None = None
    """TRL's name of the loss; null takes sigmoid for dpo and kto for kto."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of the pairs that are taken to be the wrong way round, for the losses robust (0.1) and exo_pair (1e-3)."""
    beta: Positive = 0.1
    """How near the model stays to what it was before: higher is nearer (for ipo: its tau)."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 5e-6
    """The highest step size; about a fortieth of SFT's."""
    epochs: Positive = 1.0
    """Passes over the pairs; fractions are allowed."""
    max_steps: Count | None = None
    """Optimiser steps, in place of epochs; null goes by epochs."""
    batch_pairs: Count = 16
    """Pairs (for kto: answers) an optimiser step learns from, on however many GPUs."""
    max_length_tokens: Annotated[int, Field(ge=16, le=1_048_576)] | None = None
    """Tokens of a prompt with its longer answer, at most; longer pairs are dropped. Null: render.max_length_tokens."""
    max_dropped_fraction: Fraction = 0.5
    """Stop (exit 3) where a larger share of the pairs would be dropped."""
    max_length_bias: Fraction | None = None
    """Stop (exit 3) where in a larger share of the pairs the chosen answer is the longer one; null only reports it."""
    desirable_weight: Positive = 1.0
    """KTO: the weight of answers with the label true."""
    undesirable_weight: Positive = 1.0
    """KTO: the weight of answers with the label false."""
    min_accuracy: Fraction | None = 0.5
    """Stop (exit 3) unless the share of held-out pairs told apart is above this by its interval; null only reports."""
    max_perplexity_ratio: Annotated[float, Field(ge=1, le=10)] | None = 1.2
    """Stop (exit 3) where held-out SFT rows have more than this many times their perplexity before; null: reports."""

    @property
    def loss_type(self) -> str:
        """TRL's name of the loss."""
        return self.loss or LOSSES[self.method][0]

    def _contradictions(self) -> Iterator[Contradiction]:
        if self.loss_type not in LOSSES[self.method]:
            other = "kto" if self.method == "dpo" else "dpo"
            why = f"{self.loss_type} is a loss of method {other}; method {self.method} has "
            yield ("loss",), why + ", ".join(LOSSES[self.method])
        if self.label_smoothing and self.loss_type not in SMOOTHED:
            yield ("label_smoothing",), f"only {' and '.join(SMOOTHED)} read it, and the loss is {self.loss_type}"
        if self.loss_type == "exo_pair" and not self.label_smoothing:
            yield ("label_smoothing",), "the loss exo_pair needs one above 0; its paper takes 1e-3"
        if self.method == "kto" and self.max_length_bias is not None:
            yield ("max_length_bias",), "method kto has single answers, of which none is the longer one; leave it out"
        for name in ("desirable_weight", "undesirable_weight"):
            if self.method == "dpo" and getattr(self, name) != 1:
                yield (name,), "only method kto has one; leave it out"
        if self.eval_data is not None:
            for name in ("eval_fraction", "max_eval_pairs"):
                if name in self.model_fields_set:
                    yield (name,), "with eval_data nothing else is held out; leave it out"
        yield from self._sources()

    def _sources(self) -> Iterator[Contradiction]:
        allowed = ("preference", "kto") if self.method == "kto" else ("preference",)
        for part, sources in (("data", self.data), ("eval_data", self.eval_data or [])):
            for number, source in enumerate(sources):
                if source.format not in (*allowed, "auto"):
                    hint = "; single answers with a label need method: kto" if source.format == "kto" else ""
                    why = f"found {source.format}; allowed here: {' or '.join(allowed)}{hint}"
                    yield (part, number, "format"), why
            yield from used_once((part,), sources, "pairs")
