"""Card sections built from metrics: data, funnel, training, evaluation, certificate, samples, limits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.eval.answer_metrics import words_of
from finetune.eval.verdict import Line
from finetune.hub.client import HF_KINDS, Kind
from finetune.publish.facts import Facts, Json
from finetune.publish.markdown import Markdown, code, escaped
from finetune.recipe import Generate, HubSource, LocalSource, Recipe
from finetune.synth.judge import words_of as judge_words
from finetune.utils.format import clipped, number, task_figures

FUNNEL = ("ingest", "filter", "dedup", "decontaminate", "sample", "split")
ROWS = ("rows_out", "rows", "rows_kept", "kept", "train_rows")
EVALUATION = ("perplexity_base", "perplexity_adapter", "perplexity_merged", "stop_rate")
TRAINED_ELSEWHERE = ("device", "processes", "peak_memory_bytes", "tokens_per_second")  # reported in the template
LONGEST_LIST, LONGEST_SAMPLE = 12, 600


def base_words(base: Json, licences: Mapping[str, str]) -> Markdown:
    """The base with its revision, size and licence."""
    size = f", {base['parameters']:,} parameters" if "parameters" in base else ""
    if base["kind"] == "hub":
        link = f"[{escaped(base['id'])}](https://huggingface.co/{base['id']})"
        licence = escaped(licences.get(f"model {base['id']}", "unknown"))
        return Markdown(f"{link} at revision {code(base.get('revision') or 'unknown')}{size}, licence: {licence}")
    return Markdown(f"{code(base['id'])}, which is not on the Hub{size}")


def sources(facts: Facts) -> list[Markdown]:
    """A line for each source: where its rows came from, at which revision, under which licence."""
    lines = []
    recipe = facts.recipe
    for position, source in enumerate([*recipe.data, *(recipe.eval_data or [])]):
        pinned = facts.sources[position] if position < len(facts.sources) else {}
        weight = f", weight {number(source.weight)}" if source.weight != 1 else ""
        if isinstance(source, HubSource):
            link = f"[{escaped(source.id)}](https://huggingface.co/datasets/{source.id})"
            at = code(pinned.get("commit") or source.revision or "unknown")
            licence = escaped(facts.licences.get(f"dataset {source.id}", "unknown"))
            words = f"{link}, split {code(source.split)}, revision {at}, licence: {licence}{weight}"
        elif isinstance(source, LocalSource):
            digest = f", xxh3 {code(pinned['xxh3_128'])}" if "xxh3_128" in pinned else ""
            files = len(pinned.get("files") or [1])
            what = "a local file" if files == 1 else f"{files} local files"
            words = f"{what}, {code(source.label)}{digest}, licence: unknown{weight}"
        else:
            words = f"{code(source.label)}: the documentation in Python's standard library (PSF licence){weight}"
        trained = recipe.train is not None and position < len(recipe.data)
        lines.append(Markdown(words if trained else f"measured on, not trained on: {words}"))
    if recipe.generate is not None:
        lines.append(_generated(facts, recipe.generate))
    for source in recipe.preference.data if recipe.preference else []:
        licence = escaped(facts.licences.get(f"dataset {source.label}", "unknown"))
        lines.append(Markdown(f"preferences: {code(source.label)}, licence: {licence}"))
    return lines


def _generated(facts: Facts, section: Generate) -> Markdown:
    """The rows that a language model wrote, its name and its licence."""
    made = facts.metrics.get("generate") or {}
    local = section.model.local
    known = section.model.license or (facts.licences.get(f"model {local.id}") if local else None)
    answered = [name for name in made.get("answered_by", {}) if name != section.model.label]
    named = f" (the server names {', '.join(map(code, answered))})" if answered else ""
    rows = f"{number(made['rows_out'])} rows" if "rows_out" in made else "rows"
    seeds = ", ".join(code(source.label) for source in section.seeds)
    return Markdown(
        f"{code('generate')}: {rows} written by the language model {code(section.model.label)}{named} with "
        f"{code(section.method)} from {seeds}; licence or terms of that model: {escaped(known or 'unknown')}"
    )


def funnel(metrics: Mapping[str, Json]) -> list[tuple[str, str, str]]:
    """(stage, rows left, the other figures) of every data stage that ran, in order."""
    lines = []
    for stage in FUNNEL:
        if measured := metrics.get(stage):
            key = next((k for k in ROWS if isinstance(measured.get(k), int)), None)
            rest = [f"{n} {v}" for n, v in figures({k: v for k, v in measured.items() if k != key})]
            lines.append((stage, number(measured[key]) if key else "", "; ".join(rest[:LONGEST_LIST])))
    return lines


def training(metrics: Mapping[str, Json]) -> list[tuple[str, str]]:
    """Return the training metrics that the lines on the machine do not report."""
    return figures({k: v for k, v in (metrics.get("train") or {}).items() if k not in TRAINED_ELSEWHERE})


def evaluation(metrics: Mapping[str, Json]) -> tuple[list[tuple[str, str]], str]:
    """Return names and values (base, adapter, merged, each GGUF, then the rest), and what they were measured on."""
    certify, evaluate, export = (metrics.get(stage) or {} for stage in ("certify", "evaluate", "export"))
    both = {**certify, **evaluate}
    first = {k: both[k] for k in EVALUATION if k in both}
    files = {f"perplexity_{_file(k)}": v for k, v in export.get("perplexity", {}).items() if k != "merged"}
    if files:
        beside = "as_gguf" if any(name.startswith("perplexity_gguf_") for name in files) else "beside_files"
        first[f"perplexity_merged_{beside}"] = export["perplexity"]["merged"]
        files |= {f"agreement_{_file(k)}": v for k, v in export.get("agreement", {}).items()}
        files |= {f"mean_kl_{k}": v for k, v in export.get("mean_kl", {}).items() if k in HF_KINDS}
        files |= {f"bytes_{k}": v for k, v in export.get("bytes", {}).items() if k in HF_KINDS}
    rest = {k: v for k, v in evaluate.items() if k not in first and k not in ("tasks", "metrics", "judge")}
    answers = [
        (name, words_of(name, f).removeprefix(name).lstrip(": ")) for name, f in evaluate.get("metrics", {}).items()
    ]
    judged = [("judge", judge_words(evaluate["judge"]))] if "judge" in evaluate else []
    tasks = [line for name, task in evaluate.get("tasks", {}).items() for line in task_figures(name, task)]
    on = []
    if "perplexity_base" in evaluate:
        on.append(f"`perplexity_base` and `perplexity_adapter` on {number(evaluate.get('rows', 'the same'))} rows")
    if "perplexity_merged" in certify:
        on.append(f"`perplexity_merged` on the {number(certify.get('tokens', 'chosen'))} tokens of the certificate")
    if files:
        on.append(
            "the exported files, and the merged model once more beside them, on "
            f"{number(export['perplexity_rows'])} rows"
        )
    if files and "agreement" in export:
        on.append("`agreement_…`: the share of those rows' next tokens on which file and merged model agree")
    if answers:
        on.append(f"the measures of answers on {number(evaluate['generations'])} greedy answers, base → adapter")
    return figures({**first, **files, **rest}) + answers + judged + tasks, "; ".join(on)


def _file(kind: str) -> str:
    """Return the name of an exported file in a card's figures."""
    return kind if kind in HF_KINDS else f"gguf_{kind}"


