"""From a list of turns, in any of the notations that data sets use, to messages."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from finetune.data.records import Message
from finetune.data.tool_calls import calls_of
from finetune.data.values import RowError, is_blank, kind, listed, loads, parsed, plain_json, require_unicode, text_of
from finetune.utils.format import nearest

ROLE_KEYS = ("role", "from", "speaker")
CONTENT_KEYS = ("content", "value", "text", "message")
PAIR_KEYS = (  # a question and its answer as one element of the list
    ("human", "assistant"),
    ("user", "assistant"),
    ("human", "gpt"),
    ("human", "bot"),
    ("user", "bot"),
    ("input", "output"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("query", "response"),
    ("instruction", "output"),
)
CALLS = "calls"  # a turn whose whole content is a tool call
READ_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bing", "bard", "bot", "chatbot", "ai"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), CALLS),
}
ROLE_NAMES = "system, user, assistant, tool or another name of these (human, gpt, function_call, …)"
LEARN_KEYS = ("weight", "train", "training", "trainable", "loss_mask", "learn")  # 0 or false: no label
MASK_KEYS = ("mask", "masked")  # 1 or true: no label
WRITTEN = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": False, "true": True}
TEXT_PARTS = ("text", "input_text", "output_text")
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
KEPT_KEYS = ("name", "tool_call_id", "id")  # of a turn, beside the above: known to chat templates


def turn_notation(value: object) -> tuple[str, str] | None:
    """The keys by which the elements of a list of turns name role and content (or question and answer).

    ("", "") for a list of texts, None if it is not a list of turns.
    """
    written = isinstance(value, str)
    if isinstance(value, str):
        if not value.lstrip().startswith("["):
            return None
        try:
            value = loads(value)
        except (ValueError, RecursionError):
            return None
    value = _transposed(value)
    if not isinstance(value, list) or not value:
        return None
    first = value[0]
    if isinstance(first, str):
        return ("", "") if all(isinstance(text, str) for text in value) else None
    if not isinstance(first, Mapping):
        return None
    there = {k for k, v in first.items() if v is not None}
    return _role_and_content(there) or _pair(there) or (None if written else ("role", "content"))


def turns_of(where: str, value: object, notes: Counter[str]) -> tuple[Message, ...]:
    """The messages of a list of turns; a list of texts is by turns the user's and the assistant's.

    Raises RowError at the first place that does not fit.
    """
    value = _transposed(parsed(where, value, "a list of turns"))
    if not isinstance(value, list):
        raise RowError("type", where, kind(value), "a list of turns")
    if not value:
        raise RowError("empty", where, "an empty list", "one turn or more")
    messages: list[Message] = []
    if all(isinstance(turn, str) for turn in value):
        messages = [
            Message(("user", "assistant")[i % 2], text_of(f"{where}[{i}]", turn)) for i, turn in enumerate(value)
        ]
    else:
        for i, turn in enumerate(value):
            _add_turn(f"{where}[{i}]", turn, messages, notes)
    # An empty system turn has no effect, but some templates would render its brackets.
    kept = tuple(m for m in messages if m.role != "system" or m.content.strip())
    if not kept:
        raise RowError("empty", where, "only an empty system turn", "one turn or more")
    return kept


def _transposed(value: object) -> object:
    """A mapping of lists of one length, as `datasets` keeps a sequence of mappings, as the list of mappings."""
    if not isinstance(value, Mapping) or not all(isinstance(column, list) for column in value.values()):
        return value
    if not any(key in value for key in ROLE_KEYS) or len({len(column) for column in value.values()}) != 1:
        return value
    return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]


def _add_turn(where: str, turn: object, messages: list[Message], notes: Counter[str]) -> None:
    if not isinstance(turn, Mapping):
        raise RowError("type", where, kind(turn), "a mapping with a role and a content")
    fields = {k: v for k, v in turn.items() if v is not None}
    if not any(key in turn for key in ROLE_KEYS) and (pair := _pair(fields)) is not None:
        _add_pair(where, fields, pair, messages, notes)
        return
    role_key = next((k for k in ROLE_KEYS if k in fields), None) or next((k for k in ROLE_KEYS if k in turn), None)
    content_key = _content_key(fields) or _content_key(turn)
    speechless = any(not is_blank(fields.get(key)) for key in ("tool_calls", "function_call"))
    if role_key is None or (content_key is None and not speechless):
        wanted = "from" if role_key == "from" or "value" in turn else "role"
        expected = ("from", "value") if wanted == "from" else ("role", "content")
        lacking = expected[0] if role_key is None else expected[1]
        raise RowError("missing", where, f"the keys {listed(turn)}", " and ".join(expected), nearest(lacking, turn))
    role = _role(f"{where}.{role_key}", turn[role_key])
    content = turn.get(content_key) if content_key else None
    rest = {k: v for k, v in fields.items() if k not in (role_key, content_key)}
    if not rest and role != CALLS:
        messages.append(Message(role, _content(f"{where}.{content_key}", content, role)))
        return
    learn = _learn(where, rest)
    if role == CALLS:
        calls = calls_of(f"{where}.{content_key}", content, notes)
        _add_calls(messages, calls, _extra(where, rest, notes), learn)
        return
    if is_blank(content) and role == "assistant" and speechless:
        content = content or ""  # a turn that only calls a tool has no text
    extra = _extra(where, rest, notes)
    messages.append(Message(role, _content(f"{where}.{content_key}", content, role), _json(where, extra), learn))


def _add_pair(
    where: str, fields: Mapping[str, Any], pair: tuple[str, str], messages: list[Message], notes: Counter[str]
) -> None:
    """A question and its answer in one element; `system` beside them begins a conversation; no answer may come last."""
    asked, answered = pair
    rest = {k: v for k, v in fields.items() if k not in (asked, answered, "system")}
    learn = _learn(where, rest)
    extra = _json(where, _extra(where, rest, notes))
    if not is_blank(system := fields.get("system")):
        text = text_of(f"{where}.system", system)
        earlier = next((m.content for m in messages if m.role == "system"), None)
        if messages and earlier != text:
            raise RowError("role", f"{where}.system", kind(system), "a system text in the first element only")
        messages[:0] = [] if messages else [Message("system", text)]
    messages.append(Message("user", text_of(f"{where}.{asked}", fields.get(asked))))
    if answered in fields:
        messages.append(Message("assistant", text_of(f"{where}.{answered}", fields[answered]), extra, learn))


def _add_calls(messages: list[Message], calls: list[dict[str, Any]], extra: dict[str, Any], learn: bool) -> None:
    """A turn of calls alone; one that follows the assistant's own words, or other calls, belongs to that turn."""
    last = messages[-1] if messages else None
    before = json.loads(last.extra) if last is not None and last.extra else {}
    if last is None or last.role != "assistant" or last.learn != learn or set(before) & set(extra):
        messages.append(Message("assistant", "", _json("tool_calls", {**extra, "tool_calls": calls}), learn))
        return
    joined = {**before, **extra, "tool_calls": [*before.get("tool_calls", []), *calls]}
    messages[-1] = replace(last, extra=_json("tool_calls", joined))


