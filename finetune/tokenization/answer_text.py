"""Positions and white space in rendered answers: helpers of answers.py."""

from __future__ import annotations

from finetune.tokenization.chat import (
    text_of,
    without_reasoning,
)


def with_core(turn: dict[str, object], core: str, name: str) -> dict[str, object]:
    """Return the turn with `name` in place of its words `core`."""
    content = turn["content"]
    if isinstance(content, list):
        return {**turn, "content": [{**part, "text": part["text"].replace(core, name)} for part in content]}
    before, _, after = str(content).rpartition(core)
    return {**turn, "content": before + name + after}


def padding_of(turn: dict[str, object]) -> tuple[str, str]:
    """The white space at both edges of an answer's words."""
    text = without_reasoning(turn)["content"]
    shown = text_of(text)
    return shown[: len(shown) - len(shown.lstrip())], shown[len(shown.rstrip()) :]


def same_form(content: object, word: str) -> object:
    """Return `word` as a content of the same form, a string or a list of parts."""
    return [{"type": "text", "text": word}] if isinstance(content, list) else word


def shared_start(one: str, other: str) -> int:
    """Characters that both texts begin with."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def before_tag(text: str, at: int) -> int:
    """`at`, or the place of a `<` before it whose tag or token it is inside of."""
    opened = text.rfind("<", 0, at)
    return opened if opened >= 0 and ">" not in text[opened:at] else at


def skip_space(text: str, at: int) -> int:
    """Return the place of the first character at or after `at` that is no white space."""
    while at < len(text) and text[at].isspace():
        at += 1
    return at