def figures(values: Json) -> list[tuple[str, str]]:
    """Return names and formatted values of metrics: counts are joined into a line, an interval is a range."""
    lines = []
    for name, value in values.items():
        if isinstance(value, int) and name.endswith("_bytes") and value >= 10**8:
            lines.append((name, f"{value / 1e9:.2f} GB"))
        elif text := _value_text(value):
            lines.append((name, text))
    return lines


def _value_text(value: object) -> str:
    """Format a scalar, a pair of numbers or a mapping of those; "" if there is no short form."""
    if isinstance(value, Mapping):
        parts = [f"{key} {text}" for key, inner in value.items() if (text := _value_text(inner))]
        return ", ".join(parts[:LONGEST_LIST])
    if isinstance(value, (list, tuple)):
        return " to ".join(number(v) for v in value) if len(value) == 2 else ""
    return number(value) if isinstance(value, (str, int, float)) else ""


def certificate_words(certificate: Json | None) -> str:
    """Return the certificate in one or two sentences."""
    if certificate is None:
        return "There is none: the difference between a merged and the trained model was not measured."
    if certificate.get("words"):
        return f"The adapter, {certificate['words']}."
    into = {
        "original": "the base's original 16-bit weights",
        "dequantized": "the base as the adapter saw it in training, dequantised from 4 bits",
    }.get(str(certificate.get("base")), str(certificate.get("base")))
    words = f"The adapter is merged into {into}."
    named = (
        ("perplexity_trained", "perplexity as trained"),
        ("perplexity_merged", "as merged"),
        ("mean_kl", "mean KL divergence between the two"),
        ("agreement", "share of equal next-token choices"),
    )
    measured = [f"{label} {number(certificate[k])}" for k, label in named if certificate.get(k) is not None]
    return f"{words} Measured on held-out rows: {', '.join(measured)}." if measured else words


