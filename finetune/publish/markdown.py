"""Text for Markdown in which nothing that was measured or written by others can break out of its place."""

from __future__ import annotations

import re

from finetune.utils.format import visible


class Markdown(str):
    """Text that is Markdown already and must not be escaped again."""

    __slots__ = ()


def escaped(value: object) -> str:
    """`value` as plain text in Markdown: no emphasis, link, HTML, table border or line break can come from it."""
    if isinstance(value, Markdown):
        return value
    text = re.sub(r"\s+", " ", visible(str(value)))
    text = re.sub(r"([\\`*\[\]<|])", r"\\\1", text)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)


def code(value: object) -> Markdown:
    """`value` as a code span, fit for a table cell."""
    text = re.sub(r"\s+", " ", visible(str(value))).replace("|", "\\|")
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return Markdown(f"{ticks} {text} {ticks}" if len(ticks) > 1 else f"`{text}`")


def fence(value: object, language: str = "") -> Markdown:
    """`value` as a code block that nothing inside it can close."""
    text = visible(str(value)).strip("\n")
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return Markdown(f"{ticks}{language}\n{text}\n{ticks}")


def number(value: object) -> str:
    """A figure for people: thousands parted, four digits of a fraction."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
