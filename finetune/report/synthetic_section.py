"""The report's section on generated rows: funnel, rounds, lines of descent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.report.stage_view import StageView
from finetune.utils import svg
from finetune.utils.files import read_json
from finetune.utils.format import number, percent


def synthetic_section(view: StageView | None) -> dict[str, Any] | None:
    """Figures, reasons, rounds and lines of descent of stage generate; None if the recipe has no generate section."""
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
        "figures": _figures(m),
        "rejected": sorted(((k.replace("_", " "), v) for k, v in rejected.items()), key=lambda pair: -pair[1]),
        "rounds": [
            (r["round"], number(r["tried"]), number(r["rows"]), number(r["instruction_words"]),
             number(r["answer_words"]), percent(r["distinct_2"]) if r["distinct_2"] is not None else "")
            for r in rounds
        ],
        "plots": [(plot, words) for plot, words in plots if plot],
        "lines": read_json(path) if path is not None and view.manifest is not None else [],
    }  # fmt: skip


SHOWN = {
    "instruction_words": ("words of an instruction", "words", "Mean words of the instructions of each round."),
    "distinct_2": ("different word pairs", "share", "Different among all pairs of successive words of instructions."),
}


def _figures(m: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if not m:
        return []
    return [
        ("written by", f"{m['model']} ({m['method']})"),
        ("seeds", f"{number(m['seeds'])}, {number(m['seeds_refused'])} refused"),
        ("candidates", number(m["candidates"])),
        ("rows", number(m["rows_out"])),
        ("requests", number(m["requests"])),
        ("tokens", f"{number(m['prompt_tokens'])} of prompts, {number(m['tokens'])} of responses"),
        ("operations", ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in m["operations"].items())),
    ]