def _role(where: str, value: object) -> str:
    if not isinstance(value, str):
        raise RowError("role", where, kind(value), ROLE_NAMES)
    role = READ_ROLES.get(value.strip().lower().replace("-", "_").replace(" ", "_"))
    if role is None:
        raise RowError("role", where, repr(value), ROLE_NAMES, nearest(value, READ_ROLES))
    return role


def _learn(where: str, rest: dict[str, Any]) -> bool:
    """Whether the turn is learned; removes the fields that decide it from `rest`."""
    learn = True
    for key in (*LEARN_KEYS, *MASK_KEYS):
        if key not in rest:
            continue
        value = rest.pop(key)
        if isinstance(value, str):  # of a CSV file, say
            value = WRITTEN.get(value.strip().lower(), value)
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise RowError("weight", f"{where}.{key}", kind(value), "0 or 1 (false or true): a turn is learned or not")
        learn = learn and bool(value) != (key in MASK_KEYS)
    return learn


def _extra(where: str, rest: dict[str, Any], notes: Counter[str]) -> dict[str, Any]:
    """Return a turn's other fields, under the names that chat templates read."""
    extra = {k: v for k, v in rest.items() if k not in ("tool_calls", "function_call", *REASONING_KEYS)}
    calls = [rest[key] for key in ("tool_calls", "function_call") if not is_blank(rest.get(key))]
    if calls:
        extra["tool_calls"] = [call for written in calls for call in calls_of(f"{where}.tool_calls", written, notes)]
    thoughts = {key: text_of(f"{where}.{key}", rest[key]) for key in REASONING_KEYS if not is_blank(rest.get(key))}
    if len(set(thoughts.values())) > 1:
        raise RowError("reasoning", where, f"different texts in {listed(thoughts)}", "one of them")
    if thoughts:
        extra["reasoning_content"] = next(iter(thoughts.values()))
    for key in extra:
        if key not in (*KEPT_KEYS, "tool_calls", "reasoning_content"):
            notes[f"turns have a field {str(key)[:40]!r}, which only a chat template that reads it can use"] += 1
    return extra


def _json(where: str, extra: dict[str, Any]) -> str | None:
    return plain_json(where, extra) if extra else None


def _content(where: str, value: object, role: str) -> str:
    """A text, or a list of text parts as chat interfaces write it; a tool may also return an object."""
    if role == "tool" and (isinstance(value, Mapping) or (isinstance(value, list) and not _has_parts(value))):
        text = json.dumps(value, ensure_ascii=False)
        require_unicode(text, where)
        return text
    if isinstance(value, list):
        texts = []
        for part in value:
            if not isinstance(part, Mapping) or (part.get("type") or "text") not in TEXT_PARTS:
                what = part.get("type") if isinstance(part, Mapping) else kind(part)
                raise RowError("content_part", where, f"a part of type {what!r}", "parts of type 'text'")
            texts.append(text_of(where, part.get("text")))
        return "\n".join(texts)
    return text_of(where, value)


def _has_parts(value: list[object]) -> bool:
    return bool(value) and all(isinstance(part, Mapping) and "type" in part for part in value)


def _role_and_content(keys: set[str]) -> tuple[str, str] | None:
    role = next((k for k in ROLE_KEYS if k in keys), None)
    return (role, _content_key(keys) or ("value" if role == "from" else "content")) if role else None


def _content_key(keys: Mapping[str, object] | set[str]) -> str | None:
    return next((k for k in CONTENT_KEYS if k in keys), None)


def _pair(keys: Mapping[str, object] | set[str]) -> tuple[str, str] | None:
    """The names of a question and its answer; the answer may be missing (null) in a last element."""
    pair_keys = next((pair for pair in PAIR_KEYS if pair[0] in keys and pair[1] in keys), None)
    return pair_keys or next((pair for pair in PAIR_KEYS if pair[0] in keys), None)
