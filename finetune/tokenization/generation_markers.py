"""The `{% generation %}` markers of a chat template, which say what text is the assistant's."""

from __future__ import annotations

import re

MARKER = re.compile(r"(\s*\{%-|(?:^[ \t]+|(?<=\n)[ \t]+)?\{%)\s*(?:end)?generation\s*(-%\}\s*|%\}\n?)")


def has_markers(template: str) -> bool:
    """Whether the template has generation markers."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def strip_markers(template: str) -> str:
    """The template without generation markers, for software that knows only plain Jinja."""
    return MARKER.sub("", template) if "generation" in template else template
