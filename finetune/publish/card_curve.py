"""The training curve as a standalone SVG file.

SVG needs no drawing library, is a few kilobytes of text, and is displayed by the Hub (whose badges are SVG files of a
repository). The file includes its style and a white background, because a README is also shown on dark pages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from finetune.utils import svg as plots

STYLE = (
    "text{font:11px sans-serif;fill:#555}"
    ".grid{stroke:#ddd;stroke-width:1}.base{stroke:#555;stroke-width:1}"
    ".curve{fill:none;stroke:#1a5fb4;stroke-width:2.2;stroke-linejoin:round}.curve.faint{stroke:#9dbfe6;stroke-width:1}"
    ".dot{fill:#1a5fb4}.dots circle{fill:#fff;stroke:#b3541e;stroke-width:2}"
    ".dashed{fill:none;stroke:#b3541e;stroke-width:1.2;stroke-dasharray:4 3}"
)
HELD_OUT = ("held_out_loss", "eval_loss")


def points(steps: Sequence[Mapping[str, Any]], *names: str, scale: float = 1.0) -> list[tuple[float, float]]:
    """Return (step, value) of the lines of metrics.jsonl that have one of these figures."""
    return [
        (float(s["step"]), float(s[n]) * scale) for s in steps if "step" in s for n in names if s.get(n) is not None
    ]


def loss_curve(steps: Sequence[Mapping[str, Any]]) -> tuple[Markup, str]:
    """Return (chart, caption) of the loss over optimiser steps, both empty without a finite loss."""
    loss, held = [p for p in points(steps, "loss") if math.isfinite(p[1])], points(steps, *HELD_OUT)
    if not loss:
        return Markup(""), ""
    window, run = max(2, len(loss) // 15), plots.thinning(len(loss))
    lines = [plots.Line(loss, "faint"), plots.Line(plots.smoothed(loss, window))]
    lines += [plots.Line(held, "dots")] if held else []
    label = f"Loss over {len(loss)} logged steps: first {loss[0][1]:.4g}, last {loss[-1][1]:.4g}"
    thin = "as logged" if run == 1 else f"the mean of every {run} steps"
    words = f"{label}. Thin: {thin}; bold: the mean of the last {window}." + (" Dots: held-out rows." if held else "")
    return plots.lines(label, lines, "optimiser step", "loss, nats per token"), words


def training_curve(steps: Sequence[Mapping[str, Any]]) -> tuple[bytes, str]:
    """Return (SVG file, caption) of the loss over optimiser steps; (b"", "") with fewer than two steps."""
    if sum(math.isfinite(y) for _, y in points(steps, "loss")) < 2:
        return b"", ""
    chart, words = loss_curve(steps)
    return standalone(str(chart)).encode(), words


def standalone(drawn: str) -> str:
    """Return a chart of utils/svg.py as a file of its own, with style and background."""
    head, _, body = drawn.partition(">")
    size = f'xmlns="http://www.w3.org/2000/svg" width="{2 * plots.WIDTH:.0f}" height="{2 * plots.HEIGHT:.0f}"'
    ground = '<rect width="100%" height="100%" fill="#fff"/>'
    return f"{head.replace('<svg', f'<svg {size}', 1)}><style>{STYLE}</style>{ground}{body}\n"
