"""The report's section on generated rows: funnel, rounds, lines of descent."""

from __future__ import annotations

from typing import Any

from finetune.report.stage_view import StageView
from finetune.utils import svg
from finetune.utils.files import read_json


def synthetic_section(view: StageView | None) -> dict[str, Any] | None:
    """Return reasons, rounds and lines of descent of stage generate; None if the recipe has no generate section."""
    if view is None or view.status == "off" or (view.status == "missing" and not view.metrics):
        return None
    m = view.metrics
    rejected = m.get("rejected", {})
    rounds = m.get("rounds", [])
    path = view.file("lineage.json")
    points = {name: [(float(r["round"]), float(r[name])) for r in rounds if r[name] is not None] for name in SHOWN}
    plots = [
        (svg.lines(title, [svg.Line(points[name])], "round", unit), words)
        for name, (title, unit, words) in SHOWN.items()
        if len(points[name]) > 1
    ]
    return {
        "absent": "" if m else view.absence,
        "rejected": sorted(((k.replace("_", " "), v) for k, v in rejected.items()), key=lambda pair: -pair[1]),
        "rounds": rounds,
        "plots": [(plot, words) for plot, words in plots if plot],
        "lines": read_json(path) if path is not None and view.manifest is not None else [],
    }


SHOWN = {
    "instruction_words": ("words of an instruction", "words", "Mean words of the instructions of each round."),
    "distinct_2": ("different word pairs", "share", "Different among all pairs of successive words of instructions."),
}