def samples(facts: Facts) -> list[dict[str, str]]:
    """Return prompt and answers of base and adapter, each with at most LONGEST_SAMPLE characters."""
    lines = []
    for line in facts.samples:
        answers = {who: clipped(line[who]["text"].strip("\n"), LONGEST_SAMPLE) for who in ("base", "adapter")}
        ends = {f"{who}_end": "" if line[who]["finish"] == "stop" else " (did not end)" for who in ("base", "adapter")}
        lines.append(
            {"id": str(line["id"]), "prompt": clipped(line["prompt"].strip("\n"), LONGEST_SAMPLE), **answers, **ends}
        )
    return lines


def verdict_lines(facts: Facts) -> tuple[Line, ...]:
    """Return the verdict without its last line, which is advice for the publisher."""
    return facts.verdict.lines[:-1] if facts.verdict else ()


def without_folders(text: str, recipe: Recipe) -> str:
    """Return the recipe's text with local folders shortened, because paths of this machine are private."""
    text = re.sub(r"(?m)^# yaml-language-server: .*\n", "", text)  # an editor's line, with a path of this machine
    compared = recipe.decontaminate.against if recipe.decontaminate else []
    pairs = [*recipe.preference.data, *(recipe.preference.eval_data or [])] if recipe.preference else []
    seeds = recipe.generate.seeds if recipe.generate else []
    every = [*recipe.data, *(recipe.eval_data or []), *compared, *pairs, *seeds]
    paths = [path for s in every if isinstance(s, LocalSource) for path in s.paths]
    encoder = recipe.dedup.embedding_folder if recipe.dedup else None
    judge = recipe.evaluate.judge if recipe.evaluate else None
    writers = [s.model.local.folder for s in (recipe.generate, judge) if s is not None and s.model.local is not None]
    own = recipe.generate.prompts_path if recipe.generate else None
    named = (recipe.model.folder, recipe.render.template_file, recipe.lora.start_folder, encoder, own, *writers)
    paths += [p for p in named if p is not None]
    for path in sorted(paths, key=lambda p: -len(str(p))):
        written = [str(path)]
        if path.is_relative_to(Path.home()):
            written.append(f"~/{path.relative_to(Path.home())}")
        for form in written:
            text = text.replace(form, f"…/{path.name}")
    return text


def results(kind: Kind, facts: Facts) -> list[Any]:
    """Return metrics as huggingface_hub's EvalResults, with the data they were measured on.

    Only metrics of the pushed model itself: the stop rate is the adapter's.
    """
    from huggingface_hub import EvalResult

    measured_on = facts.recipe.eval_data or facts.recipe.data
    names = list(dict.fromkeys(s.label for s in measured_on))
    if not names and facts.recipe.generate is not None:
        names = ["generate"]
    if not names:  # an adapter merged without rows for measuring
        return []
    on_hub = [s for s in measured_on if isinstance(s, HubSource)]
    where: dict[str, Any] = {
        "task_type": "text-generation",
        "dataset_name": f"held-out rows of {' and '.join(names)}",
        "dataset_type": on_hub[0].id if on_hub else names[0],
    }
    evaluate, certify = facts.metrics.get("evaluate") or {}, facts.metrics.get("certify") or {}
    figures: list[tuple[str, str, Any]] = []
    if kind == "adapter":
        figures.append(("perplexity", "Perplexity", evaluate.get("perplexity_adapter")))
        figures.append(("stop_rate", "Share of greedy answers that end", evaluate.get("stop_rate")))
    elif kind == "merged":
        figures.append(("perplexity", "Perplexity", certify.get("perplexity_merged")))
    else:
        files = (facts.metrics.get("export") or {}).get("perplexity", {})
        own = [n for n in files if n == kind or (kind == "gguf" and n not in ("merged", *HF_KINDS))]
        figures += [("perplexity", f"Perplexity ({name})", files[name]) for name in own]
    return [
        EvalResult(**where, metric_type=metric, metric_name=name, metric_value=value)
        for metric, name, value in figures
        if isinstance(value, (int, float))
    ]
