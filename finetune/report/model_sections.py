"""The report's sections on training, evaluation, certificate and export."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.eval.answer_metrics import verdict
from finetune.eval.metrics import never_stops
from finetune.publish.card_curve import loss_curve, points
from finetune.report.stage_view import Stages, StageView
from finetune.synth.judge import words_of as judge_words
from finetune.utils import svg
from finetune.utils.format import NONE, clipped, interval, number, percent, size, task_figures

SAMPLES, OPEN_SAMPLES, MOVED_SAMPLES = 24, 4, 5
LONGEST_TEXT = 700
MEMORY_KEYS = ("memory_bytes", "peak_memory_bytes")
MEMORY_WORDS = {"device": "driver, buffers", "layer_inputs": "layers' inputs", "unused": "allocated, not filled"}
HIDDEN_TRAIN_FIGURES = ("loss", "first_loss", "tokens_per_second", "peak_memory_bytes")


def training_section(train: StageView, predicted: Mapping[str, int] | None) -> dict[str, Any]:
    """Return curves, metrics, and the planned next to the measured memory."""
    steps = read_lines(train.file("metrics.jsonl"))
    return {
        "absent": "" if steps or train.metrics else train.absence,
        "unfinished": train.absence if steps and train.status != "done" else "",
        "plots": curves(steps, predicted),
        "figures": _train_figures(train.metrics),
        "memory": memory(train.metrics, predicted),
    }


def read_lines(path: Path | None) -> list[dict[str, Any]]:
    """Return the JSON objects of a file, one per line, up to an incomplete line."""
    lines: list[dict[str, Any]] = []
    if path is None:
        return lines
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            break
        if isinstance(value, dict):
            lines.append(value)
    return lines


def curves(steps: Sequence[Mapping[str, Any]], predicted: Mapping[str, int] | None) -> list[tuple[Any, str]]:
    """Return (chart, caption) of metrics.jsonl over optimiser steps."""
    charts: list[tuple[Any, str]] = [loss_curve(steps)]
    x = "optimiser step"
    norm = points(steps, "grad_norm")
    lost = sum(not math.isfinite(y) for _, y in norm)
    skipped = f" {lost} steps overflowed and are not drawn." if lost else ""
    for label, name, unit, words in (
        ("gradient norm", "grad_norm", "norm of the gradient", f"Gradient norm before clipping.{skipped}"),
        ("learning rate", "learning_rate", "learning rate", "Learning rate."),
        ("tokens per second", "tokens_per_second", "tokens / s", "Tokens trained on in a second, step by step."),
    ):
        if values := points(steps, name):
            plot = svg.lines(_range(label, values), [svg.Line(values)], x, unit, from_zero=True)
            charts.append((plot, words))
    if used := points(steps, *MEMORY_KEYS, scale=1e-9):
        level = svg.Level(predicted["total"] / 1e9, "predicted for a GPU") if predicted else None
        plot = svg.lines(_range("memory", used), [svg.Line(used)], x, "memory, GB", level=level, from_zero=True)
        charts.append((plot, "Memory while training: the peak so far, step by step."))
    return [(plot, words) for plot, words in charts if plot]


def _range(name: str, points: Sequence[tuple[float, float]]) -> str:
    finite = [y for _, y in points if math.isfinite(y)]
    if not finite:
        return name
    return f"{name} over {len(points)} steps: first {finite[0]:.4g}, last {finite[-1]:.4g}, highest {max(finite):.4g}"


def _train_figures(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not metrics:
        return []
    if "imported" in metrics:
        return [(k.replace("_", " "), number(v)) for k, v in metrics.items()]
    first = [("loss", f"{number(metrics.get('first_loss'))} → {number(metrics.get('loss'))}")]
    rest = {k: v for k, v in metrics.items() if k not in HIDDEN_TRAIN_FIGURES}
    return first + [(k.replace("_", " "), number(v)) for k, v in rest.items() if isinstance(v, (str, int, float))]


def memory(metrics: Mapping[str, Any], predicted: Mapping[str, int] | None) -> dict[str, Any] | None:
    """Return the plan's parts as bars, and the measured peak next to their sum."""
    if not predicted:
        return None
    peak, total = metrics.get("peak_memory_bytes"), predicted["total"]
    whole = max(total, peak or 0)
    parts = sorted(((MEMORY_WORDS.get(k, k), v) for k, v in predicted.items() if k != "total"), key=lambda p: -p[1])
    large = [(k, v) for k, v in parts if v >= 0.01 * total]
    large += [("the rest", rest)] if (rest := total - sum(v for _, v in large)) else []
    lines = [(k, size(v), svg.bar(f"{k}: {size(v)}", v, 0, whole)) for k, v in large]
    lines.append(("predicted in all", size(total), svg.bar(f"predicted: {size(total)}", total, 0, whole)))
    if peak:
        lines.append(("measured peak", size(peak), svg.bar(f"measured: {size(peak)}", peak, 0, whole, "measured")))
    cpu = (
        ""
        if str(metrics.get("device", "cpu")) != "cpu"
        else (
            "The prediction is for a GPU, with its own driver and buffers. This run used none: the peak is what the "
            "whole process held in RAM, libraries included."
        )
    )
    return {"lines": lines, "note": cpu if peak else ""}


