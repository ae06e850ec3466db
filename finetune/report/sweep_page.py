"""The page of a sweep: a table and a plot of the metric."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from finetune.pipeline.store import Store
from finetune.pipeline.sweep import Result, Sweep, as_json
from finetune.report.html import render_page
from finetune.utils import svg
from finetune.utils.files import replace_bytes
from finetune.utils.format import NONE, duration, interval, json_text, number

COLUMNS = ("value", "95 %", "own time", "status", "run")


def table(sweep: Sweep, results: Sequence[Result]) -> list[list[str]]:
    """Return a line of cells for each point: the values of its fields, then COLUMNS; the best is marked."""
    best = sweep.best(results)
    return [
        [
            *r.point.values.values(),
            number(r.value) + (" (best)" if r is best else ""),
            interval(r.interval) if r.interval else "",
            duration(r.seconds) if r.seconds else NONE,
            r.status,
            r.point.recipe.name,
        ]
        for r in results
    ]


def columns(sweep: Sweep) -> list[str]:
    """Return the header of `table`."""
    return [*sweep.points[0].values, *COLUMNS]


def write_page(store: Store, sweep: Sweep, results: Sequence[Result], best: str) -> Path:
    """Write artifacts/sweeps/NAME.html and NAME.json; `best` is the command of the best point. Return the page."""
    rows = [(r.point.label, r.value, *(r.interval or (None, None))) for r in results if r.value is not None]
    words = f"{sweep.metric} ({'higher' if sweep.highest else 'lower'} is better)"
    facts = {
        "recipe": sweep.loaded.recipe.name,
        "words": words,
        "done": sum(r.value is not None for r in results),
        "plot": svg.intervals(f"{sweep.metric} of {len(rows)} runs", rows, words),
        "columns": columns(sweep),
        "rows": table(sweep, results),
        "best": best,
    }
    page = store.artifacts / "sweeps" / f"{sweep.name}.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    replace_bytes(page, render_page("sweep.jinja", facts))
    replace_bytes(page.with_suffix(".json"), (json_text(as_json(sweep, results)) + "\n").encode())
    return page
