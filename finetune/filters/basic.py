"""Basic filter rules. Each returns None to keep a row, or a Drop with reason and detail."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from finetune.data.records import Example, Message


@dataclass(frozen=True, slots=True)
class Drop:
    """Reason for dropping a row: a short name to count by, a sentence, and value and limit if there are any."""

    reason: str
    detail: str
    value: float | None = None
    limit: float | None = None


Verdict = Drop | None
"""None keeps the row."""


def empty_turn(row: Example) -> Verdict:
    """Drop a row with a blank turn or without turns. A turn that calls a tool, or a tool's result, may be blank."""
    if row.text is not None:
        return None if row.text.strip() else Drop("empty", "the text is blank")
    if not row.messages:
        return Drop("empty", "there is no turn")
    for number, message in enumerate(row.messages, start=1):
        if not message.content.strip() and message.role != "tool" and not _calls(message):
            return Drop("empty", f"turn {number} ({message.role}) is blank")
    return None


def no_assistant(row: Example) -> Verdict:
    """Drop a conversation without an assistant turn to train on."""
    if row.text is not None or any(m.role == "assistant" and m.learn for m in row.messages):
        return None
    if any(m.role == "assistant" for m in row.messages):
        return Drop("no_assistant", "every turn of the assistant is marked as not to be learned (weight, train, mask)")
    return Drop("no_assistant", f"the roles are {_roles(row.messages)}")


def not_alternating(row: Example) -> Verdict:
    """Drop a conversation that is not: an optional system turn, user and assistant alternating, the assistant last.

    Tool turns may follow an assistant turn, then the assistant again.
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
    """Drop a row whose turns of `role` have fewer than `least` or more than `most` characters in total.

    A raw text is learned as a whole, so it counts as the assistant's, never as the user's. The JSON of tool calls
    counts too.
    """
    if row.text is not None and role != "assistant":
        return None
    length = len(row.joined(role)) + sum(len(m.extra or "") for m in row.messages if m.role == role and _calls(m))
    if length < least:
        return Drop(f"{role}_short", f"{length} characters, at least {least}", length, least)
    if most is not None and length > most:
        return Drop(f"{role}_long", f"{length} characters, at most {most}", length, most)
    return None


def matching(row: Example, drop: Sequence[re.Pattern[str]], keep: Sequence[re.Pattern[str]]) -> Verdict:
    """Drop a row if a turn matches a pattern of `drop`, or if `keep` is not empty and no turn matches any of it."""
    texts = list(contents(row))
    for pattern in drop:
        for text in texts:
            if match := pattern.search(text):
                return Drop("drop_matching", f"{pattern.pattern!r} matches {match[0][:60]!r}")
    if keep and not any(pattern.search(text) for pattern in keep for text in texts):
        return Drop("keep_matching", f"matches none of {', '.join(repr(p.pattern) for p in keep)}")
    return None


def tokens_outside(tokens: int, least: int | None, most: int | None) -> Verdict:
    """Drop a row with fewer or more tokens than allowed."""
    if most is not None and tokens > most:
        return Drop("tokens", f"{tokens} tokens, at most {most}", tokens, most)
    if least is not None and tokens < least:
        return Drop("tokens", f"{tokens} tokens, at least {least}", tokens, least)
    return None


def _calls(message: Message) -> bool:
    return message.role == "assistant" and message.extra is not None and '"tool_calls":' in message.extra


def contents(row: Example) -> Iterator[str]:
    """Yield the text of every turn, or the raw text."""
    if row.text is not None:
        yield row.text
    yield from (m.content for m in row.messages)


def _roles(messages: Sequence[Message]) -> str:
    roles = ", ".join(m.role for m in messages[:8])
    return f"{roles}, … ({len(messages)} turns)" if len(messages) > 8 else roles