def evaluation_section(stages: Stages) -> dict[str, Any]:
    """Return perplexities, use of the prompt, stop rate, and the samples side by side."""
    view = stages["evaluate"]
    m = view.metrics
    samples = read_lines(view.file("samples.jsonl"))
    return {
        "absent": "" if m else view.absence,
        "never_stops": never_stops(m),
        "intervals": perplexities(m, certificate(stages["certify"])),
        "figures": _evaluation_figures(m),
        "prompt": prompt_use(m),
        "metrics": metric_rows(m),
        "moved": [(words, [_sample(s) for s in examples]) for words, examples in moved(samples)],
        "samples": [_sample(s) for s in samples[:SAMPLES]],
        "all_samples": len(samples),
        "open_samples": OPEN_SAMPLES,
    }


def _evaluation_figures(m: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not m:
        return []
    lines = [
        ("held-out rows", f"{number(m.get('rows'))} with {number(m.get('tokens'))} supervised tokens"),
        ("perplexity of the base", _with_interval(m, "perplexity_base")),
        ("perplexity with the adapter", _with_interval(m, "perplexity_adapter")),
    ]
    if "perplexity_ratio" in m:
        lines.append(("adapter / base", _with_interval(m, "perplexity_ratio")))
    if m.get("generations"):
        base = f" (the base: {percent(m.get('stop_rate_base'))})" if m.get("stop_rate_base") is not None else ""
        lines.append(("answers that end by themselves", f"{percent(m.get('stop_rate'))} of {m['generations']}{base}"))
    if "judge" in m:
        lines.append(("judged by a language model", judge_words(m["judge"])))
    return lines + [line for name, task in m.get("tasks", {}).items() for line in task_figures(name, task)]


def metric_rows(m: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """(measure, base, adapter, difference with its interval, verdict, rows better, rows worse, rows) of the answers."""
    return [
        (
            name,
            number(f.get("base")),
            number(f.get("adapter")),
            f"{number(f.get('difference'))} ({interval(f.get('interval'))})" if f.get("rows") else NONE,
            verdict(f),
            *(number(f.get(key)) for key in ("better", "worse", "rows")),
        )
        for name, f in (m.get("metrics") or {}).items()
    ]


def moved(samples: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Return the samples with the largest mean difference adapter - base over the metrics: better, then worse."""
    changes = []
    for sample in samples:
        pairs = [p for p in (sample.get("scores") or {}).values() if None not in p]
        if pairs:
            changes.append((sum(a - b for b, a in pairs) / len(pairs), sample))
    changes.sort(key=lambda change: change[0])
    better = [s for change, s in reversed(changes) if change > 0][:MOVED_SAMPLES]
    worse = [s for change, s in changes if change < 0][:MOVED_SAMPLES]
    return [(words, examples) for words, examples in (("Got better", better), ("Got worse", worse)) if examples]


def _with_interval(m: Mapping[str, Any], name: str) -> str:
    ends = interval(m.get(f"{name}_interval"))
    return number(m.get(name)) + (f" ({ends})" if f"{name}_interval" in m else "")


def perplexities(m: Mapping[str, Any], merge: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return a chart with 95 % whiskers: evaluate's perplexities on its rows, the certificate's on its rows."""
    rows: list[tuple[str, float, float | None, float | None]] = []
    for label, name in (("base", "perplexity_base"), ("with the adapter", "perplexity_adapter")):
        if isinstance(m.get(name), (int, float)):
            low, high = m.get(f"{name}_interval") or (None, None)
            rows.append((label, float(m[name]), low, high))
    note = ""
    if merge:
        low, high = merge.get("perplexity_trained_interval") or (None, None)
        rows.append(("certificate's rows: as trained", float(merge["perplexity_trained"]), low, high))
        for name, c in merge.get("candidates", {}).items():
            low, high = c.get("perplexity_interval") or (None, None)
            rows.append((f"certificate's rows: merged, {name} base", float(c["perplexity"]), low, high))
        note = (
            f"The certificate reads {number(merge.get('rows'))} held-out rows layer by layer: compare its perplexities "
            "with each other, not with the two above. Whiskers: 95 % of bootstrap samples of rows."
        )
    rows = [r for r in rows if math.isfinite(r[1])]
    if not rows:
        return None
    label = "Perplexities: " + ", ".join(f"{name} {value:.4g}" for name, value, _, _ in rows)
    return {"plot": svg.intervals(label, rows, "perplexity (lower is better)"), "note": note}


def prompt_use(m: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return how much likelier answers are with their prompt than with another row's prompt."""
    own, other = m.get("nll_true"), m.get("nll_shuffled")
    if own is None or other is None:
        return None
    whole = max(own, other)
    lines = [
        (label, f"{value:.3f}", svg.bar(f"{label}: {value:.3f} nats per token", value, 0, whole))
        for label, value in (("own prompt", own), ("another row's prompt", other))
    ]
    ends = m.get("nll_difference_interval") or [None, None]
    words = f"Answers are {other - own:.3f} nats per token likelier under their own prompt (95 %: {interval(ends)})."
    if ends[0] is not None and ends[0] <= 0:
        words += " The interval holds 0: the model may have learned the answers' style only."
    return {"lines": lines, "words": words}


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    def answer(name: str) -> tuple[str, bool]:
        figures = sample.get(name) or {}
        return clipped(str(figures.get("text", "")), LONGEST_TEXT), figures.get("finish") == "stop"

    return {
        "id": str(sample.get("id")),
        "prompt": clipped(str(sample.get("prompt", "")), LONGEST_TEXT),
        "reference": clipped(str(sample.get("reference", "")), LONGEST_TEXT),
        "base": answer("base"),
        "adapter": answer("adapter"),
    }


def certificate(view: StageView) -> dict[str, Any] | None:
    """Return certificate.json, which also exists if the gate refused."""
    path = view.file("certificate.json")
    if path is None:
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None  # torn by a kill while it was written
    return value if isinstance(value, dict) and "perplexity_trained" in value else None


def certificate_section(stages: Stages) -> dict[str, Any]:
    """Return the text, and a line for each base that was tried."""
    view = stages["certify"]
    figures = certificate(view)
    if figures is None:
        return {"absent": view.absence}
    words = str(figures.get("words", ""))
    return {
        "absent": "",
        "refused": view.absence if view.status == "refused" else "",
        "words": f"The adapter, {words}." if words else "",
        "base": figures["base"],
        "candidates": figures.get("candidates", {}),
        "nan": math.nan,
        "difference": _difference(figures.get("dequantized_minus_original")),
    }


def _difference(apart: Mapping[str, Any] | None) -> str:
    """Return the reason for the choice between the two bases."""
    if not apart:
        return ""
    value, ends = apart["nll_per_token"], sorted(abs(v) for v in apart["interval"])
    sure = apart["interval"][0] * apart["interval"][1] > 0
    range_ = f"95 %: {interval(ends)}" if sure else f"95 %: {interval(apart['interval'])}, which holds 0"
    return (
        f"Merged into the dequantized base, an answer's token costs {abs(value):.3g} nats "
        f"{'less' if value < 0 else 'more'} than merged into the original ({range_})."
    )


def export_section(view: StageView) -> dict[str, Any]:
    """Return notes on the exported files, and a plot of bits against perplexity."""
    m = view.metrics
    scores, bits = m.get("perplexity", {}), m.get("bits_per_weight", {})
    notes = []
    if not m.get("tokenizer_exact", True):
        text = m.get("tokenizer_differs", "some text")
        notes.append(f"llama.cpp reads {text} in other tokens than the base's own tokenizer.")
    if "merged" in scores:
        notes.append(f"The merged model's perplexity on the same {m.get('perplexity_rows')} held-out rows: "
                     f"{number(scores['merged'])}.")  # fmt: skip
    if m.get("not_loaded"):
        notes.append(f"Read again a tensor at a time, and not by transformers as well: {m['not_loaded']}.")
    if m.get("perplexity_unknown"):
        notes.append(f"Perplexity not measured: {m['perplexity_unknown']}.")
    points = [(kind, bits[kind], scores[kind]) for kind in scores if kind in bits]
    plot = svg.points("perplexity against bits per weight", points, "bits per weight", "perplexity")
    return {"absent": "" if m else view.absence, "note": " ".join(notes), "plot": plot}
