"""The verdict on a run in five lines: pure functions over the metrics of train, evaluate and certify.

Limits are constants here, and docs/glossary.md names them. Figures: `train.loss` is the mean over the last tenth of the
steps in nats per token; perplexities are exp(nats per token) on held-out rows; intervals are 95 % bootstrap intervals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from finetune.eval.compare import ENOUGH_TOKENS
from finetune.eval.copies import Copies, kept_copies
from finetune.metrics import CertifyMetrics, EvaluateMetrics, RunMetrics, TrainMetrics

FEW_STEPS = 30  # optimiser steps: fewer rarely move an adapter away from its base
BARELY = 0.97  # ratio of perplexities: a smaller change is significant but has little effect
NARROW = 0.1  # width of the ratio's interval up to which 'no difference' is itself a finding
WIDE = 0.5  # width of the ratio's interval above which the size of a gain is not known
SAME_TOKENS = 0.97  # agreement below which the merged model is not what the other figures were measured on
PRACTICE_PARAMETERS = 20_000_000  # above the built-in base (1.3 M), whose answers miss the question; SmolLM2 has 135 M
FEW_ROWS = 30  # held-out rows: fewer cannot show a change of some per cent
MEMORISED_SHARE, MEMORISED_NATS = 0.5, 0.5  # training loss under half of the held-out one, and this much lower
COPIED_MORE = 0.2  # share of sampled answers that repeat a training answer, beyond that of the references
COPIED_NATS = 0.25  # and training loss this much under the held-out one: formulaic rows repeat without being memorised
REPEATS = "it repeats its training rows"
ENDS_WELL = 0.9  # share of answers that end by themselves

GOOD, UNSURE, BAD = "good", "unsure", "bad"
DEFINITIONS = (
    "Perplexity: exp(mean negative log-likelihood of an answer token), lower is better. Ratio: adapter / base, under 1 "
    "is better. 95 %: interval over resampled held-out rows. Nats: natural-log units of loss. Agreement: share of "
    "positions at which merged and trained model choose the same next token. docs/glossary.md has the rest."
)


@dataclass(frozen=True)
class Line:
    """One line of the verdict: the question, a short answer, the figures, and good, unsure or bad."""

    question: str
    answer: str
    words: str
    level: str

    def __str__(self) -> str:
        """The line for a terminal."""
        return f"{self.question} {self.answer}: {self.words}"


@dataclass(frozen=True)
class Verdict:
    """The lines in order, and the reason not to publish the run ("" if there is none)."""

    lines: tuple[Line, ...]
    refusal: str

    @property
    def level(self) -> str:
        """Return bad if any line is bad, else unsure if any is, else good."""
        levels = {line.level for line in self.lines}
        return BAD if BAD in levels else UNSURE if UNSURE in levels else GOOD


def verdict(
    train: TrainMetrics,
    evaluate: EvaluateMetrics,
    certify: CertifyMetrics,
    *,
    merged: bool,
    copies: Copies | None = None,
    parameters: int | None = None,
) -> Verdict | None:
    """Return the verdict of a run whose training is done, else None. An empty mapping stands for a stage that is off.

    Args:
        train: metrics of the stage, `steps`, `loss`.
        evaluate: metrics of the stage; empty if nothing was held out.
        certify: metrics of the stage.
        merged: whether there is a merged model.
        copies: counts of sampled answers that repeat training answers; None if not counted.
        parameters: of the base; None if unknown.
    """
    if not train:
        return None
    lines = [
        _better(train, evaluate),
        _memorised(train, evaluate, copies),
        _stops(evaluate),
        _enough(evaluate),
    ]
    refusal = no_difference(evaluate) or _worse(evaluate)
    if not refusal and memorised(train, evaluate, copies):
        refusal = f"{REPEATS} ({lines[1].words.partition(':')[0]})"
    small = parameters is not None and parameters < PRACTICE_PARAMETERS
    lines.append(_use(lines, certify, merged=merged, refusal=refusal, practice=small))
    return Verdict(tuple(lines), refusal)


def verdict_of(
    metrics: Mapping[str, Mapping[str, Any]], folders: Mapping[str, Path | None], kept: Path | None = None
) -> Verdict | None:
    """Return the verdict from stage → metrics and stage → folder (None or absent if a stage has none).

    `kept`: a file for the count of repeated answers, so that a run that builds nothing does not read the rows again.
    """
    sampled, rows = folders.get("evaluate"), folders.get("split")
    copies = kept_copies(sampled / "samples.jsonl", rows / "train.parquet", kept) if sampled and rows else None
    of = cast("RunMetrics", metrics)
    size = of.get("base", {}).get("parameters")
    return verdict(
        of.get("train", {}),
        of.get("evaluate", {}),
        of.get("certify", {}),
        merged=bool(of.get("merge")),
        copies=copies,
        parameters=size if isinstance(size, int) else None,
    )


def few_steps(steps: int, to_set: str = "") -> str:
    """Return the warning for a training of fewer than FEW_STEPS optimiser steps, or ""."""
    if steps >= FEW_STEPS:
        return ""
    advice = to_set or "set a larger train.epochs or a smaller train.batch_rows"
    return f"ONLY {steps} OPTIMISER STEP{'' if steps == 1 else 'S'} ({FEW_STEPS} or more are usual): {advice}"


def no_difference(evaluate: EvaluateMetrics) -> str:
    """Return a sentence if the 95 % interval of adapter / base perplexity includes 1, or ""."""
    ends = evaluate.get("perplexity_ratio_interval")
    if not ends or not ends[0] <= 1 <= ends[1]:
        return ""
    return (
        f"the adapter does not differ from its base on held-out rows (perplexity ratio "
        f"{evaluate['perplexity_ratio']:.3f}, 95 % {ends[0]:.3f} to {ends[1]:.3f}, which includes 1)"
    )


def _worse(evaluate: EvaluateMetrics) -> str:
    ends = evaluate.get("perplexity_ratio_interval")
    if not ends or ends[0] <= 1:
        return ""
    return f"the adapter is worse than its base on held-out rows (perplexity ratio {evaluate['perplexity_ratio']:.3f})"


def _better(train: TrainMetrics, evaluate: EvaluateMetrics) -> Line:
    question = "Better than the base?"
    few = few_steps(int(train["steps"])) if isinstance(train.get("steps"), int) else ""
    after = f". {few}" if few else ""
    if "perplexity_base" not in evaluate:
        return Line(question, "not measured", f"no row was held out, or evaluate is off{after}", UNSURE)
    before, now = evaluate["perplexity_base"], evaluate["perplexity_adapter"]
    figures = f"perplexity on held-out rows {before:.3g} → {now:.3g}"
    ends = evaluate.get("perplexity_ratio_interval")
    if not ends:
        return Line(question, "UNKNOWN", f"{figures}, on one row only{after}", UNSURE)
    figures += f", ratio {now / before:.3g} (95 %: {ends[0]:.3g} to {ends[1]:.3g})"
    if ends[1] < 1 and now > BARELY * before:
        return Line(question, "BARELY", f"{figures}; train longer or at a higher train.learning_rate{after}", UNSURE)
    if ends[1] < 1:
        return Line(question, "yes", figures + after, UNSURE if few else GOOD)
    if ends[0] > 1:
        return Line(question, "NO, WORSE", f"{figures}; lower train.learning_rate or train.epochs{after}", BAD)
    why = "the interval includes 1, so this may be chance; train longer, or hold out more rows"
    return Line(question, "NO DIFFERENCE", f"{figures}: {why}{after}", BAD)


def memorised(train: TrainMetrics, evaluate: EvaluateMetrics, copies: Copies | None) -> bool:
    """Return whether training loss is far below held-out loss, or less far but sampled answers repeat training ones."""
    copied = copies is not None and copies.answers - copies.references >= COPIED_MORE * copies.samples > 0
    loss, held = train.get("loss"), evaluate.get("perplexity_adapter")
    if not isinstance(loss, (int, float)) or not isinstance(held, (int, float)) or held <= 1:
        return copied
    nats = math.log(held)
    if copied and nats - loss > COPIED_NATS:
        return True
    return bool(loss < MEMORISED_SHARE * nats and nats - loss > MEMORISED_NATS)


def _memorised(train: TrainMetrics, evaluate: EvaluateMetrics, copies: Copies | None) -> Line:
    question = "Memorised?"
    parts = []
    loss, held = train.get("loss"), evaluate.get("perplexity_adapter")
    if isinstance(loss, (int, float)) and isinstance(held, (int, float)) and held > 0:
        parts.append(f"loss {loss:.2f} on the last training batches, {math.log(held):.2f} nats on held-out rows")
    if copies is not None and copies.samples:
        parts.append(
            f"{copies.answers} of {copies.samples} sampled answers repeat a training answer "
            f"({copies.references} of the held-out references do)"
        )
    if not parts:
        return Line(question, "not measured", "no row was held out, or evaluate is off", UNSURE)
    words = "; ".join(parts)
    if memorised(train, evaluate, copies):
        return Line(question, "YES", f"{words}: take fewer train.epochs, more rows or train.keep_best", BAD)
    if copies is not None and copies.answers > copies.references and "loss" in words:
        words += "; rows of one form repeat without being memorised, and held-out rows are about as likely"
    return Line(question, "no", words, GOOD)


def _stops(evaluate: EvaluateMetrics) -> Line:
    question = "Do its answers end?"
    rate, count = evaluate.get("stop_rate"), evaluate.get("generations")
    if rate is None or not count:
        return Line(question, "not measured", "no answer was generated (evaluate.generations)", UNSURE)
    words = f"{round(rate * count)} of {count} end by themselves"
    base = evaluate.get("stop_rate_base")
    words += f" (the base: {round(base * count)})" if base is not None else ""
    if rate >= ENDS_WELL:
        return Line(question, "yes", words, GOOD)
    answer = "NO" if rate == 0 else "NOT ALWAYS"
    return Line(
        question, answer, f"{words}; train longer, and limit new tokens until then", BAD if not rate else UNSURE
    )


def _enough(evaluate: EvaluateMetrics) -> Line:
    question = "Enough held-out rows to know?"
    rows = evaluate.get("rows")
    if not rows:
        return Line(question, "NO", "none was held out; set split: {}", UNSURE)
    tokens = f" with {evaluate['tokens']:,} answer tokens" if isinstance(evaluate.get("tokens"), int) else ""
    words = f"{rows:,} rows{tokens}"
    ends = evaluate.get("perplexity_ratio_interval")
    if not ends or rows < FEW_ROWS:
        return Line(question, "NO", f"{words}, {FEW_ROWS} or more are needed; raise split.eval_fraction", UNSURE)
    width = ends[1] / ends[0] - 1 if ends[0] > 0 else math.inf
    if ends[0] <= 1 <= ends[1]:
        words += f"; the 95 % interval of the ratio holds 1 and is {width:.0%} wide"
        if width > NARROW:
            return Line(question, "NO", f"{words}; raise split.eval_fraction", UNSURE)
        return Line(question, "yes", words, GOOD)
    if width > WIDE:
        words += f"; enough to know the direction, not the size: the ratio is between {ends[0]:.3g} and {ends[1]:.3g}"
        return Line(question, "FOR THE DIRECTION", f"{words}; raise split.eval_fraction", UNSURE)
    return Line(question, "yes", f"{words}; the 95 % interval of the ratio is {width:.0%} wide", GOOD)


def _use(lines: list[Line], certify: CertifyMetrics, *, merged: bool, refusal: str, practice: bool) -> Line:
    question = "Adapter or merged model?"
    if "agreement" in certify:
        few = f", on {certify['tokens']:,} tokens only" if certify.get("tokens", ENOUGH_TOKENS) < ENOUGH_TOKENS else ""
        same = f"{certify['agreement']:.1%} of next tokens as trained, mean KL {certify['mean_kl']:.2g} nats{few}"
        close = certify["agreement"] >= SAME_TOKENS
        answer = "either" if merged and close else "the adapter"
        words = (
            f"the merged model gives {same}{'' if close else ' (certify.base: dequantized may be nearer)'}"
            if merged
            else f"a merge would give {same}, and none was written"
        )
    elif merged:
        answer, words = "the adapter", "the merged model was not certified"
    else:
        answer, words = "the adapter", "there is no merged model"
    bad = [line for line in lines if line.level == BAD]
    if refusal:
        return Line(question, answer, f"{words}. DO NOT PUBLISH: {refusal}", BAD)
    if bad:
        why = ", ".join(f"{line.question.rstrip('?').lower()}: {line.answer.lower()}" for line in bad)
        return Line(question, answer, f"{words}. Not ready to publish ({why})", BAD)
    if practice:
        why = "A base of this size is for practice: its answers are not usable, whatever the figures"
        return Line(question, answer, f"{words}. {why}", UNSURE)
    if any(line.level == UNSURE for line in lines):
        return Line(question, answer, f"{words}. Publish only after reading its answers", UNSURE)
    return Line(question, answer, f"{words}. Fit to publish, by what was measured", GOOD)
