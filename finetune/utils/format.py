"""Format text and numbers for people: control characters made visible, separators in counts, units on amounts."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

BIDI = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))  # they would reverse the text around them
SHOWN: dict[int, int | str] = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"},  # Unicode's control pictures
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
    **dict.fromkeys(range(0xD800, 0xE000), 0xFFFD),  # a lone surrogate: it cannot be encoded as UTF-8
    0xFFFE: 0xFFFD,
    0xFFFF: 0xFFFD,
    **{code: f"⟨U+{code:04X}⟩" for code in BIDI},
}
NONE = "–"


def visible(text: str) -> str:
    """Return `text` with every control character made visible; line ends and tabs stay."""
    return text.translate(SHOWN)


def json_text(value: object) -> str:
    """Return indented JSON in which every invisible character is a JSON escape."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    return "".join(c if c == "\n" or ord(c) not in SHOWN else f"\\u{ord(c):04x}" for c in text)


def clipped(text: str, most: int) -> str:
    """Return at most `most` characters, followed by the number left out."""
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most:,} more characters)"


def number(value: object) -> str:
    """Format a count with separators, a float with four significant digits, a bool as yes or no; str() of the rest."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"
    return str(value)


def percent(value: object) -> str:
    """Format a share as a percentage with one decimal; only 1 reads as 100 %, and only 0 as 0 %."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return NONE
    if 0.9995 <= value < 1:
        return "> 99.9 %"
    return "< 0.1 %" if 0 < value < 0.0005 else f"{value:.1%}".replace("%", " %")


def size(value: object) -> str:
    """Format bytes in decimal units: 1.09 GB."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return NONE
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.{2 if value < 10 * scale else 1}f} {unit}"
    return f"{value:.0f} bytes"


def duration(value: object) -> str:
    """Format seconds: 0.5 s, 1 min 12 s, 3 h 05 min."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return NONE
    if value < 59.95:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(value / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def interval(pair: object) -> str:
    """Format a pair as `low to high`; an empty string for anything else."""
    if isinstance(pair, (list, tuple)) and len(pair) == 2:
        return f"{number(pair[0])} to {number(pair[1])}"
    return NONE


def task_figures(name: str, task: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of each metric of a benchmark: base → adapter, with the standard error of both."""
    for metric, v in task["metrics"].items():
        before, after = (
            number(v[side]) + (f" ± {number(v[f'{side}_stderr'])}" if v[f"{side}_stderr"] is not None else "")
            for side in ("base", "adapter")
        )
        apart = f"; the difference is {interval(v['difference_interval'])}" if v["difference_interval"] else ""
        yield f"{name}, {metric}", f"{before} → {after} on {number(task['rows'])} documents{apart}"


def gb(count: float) -> str:
    """Format bytes in GB with one decimal."""
    return f"{count / 1e9:.1f} GB"


def six(value: float) -> float:
    """Round to six significant digits, so that the last bits of a sum do not change a file."""
    return float(f"{value:.6g}")


def nearest(name: object, known: Iterable[object]) -> str | None:
    """Return the known name that is most like `name`, in whatever case; None if none is like it."""
    names = {str(k).lower(): str(k) for k in known}
    return next((names[near] for near in difflib.get_close_matches(str(name).lower(), names, 1, 0.5)), None)


def did_you_mean(name: object, known: Iterable[object]) -> str:
    """Return `; did you mean NAME?` with the nearest known name, or an empty string."""
    near = nearest(name, known)
    return f"; did you mean {near}?" if near else ""


def first_line(error: object) -> str:
    """Return the first line of an error's message, or the name of its type if there is none."""
    return str(error).strip().partition("\n")[0].strip() or type(error).__name__
