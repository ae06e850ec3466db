"""The report's section on preference training: the funnel of pairs, curves, what it changed, and sample pairs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from finetune.preference.records import SIDES
from finetune.preference.words import figures_of, words_of
from finetune.report.model_sections import curves, read_lines
from finetune.report.stage_view import Stages, StageView
from finetune.utils import svg
from finetune.utils.format import clipped

CURVES = (
    ("margin", "margin", "nats", "Margin: β times by how much more the chosen answers gained than the rejected ones."),
    ("pairs_right", "pairs ranked correctly", "share", "Share of the batch's pairs whose chosen answer gained more."),
    ("kl", "distance", "nats", "KTO: the distance to the reference that answers are compared with."),
)
SAMPLES, LONGEST_TEXT = 6, 700
SHOWN_REJECTS = 2  # of each reason


def preference_section(stages: Stages) -> dict[str, Any] | None:
    """Figures, sentences, drawings and rows of the stages pairs and align; None without a preference section."""
    views = [stages[name] for name in ("pairs", "align") if name in stages and stages[name].status != "off"]
    if not any(view.metrics or view.status != "missing" for view in views):
        return None
    pairs, align = (stages.get(name) or StageView(name, "missing") for name in ("pairs", "align"))
    steps = read_lines(align.file("metrics.jsonl"))
    return {
        "absent": [view.absence for view in (pairs, align) if not view.metrics and not (view is align and steps)],
        "unfinished": align.absence if steps and align.status != "done" else "",
        "funnel": _funnel(pairs.metrics),
        "rejects": _rejects(pairs),
        "words": words_of(align.metrics) if "eval_pairs" in align.metrics else [],
        "figures": figures_of(align.metrics),
        "plots": [*curves(steps, None)[:1], *_curves(steps), *_intervals(align.metrics)],
        "samples": _samples(pairs),
    }


def _curves(steps: list[dict[str, Any]]) -> list[tuple[Any, str]]:
    charts = []
    for name, title, unit, words in CURVES:
        points = [(float(s["step"]), float(s[name])) for s in steps if "step" in s and name in s]
        if points and (plot := svg.lines(title, [svg.Line(points)], "optimiser step", unit)):
            charts.append((plot, words))
    return charts


def _intervals(m: Mapping[str, Any]) -> list[tuple[Any, str]]:
    """Held-out accuracy, of each source too, and the drift of both answers, with 95 % whiskers."""
    if "accuracy" not in m:
        return []
    groups = [("all pairs", m), *m.get("by_source", {}).items()]
    drifts = [(f"{side} answers", m[f"drift_{side}"], m[f"drift_{side}_interval"]) for side in SIDES["dpo"]]
    drawings = (
        ("pairs ranked correctly", [(name, own["accuracy"], own["accuracy_interval"]) for name, own in groups], "share",
         "Held-out pairs ranked correctly; 0.5 is chance."),
        ("drift of log-probabilities", drifts, "nats a token",
         "Change of the log-probability of held-out answers. Both below 0: both became less likely."),
    )  # fmt: skip
    return [
        (svg.intervals(label, [(name, value, *ends) for name, value, ends in rows], unit), f"{words} Whiskers: 95 %.")
        for label, rows, unit, words in drawings
    ]


def _funnel(m: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """(words, pairs, bar): what was read, each reason for which pairs were left out, what is left."""
    if not m:
        return []
    left = {"to train on": m["rows"], "held out": m["eval_rows"]}
    lost = {**m.get("refused", {}), **m.get("dropped_because", {})}
    ordered = sorted(lost.items(), key=lambda pair: (-pair[1], pair[0]))
    lines = [("read", m["rows_in"], 0), *((f"− {n.replace('_', ' ')}", 0, v) for n, v in ordered)]
    lines += [(name, count, 0) for name, count in left.items()]
    return [
        (name, f"{kept + gone:,}", svg.bar(f"{name}: {kept + gone:,}", kept, gone, m["rows_in"]))
        for name, kept, gone in lines
    ]


def _rejects(view: StageView) -> list[dict[str, str]]:
    """The first pairs of each reason in rejects.parquet."""
    import pyarrow.parquet as pq

    path = view.file("rejects.parquet")
    if path is None or view.manifest is None:
        return []
    shown: dict[str, list[dict[str, str]]] = {}
    for batch in pq.ParquetFile(path).iter_batches(columns=["id", "reason", "detail", "text"]):
        for row in batch.to_pylist():
            if len(rows := shown.setdefault(row["reason"], [])) < SHOWN_REJECTS:
                rows.append({**row, "text": clipped(row["text"] or "", LONGEST_TEXT)})
    return [row for _, rows in sorted(shown.items()) for row in rows]


def _samples(view: StageView) -> list[dict[str, Any]]:
    """Pairs with all their texts, held-out ones first."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    path = view.file("texts.parquet")
    if path is None or view.manifest is None:
        return []
    table = pq.read_table(path)
    held = pc.equal(table["split"], "eval")
    parts = (table.filter(held).slice(0, SAMPLES // 2), table.filter(pc.invert(held)).slice(0, SAMPLES))
    rows = [row for part in parts for row in part.to_pylist()]

    def text(messages: str) -> str:
        turns = [
            "\n".join([m.pop("content") or "", *([json.dumps(m, ensure_ascii=False)] if len(m) > 1 else [])])
            for m in json.loads(messages)
        ]
        return clipped("\n\n".join(turns), LONGEST_TEXT)

    return [
        {
            "id": row["pair_id"],
            "split": "held out" if row["split"] == "eval" else "trained on",
            "prompt": text(row["prompt"]),
            "answers": [(side, text(row[side])) for side in ("chosen", "rejected", "completion") if row.get(side)],
        }
        for row in rows[:SAMPLES]
    ]
