"""Charts of a report as inline SVG: lines, histograms, intervals and bars.

Widths and colours come from the page's style sheet through class names, so that a chart follows theme and screen.
Every chart has an aria-label; no two things in one differ by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from finetune.utils.format import visible

WIDTH, HEIGHT = 400.0, 216.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 18.0, 26.0, 38.0
MOST_POINTS = 400
LONGEST_NAME = 44  # characters that fit across a chart

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """One curve. `look` is a class of the style sheet: bold, faint, dashed or dots."""

    points: Points
    look: str = "bold"


@dataclass(frozen=True)
class Level:
    """A horizontal reference line and its label."""

    value: float
    label: str


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return about `about` round numbers (1, 2, 5 × a power of ten) from `low` to `high`."""
    raw = (high - low) / about
    if not raw > 1e-300:  # a step this small is below the precision of floats
        return [low]
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(m * scale for m in (1, 2, 5, 10) if m * scale >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """Return a tick's label: 0.05, 12, 1.5k, 2M, 1e-5."""
    size = abs(value)
    if size < 1e-12:
        return "0"
    if size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if size >= scale:
            return f"{value / scale:.4g}{unit}"
    return f"{value:.4g}"


def thinning(count: int, most: int = MOST_POINTS) -> int:
    """Return how many neighbouring points `thinned` averages into one."""
    return max(1, -(-count // most))


def thinned(points: Points, most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """Average runs of neighbouring points, so that at most `most` are left."""
    run = thinning(len(points), most)
    if run == 1:
        return list(points)
    groups = [points[i : i + run] for i in range(0, len(points), run)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def smoothed(points: Points, window: int) -> list[tuple[float, float]]:
    """Return the trailing mean of `y` over `window` points."""
    means, total = [], 0.0
    for i, (x, y) in enumerate(points):
        total += y - (points[i - window][1] if i >= window else 0.0)
        means.append((x, total / min(i + 1, window)))
    return means


def lines(
    label: str,
    curves: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    level: Level | None = None,
    from_zero: bool = False,
    y_text: Callable[[float], str] = short,
) -> Markup:
    """Draw curves over one pair of axes, x from 0 on; points that are not finite are left out."""
    drawn = [Line(thinned([p for p in c.points if all(map(math.isfinite, p))]), c.look) for c in curves]
    every = [p for c in drawn for p in c.points]
    if not every:
        return Markup("")
    ys = [y for _, y in every] + ([level.value] if level else [])
    low, high = (0.0 if from_zero else min(ys)), max(ys)
    low, high = _widened(low, high, from_zero)
    if level is not None and level.value > low + 0.85 * (high - low):
        high += 0.12 * (high - low)  # room for its label above the curves
    frame = _Frame(0.0, max(x for x, _ in every), low, high)
    parts = [frame.axes(x_label, y_label, y_text)]
    for curve in drawn:
        parts.append(_curve(frame, curve))
    if level is not None:
        y = frame.y(level.value)
        crossed = any(y - 16 < frame.y(value) < y for _, value in every)  # a curve crosses the place of its label
        words = y - 4 if y - TOP > 16 and not crossed else y + 13
        parts.append(
            f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="note" x="{WIDTH - RIGHT - 2}" y="{words:.1f}" text-anchor="end">{_text(level.label)}</text>'
        )
    return _drawing(label, HEIGHT, parts)


def points(label: str, named: Sequence[tuple[str, float, float]], x_label: str, y_label: str) -> Markup:
    """Draw a named dot for each (name, x, y), x from 0 on; one that is not finite is left out."""
    drawn = [(name, x, y) for name, x, y in named if math.isfinite(x) and math.isfinite(y)]
    if not drawn:
        return Markup("")
    ys = [y for _, _, y in drawn]
    frame = _Frame(0.0, 1.08 * max(x for _, x, _ in drawn), *_widened(min(ys), max(ys), False))
    parts = [frame.axes(x_label, y_label, short)]
    placed: list[tuple[float, float]] = []
    for name, x, y in sorted(drawn, key=lambda point: point[1:]):
        across, down = frame.x(x), frame.y(y) - 7
        while any(abs(across - a) < 60 and abs(down - b) < 11 for a, b in placed):  # a name over another
            down -= 11
        placed.append((across, down))
        parts.append(
            f'<circle class="dot" cx="{across:.1f}" cy="{frame.y(y):.1f}" r="4"/>'
            f'<text class="note" x="{across:.1f}" y="{down:.1f}" text-anchor="middle">{_text(name)}</text>'
        )
    return _drawing(label, HEIGHT, parts)


def _curve(frame: _Frame, curve: Line) -> str:
    places = [(frame.x(x), frame.y(y)) for x, y in curve.points]
    if len(places) == 1 or curve.look == "dots":
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places)
        if len(places) == 1:
            return f'<g class="dots">{dots}</g>'
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        return f'<g class="dots">{dots}<polyline class="dashed" points="{path}"/></g>'
    return f'<polyline class="curve {curve.look}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>'


def histogram(
    label: str, counts: Sequence[int], width: float, x_label: str, y_label: str, *, limit: float | None = None
) -> Markup:
    """Draw bars from 0 on, each `width` wide; `limit` is a value marked on the x axis."""
    if not counts or not sum(counts):
        return Markup("")
    frame = _Frame(0.0, width * len(counts), 0.0, max(counts) * 1.05)
    parts = [frame.axes(x_label, y_label, short, whole=True)]
    for i, count in enumerate(counts):
        left, right, top = frame.x(i * width), frame.x((i + 1) * width), frame.y(count)
        if count:
            wide, high = max(right - left - 0.8, 0.6), max(frame.y(0) - top, 0.6)
            parts.append(
                f'<rect class="bar" x="{left + 0.4:.1f}" y="{frame.y(0) - high:.1f}" '
                f'width="{wide:.1f}" height="{high:.1f}"/>'
            )
    if limit is not None and 0 < limit <= width * len(counts):
        x = frame.x(limit)
        side = "end" if x > WIDTH / 2 else "start"
        parts.append(
            f'<line class="level" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{frame.y(0):.1f}"/>'
            f'<text class="note" x="{x + (-4 if side == "end" else 4):.1f}" y="{TOP + 9}" text-anchor="{side}">'
            f"limit {short(limit)}</text>"
        )
    return _drawing(label, HEIGHT, parts)


def intervals(label: str, rows: Sequence[tuple[str, float, float | None, float | None]], x_label: str) -> Markup:
    """Draw a dot for each (name, value, low, high), with a whisker if the ends are known; one row per name."""
    if not rows:
        return Markup("")
    ends = [v for _, value, low, high in rows for v in (value, low, high) if v is not None]
    bottom, top = _widened(min(ends), max(ends), False)
    step, height = 36.0, 36.0 * len(rows) + 40.0
    parts = []
    for t in ticks(bottom, top):
        x = _scaled(t, bottom, top, 8, WIDTH - 8)
        anchor = "start" if x < 20 else "end" if x > WIDTH - 20 else "middle"  # a number at the edge is not cut
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - 34:.1f}"/>'
            f'<text class="tick" x="{x:.1f}" y="{height - 20:.1f}" text-anchor="{anchor}">{short(t)}</text>'
        )
    for i, (name, value, low, high) in enumerate(rows):
        y = 27.0 + i * step
        x = _scaled(value, bottom, top, 8, WIDTH - 8)
        side = ("end", WIDTH - 8) if x > WIDTH / 2 else ("start", 8.0)
        parts.append(
            f'<text class="name" x="{side[1]}" y="{y - 10:.1f}" text-anchor="{side[0]}">{_text(name[:LONGEST_NAME])} '
            f"{_text(f'{value:.4g}')}</text>"
        )
        if low is not None and high is not None:
            a, b = (_scaled(v, bottom, top, 8, WIDTH - 8) for v in (low, high))
            parts.append(f'<path class="whisker" d="M{a:.1f} {y - 4}v8m0 -4H{b:.1f}m0 -4v8"/>')
        parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
    parts.append(f'<text class="axis" x="{WIDTH - 8}" y="{height - 4:.1f}" text-anchor="end">{_text(x_label)}</text>')
    return _drawing(label, height, parts)


def bar(label: str, kept: float, lost: float, whole: float, look: str = "kept") -> Markup:
    """Draw one bar: `kept` filled, then `lost` in outline, both as shares of `whole`.

    `look` is a class of the style sheet: kept, or measured.
    """
    if whole <= 0:
        return Markup("")
    a, b = 100 * kept / whole, 100 * lost / whole
    rects = f'<rect class="{look}" x="0" y="0" width="{a:.2f}" height="10"/>'
    if lost > 0:
        rects += f'<rect class="lost" x="{a:.2f}" y="0" width="{max(b, 0.3):.2f}" height="10"/>'
    return Markup(  # noqa: S704 - figures and escaped text only
        f'<svg class="level-bar" viewBox="0 0 100 10" preserveAspectRatio="none" role="img" '
        f'aria-label="{_text(label)}">{rects}</svg>'
    )


@dataclass(frozen=True)
class _Frame:
    """Axes of a chart: data values to SVG coordinates."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return _scaled(value, self.x_low, self.x_high, LEFT, WIDTH - RIGHT)

    def y(self, value: float) -> float:
        return _scaled(value, self.y_low, self.y_high, HEIGHT - BOTTOM, TOP)

    def axes(self, x_label: str, y_label: str, y_text: Callable[[float], str], *, whole: bool = False) -> str:
        """Draw ticks, grid and labels; with `whole`, ticks at integers only."""
        parts = []
        for t in ticks(self.y_low, self.y_high):
            if whole and t != round(t):
                continue
            y = self.y(t)
            parts.append(
                f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_text(y_text(t))}</text>'
            )
        for t in ticks(self.x_low, self.x_high, 6):
            parts.append(
                f'<text class="tick" x="{self.x(t):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">'
                f"{short(t)}</text>"
            )
        base = HEIGHT - BOTTOM
        parts.append(f'<line class="base" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
        parts.append(f'<text class="axis" x="2" y="12">{_text(y_label)}</text>')
        parts.append(
            f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{_text(x_label)}</text>'
        )
        return "".join(parts)


def _scaled(value: float, low: float, high: float, start: float, end: float) -> float:
    return start + (end - start) * ((value - low) / (high - low) if high > low else 0.5)


def _widened(low: float, high: float, from_zero: bool) -> tuple[float, float]:
    """Return the range with a margin, also when all values are equal."""
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (low if from_zero else low - room), high + room


def _drawing(label: str, height: float, parts: Sequence[str]) -> Markup:
    return Markup(  # noqa: S704 - figures and escaped text only
        f'<svg class="plot" viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" aria-label="{_text(label)}">'
        f"{''.join(parts)}</svg>"
    )


def _text(value: str) -> str:
    return str(escape(visible(value)))
