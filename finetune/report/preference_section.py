"""The report's section on preference training: what it was held to, curves, and what it changed."""

from __future__ import annotations

from typing import Any

from finetune.preference.words import figures_of, words_of
from finetune.report.model_sections import curves, read_lines
from finetune.report.stage_view import StageView
from finetune.utils import svg

CURVES = (
    ("margin", "margin", "nats", "Margin: β times by how much more the chosen answers gained than the rejected ones."),
    ("pairs_right", "pairs told apart", "share", "Share of the batch's pairs whose chosen answer gained more."),
    ("kl", "distance", "nats", "KTO: the distance to the reference that answers are compared with."),
)


def preference_section(align: StageView | None) -> dict[str, Any] | None:
    """Figures, sentences and drawings of stage align; None if the recipe has no preference section."""
    if align is None or align.status == "off" or (align.status == "missing" and not align.metrics):
        return None
    steps = read_lines(align.file("metrics.jsonl"))
    return {
        "absent": "" if steps or align.metrics else align.absence,
        "unfinished": align.absence if steps and align.status != "done" else "",
        "words": words_of(align.metrics) if "eval_pairs" in align.metrics else [],
        "figures": figures_of(align.metrics),
        "plots": [*curves(steps, None)[:1], *_curves(steps)],
    }


def _curves(steps: list[dict[str, Any]]) -> list[tuple[Any, str]]:
    charts = []
    for name, title, unit, words in CURVES:
        points = [(float(s["step"]), float(s[name])) for s in steps if "step" in s and name in s]
        if points and (plot := svg.lines(title, [svg.Line(points)], "optimiser step", unit)):
            charts.append((plot, words))
    return charts
