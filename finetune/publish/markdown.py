"""Escape untrusted text for Markdown."""

from __future__ import annotations

import re

from finetune.utils.format import visible


class Markdown(str):
    """Text that is already Markdown and must not be escaped again."""

    __slots__ = ()


def escaped(value: object) -> str:
    """Return `value` as plain text in Markdown, without emphasis, links, HTML, table borders or line breaks."""
    if isinstance(value, Markdown):
        return value
    text = re.sub(r"\s+", " ", visible(str(value)))
    text = re.sub(r"([\\`*\[\]<|])", r"\\\1", text)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)


def code(value: object) -> Markdown:
    """Return `value` as a code span that is valid in a table cell."""
    text = re.sub(r"\s+", " ", visible(str(value))).replace("|", "\\|")
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return Markdown(f"{ticks} {text} {ticks}" if len(ticks) > 1 else f"`{text}`")


def fence(value: object, language: str = "") -> Markdown:
    """Return `value` as a code block that its content cannot close."""
    text = visible(str(value)).strip("\n")
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return Markdown(f"{ticks}{language}\n{text}\n{ticks}")
