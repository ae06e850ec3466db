"""Drawings: round ticks, nothing outside the frame, no figure that is none, and labels that stay text."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.utils import svg as plots

NUMBERS = st.floats(-1e9, 1e9, allow_nan=False, width=32)


def test_a_smoothed_curve_is_a_trailing_mean_and_a_thinned_one_keeps_the_mean() -> None:
    points = [(float(i), float(i)) for i in range(10)]
    assert plots.smoothed(points, 2)[:3] == [(0, 0), (1, 0.5), (2, 1.5)]
    thin = plots.thinned([(float(i), float(i % 2)) for i in range(1000)], 100)
    assert len(thin) == 100 and {y for _, y in thin} == {0.5}


def numbers_in(svg: str) -> list[float]:
    root = ElementTree.fromstring(svg)
    found = []
    for element in root.iter():
        for name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy"):
            found += [float(element.attrib[name])] if name in element.attrib else []
        found += [float(n) for n in re.split("[ ,]", element.attrib.get("points", "")) if n]
    return found


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1e6), NUMBERS), min_size=1, max_size=30))
def test_curves_are_well_formed_and_inside_the_frame(points) -> None:
    svg = plots.lines("a", [plots.Line(points), plots.Line(points, "dots")], "x", "y")
    assert all(-1 <= n <= plots.WIDTH + 1 for n in numbers_in(svg))


@settings(deadline=None)
@given(st.lists(st.tuples(st.text(max_size=8), NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=6))
def test_intervals_are_well_formed(rows) -> None:
    svg = plots.intervals("a", rows, "x")
    assert all(math.isfinite(n) for n in numbers_in(svg))


def test_figures_that_are_none_are_left_out() -> None:
    points = [(1.0, math.nan), (2.0, 1.0), (3.0, math.inf)]
    assert "nan" not in plots.lines("a", [plots.Line(points)], "x", "y")
    assert plots.lines("a", [plots.Line([(1.0, math.nan)])], "x", "y") == ""
    assert plots.histogram("a", [0, 0], 10, "x", "y") == ""
    assert plots.bar("a", 0, 0, 0) == ""


def test_a_label_is_text_wherever_it_is_written() -> None:
    hostile = '"><script>alert(1)</script>\0\ud800'
    drawings = (
        plots.lines(hostile, [plots.Line([(1.0, 2.0)])], hostile, hostile, level=plots.Level(3.0, hostile)),
        plots.histogram(hostile, [1, 2], 5.0, hostile, hostile, limit=7),
        plots.intervals(hostile, [(hostile, 1.0, 0.5, 2.0)], hostile),
        plots.bar(hostile, 1, 1, 2),
    )
    for svg in drawings:
        names = {element.tag for element in ElementTree.fromstring(svg).iter()}
        assert names <= {"svg", "g", "line", "text", "polyline", "path", "circle", "rect"}
        svg.encode()


def test_points_have_their_names_and_none_that_is_not_finite():
    drawn = str(plots.points("a", [("<q8>", 8.5, 4.0), ("nf4", 4.5, math.inf), ("w4", 4.1, 4.0)], "bits", "perplexity"))
    assert "&lt;q8&gt;" in drawn and "w4" in drawn and "nf4" not in drawn and drawn.count("<circle") == 2
    assert plots.points("a", [("x", math.nan, 1.0)], "x", "y") == ""
