"""The rules by which a row is left out. Each returns None to keep it, or why not: (reason, detail)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from finetune.data.records import Example, Message


@dataclass(frozen=True, slots=True)
class Drop:
    """Why a row is left out: a short name to count by, a sentence, and the figure and its limit where there are."""

    reason: str
    detail: str
    value: float | None = None
    limit: float | None = None


Verdict = Drop | None
"""None keeps the row."""


def empty_turn(row: Example) -> Verdict:
    """A turn without text, or no turn at all. A turn that calls a tool may say nothing, and a tool return nothing."""
    if row.text is not None:
        return None if row.text.strip() else Drop("empty", "the text is blank")
    if not row.messages:
        return Drop("empty", "there is no turn")
    for number, message in enumerate(row.messages, start=1):
        if not message.content.strip() and message.role != "tool" and not _calls(message):
            return Drop("empty", f"turn {number} ({message.role}) is blank")
    return None


def no_assistant(row: Example) -> Verdict:
    """A conversation in which there is nothing to learn from."""
    if row.text is not None or any(m.role == "assistant" and m.learn for m in row.messages):
        return None
    if any(m.role == "assistant" for m in row.messages):
        return Drop("no_assistant", "every turn of the assistant is marked as not to be learned (weight, train, mask)")
    return Drop("no_assistant", f"the roles are {_roles(row.messages)}")


def not_alternating(row: Example) -> Verdict:
    """A conversation other than: an optional system turn, user and assistant by turns, the assistant last.

    After an assistant turn there may be tool turns, and then the assistant again.
    """
    if row.text is not None:
        return None
    roles = [m.role for m in row.messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    allowed = {"": ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("tool", "assistant")}
    before = ""
    for number, role in enumerate(turns, start=1 + len(roles) - len(turns)):
        if role not in allowed[before]:
            expected = " or ".join(allowed[before])
            return Drop("alternate", f"turn {number} is {role}, expected is {expected}: {_roles(row.messages)}")
        before = role
    if before == "assistant":
        return None
    return Drop("alternate", f"the last turn is not the assistant's: {_roles(row.messages)}")


def length_outside(row: Example, role: str, least: int, most: int | None) -> Verdict:
    """All turns of `role` together have fewer than `least` or more than `most` characters.

    A raw text is all of it learned, so it counts as the assistant's, and never as the user's. The JSON of tool calls
    counts, too.
    """
    if row.text is not None and role != "assistant":
        return None
    found = len(row.joined(role)) + sum(len(m.extra or "") for m in row.messages if m.role == role and _calls(m))
    if found < least:
        return Drop(f"{role}_short", f"{found} characters, at least {least}", found, least)
    if most is not None and found > most:
        return Drop(f"{role}_long", f"{found} characters, at most {most}", found, most)
    return None


def matching(row: Example, drop: Sequence[re.Pattern[str]], keep: Sequence[re.Pattern[str]]) -> Verdict:
    """Any turn matches a pattern of `drop`; or there are patterns in `keep` and no turn matches any of them."""
    texts = list(contents(row))
    for pattern in drop:
        for text in texts:
            if found := pattern.search(text):
                return Drop("drop_matching", f"{pattern.pattern!r} matches {found[0][:60]!r}")
    if keep and not any(pattern.search(text) for pattern in keep for text in texts):
        return Drop("keep_matching", f"matches none of {', '.join(repr(p.pattern) for p in keep)}")
    return None


def tokens_outside(tokens: int, least: int | None, most: int | None) -> Verdict:
    """Fewer or more tokens than allowed."""
    if most is not None and tokens > most:
        return Drop("tokens", f"{tokens} tokens, at most {most}", tokens, most)
    if least is not None and tokens < least:
        return Drop("tokens", f"{tokens} tokens, at least {least}", tokens, least)
    return None


def _calls(message: Message) -> bool:
    return message.role == "assistant" and message.extra is not None and '"tool_calls":' in message.extra


def contents(row: Example) -> Iterator[str]:
    """The text of every turn, or the raw text."""
    if row.text is not None:
        yield row.text
    yield from (m.content for m in row.messages)


def _roles(messages: Sequence[Message]) -> str:
    shown = ", ".join(m.role for m in messages[:8])
    return f"{shown}, … ({len(messages)} turns)" if len(messages) > 8 else shown
