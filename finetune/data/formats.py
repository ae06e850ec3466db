"""From one raw row, as a file or the Hub holds it, to the messages or the text that we train on."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from finetune.data.records import ROLES, Example, Message
from finetune.utils.files import canonical_json

RawRow = Mapping[str, object]

# Canonical column names of each format, the required ones first; `None` ends the required ones.
REQUIRED: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "llama2_text": ("text",),
    "text": ("text",),
}
OPTIONAL: dict[str, tuple[str, ...]] = {
    "messages": ("system",),
    "sharegpt": ("system",),
    "alpaca": ("input", "system"),
    "prompt_completion": ("system",),
    "llama2_text": (),
    "text": (),
}
# What else the same column is called in the wild, tried where the canonical name is not there.
ALIASES: dict[str, dict[str, tuple[str, ...]]] = {
    "messages": {"messages": ("conversations", "conversation")},
    "sharegpt": {"conversations": ("conversation", "messages")},
    "alpaca": {"output": ("response",), "input": ("context",)},
    "prompt_completion": {"prompt": ("question", "query"), "completion": ("response", "answer")},
    "llama2_text": {},
    "text": {},
}
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
}
MOST_LISTED = 20  # column names in a message
ABSENT = object()  # in place of a value: this row has no such column
LLAMA2_START = re.compile(r"\s*(?:<s>\s*)?\[INST\]")
LLAMA2_TURN = re.compile(
    r"\s*(?:<s>\s*)?\[INST\](?P<user>.*?)\[/INST\](?P<answer>.*?)(?P<end></s>|(?=<s>|\[INST\])|\Z)", re.S
)
LLAMA2_SYSTEM = re.compile(r"\s*<<SYS>>(?P<system>.*?)<</SYS>>(?P<user>.*)", re.S)


class RowError(ValueError):
    """A row that does not fit its format: `reason` is a short name to count by, the text says it to a person."""

    def __init__(self, reason: str, where: str, found: str, allowed: str, near: str | None = None) -> None:
        hint = f"; did you mean {near!r}?" if near else ""
        super().__init__(f"{where}: found {found}, allowed is {allowed}{hint}")
        self.reason = reason


class FormatError(ValueError):
    """No format fits the columns, or `columns:` names what is not there; a person has to mend the recipe."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The format a source is read by: canonical column name -> the source's name, and a sentence of why."""

    format: str
    columns: Mapping[str, str]
    why: str
    unused: tuple[str, ...] = field(default=())


def decide(asked: str, columns: Mapping[str, str], sample: Sequence[RawRow]) -> Decision:
    """How to read rows like those of `sample` (the first ones of a source; at least one).

    `asked` is a format or "auto"; `columns` is the recipe's mapping, canonical name -> the source's column name.
    Raises FormatError with what was found and what is allowed.
    """
    present = list(dict.fromkeys(name for row in sample for name in row))
    _check_mapping(asked, columns, present)
    if asked != "auto":
        resolved = _resolve(asked, columns, present)
        missing = [name for name in REQUIRED[asked] if name not in resolved]
        if missing:
            raise FormatError(
                f"format {asked} needs the column {missing[0]!r}; the columns are {listed(present)}. "
                f"Say which it is: columns: {{{missing[0]}: NAME}}"
            )
        return _decision(asked, resolved, "the recipe says so", present)
    return _guess(columns, present, sample)


def _guess(columns: Mapping[str, str], present: Sequence[str], sample: Sequence[RawRow]) -> Decision:
    no_turns = ""
    for name in ("messages", "sharegpt", "alpaca", "prompt_completion"):
        resolved = _resolve(name, columns, present)
        if any(column not in resolved for column in REQUIRED[name]):
            continue
        named = " and ".join(repr(resolved[column]) for column in REQUIRED[name])
        if name in ("messages", "sharegpt"):
            column = resolved[REQUIRED[name][0]]
            keys = _turn_keys(sample, column)
            if keys is None:
                first = next((value for row in sample if (value := row.get(column)) is not None), None)
                no_turns = f" The column {column!r} holds no list of turns: its first value is {_kind(first)}."
                continue
            name = "sharegpt" if "from" in keys else "messages"
            resolved = {REQUIRED[name][0] if k in ("messages", "conversations") else k: v for k, v in resolved.items()}
            named = f"{named}, a list of turns with {' and '.join(repr(k) for k in keys)}"
        return _decision(name, resolved, f"there is {named}", present)
    resolved = _resolve("text", columns, present)
    if "text" in resolved:
        texts = [t for row in sample if isinstance(t := row.get(resolved["text"]), str)]
        share = sum(bool(LLAMA2_START.match(t)) for t in texts) / max(1, len(texts))
        if share > 0.5:
            return _decision("llama2_text", resolved, f"{resolved['text']!r} begins with [INST]", present)
        return _decision("text", resolved, f"there is only {resolved['text']!r}, and it is no chat", present)
    known = "; ".join(f"{name}: {' + '.join(needed)}" for name, needed in REQUIRED.items())
    raise FormatError(
        f"no format fits the columns {listed(present)}.{no_turns} Formats and their columns are {known}. "
        "Map yours, for example columns: {instruction: question, output: answer}"
    )


def _turn_keys(sample: Sequence[RawRow], column: str) -> tuple[str, str] | None:
    """The keys by which the turns name their role and content, from the first row that has a turn."""
    for row in sample:
        turns = row.get(column)
        if isinstance(turns, list) and turns and isinstance(turns[0], Mapping):
            return ("from", "value") if "from" in turns[0] else ("role", "content")
    return None


def _check_mapping(asked: str, columns: Mapping[str, str], present: Sequence[str]) -> None:
    formats = REQUIRED if asked == "auto" else {asked: REQUIRED[asked]}
    canonical = list(dict.fromkeys(n for name in formats for n in (*REQUIRED[name], *OPTIONAL[name])))
    for ours, theirs in columns.items():
        if ours not in canonical:
            close = _near(ours, canonical)
            raise FormatError(f"columns: {ours!r} is no name of ours{close}; there is {listed(canonical)}")
        if theirs not in present:
            close = _near(theirs, present)
            raise FormatError(f"columns.{ours}: there is no column {theirs!r}{close}; there is {listed(present)}")


def _resolve(name: str, columns: Mapping[str, str], present: Sequence[str]) -> dict[str, str]:
    """Canonical name -> the source's column, for those that are there: the recipe's mapping, the name, an alias."""
    resolved: dict[str, str] = {}
    for canonical in (*REQUIRED[name], *OPTIONAL[name]):
        taken = set(resolved.values()) | {v for k, v in columns.items() if k != canonical}
        options = (columns.get(canonical, canonical), *ALIASES[name].get(canonical, ()))
        found = next((o for o in options if o in present and o not in taken), None)
        if found is not None:
            resolved[canonical] = found
    return resolved


def _decision(name: str, columns: Mapping[str, str], why: str, present: Sequence[str]) -> Decision:
    return Decision(name, columns, why, tuple(c for c in present if c not in columns.values()))


def to_example(row: RawRow, decision: Decision, row_id: str, source: str) -> Example:
    """The row as an Example; columns that the format did not use and that hold one plain value go into `extra`.

    Raises RowError where the row does not fit.
    """
    get = {ours: (theirs, row.get(theirs, ABSENT)) for ours, theirs in decision.columns.items()}
    extra = canonical_json(scalars) if (scalars := _scalars(row, decision.columns.values())) else None
    if extra is not None:
        _encodes(extra, "a column beside the text")
    if decision.format == "text":
        return Example(row_id, source, text=_text(*get["text"]), extra=extra)
    if decision.format == "llama2_text":
        messages = parse_llama2(_text(*get["text"]), get["text"][0])
    elif decision.format in ("messages", "sharegpt"):
        messages = _turns(*get[REQUIRED[decision.format][0]], sharegpt=decision.format == "sharegpt")
    elif decision.format == "alpaca":
        question = _text(*get["instruction"])
        given = _optional_text(*get.get("input", ("input", None)))
        messages = (
            Message("user", f"{question}\n\n{given}" if given.strip() else question),
            Message("assistant", _text(*get["output"])),
        )
    else:
        messages = (*_side(*get["prompt"], role="user"), *_side(*get["completion"], role="assistant"))
    system = _optional_text(*get.get("system", ("system", None)))
    if system.strip() and messages[0].role != "system":
        messages = (Message("system", system), *messages)
    return Example(row_id, source, messages, extra=extra)


def parse_llama2(text: str, where: str = "text") -> tuple[Message, ...]:
    """The turns of `<s>[INST] <<SYS>>…<</SYS>> user [/INST] answer </s>…`, blanks around each turn taken off.

    A last user turn without an answer gives no assistant turn. Raises RowError at the first place that does not fit.
    """
    messages: list[Message] = []
    position, length = 0, len(text.rstrip())
    while position < length:
        turn = LLAMA2_TURN.match(text, position)
        if turn is None:
            raise RowError("llama2", where, repr(text[position : position + 40]), "<s>[INST] … [/INST] … </s>")
        user = turn["user"]
        system = LLAMA2_SYSTEM.fullmatch(user)
        if ("<<SYS>>" in user) != bool(system) or (system and messages):
            raise RowError("llama2", where, repr(user.strip()[:40]), "<<SYS>>…<</SYS>> at the start of the first turn")
        if system:
            if system["system"].strip():
                messages.append(Message("system", system["system"].strip()))
            user = system["user"]
        messages.append(Message("user", user.strip()))
        position = turn.end()
        if turn["answer"].strip() or turn["end"] or position < length:
            messages.append(Message("assistant", turn["answer"].strip()))
    if not messages:
        raise RowError("empty", where, "an empty text", "<s>[INST] … [/INST] … </s>")
    return tuple(messages)


def _turns(where: str, value: object, sharegpt: bool) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise RowError("type", where, _kind(value), "a list of turns")
    if not value:
        raise RowError("empty", where, "an empty list", "one turn or more")
    messages = [_turn(f"{where}[{i}]", turn, sharegpt) for i, turn in enumerate(value)]
    # An empty system turn says nothing, but some templates would render its brackets.
    kept = tuple(m for m in messages if m.role != "system" or m.content.strip())
    if not kept:
        raise RowError("empty", where, "only an empty system turn", "one turn or more")
    return kept


def _turn(where: str, turn: object, sharegpt: bool) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError("type", where, _kind(turn), "a mapping with a role and a content")
    role_key, content_key = ("from", "value") if sharegpt and "from" in turn else ("role", "content")
    for key in (role_key, content_key):
        if key not in turn and not (key == "content" and turn.get("tool_calls")):
            expected = ("from", "value") if sharegpt else ("role", "content")
            near = next(iter(difflib.get_close_matches(key, [str(k) for k in turn], 1)), None)
            raise RowError("missing", where, f"the keys {listed(turn)}", " and ".join(expected), near)
    role = _role(f"{where}.{role_key}", turn[role_key], sharegpt)
    rest = {k: v for k, v in turn.items() if k not in (role_key, content_key) and v is not None}
    content = turn.get(content_key)
    if content is None and role == "assistant" and rest.get("tool_calls"):
        content = ""  # a turn that only calls a tool says nothing beside
    extra = _plain_json(where, rest) if rest else None
    if extra is not None:
        _encodes(extra, where)
    return Message(role, _content(f"{where}.{content_key}", content), extra)


def _role(where: str, value: object, sharegpt: bool) -> str:
    known = SHAREGPT_ROLES if sharegpt else {**{r: r for r in ROLES}, "function": "tool"}
    if not isinstance(value, str):
        raise RowError("role", where, _kind(value), listed(known))
    role = known.get(value.strip().lower())
    if role is None:
        near = next(iter(difflib.get_close_matches(value.lower(), known, 1)), None)
        raise RowError("role", where, repr(value), listed(known), near)
    return role


def _content(where: str, value: object) -> str:
    """A text, or a list of text parts as chat interfaces write it."""
    if isinstance(value, list):
        texts = []
        for part in value:
            if not isinstance(part, Mapping) or part.get("type") != "text":
                kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
                raise RowError("content_part", where, f"a part of type {kind!r}", "parts of type 'text'")
            texts.append(_text(where, part.get("text")))
        return "\n".join(texts)
    return _text(where, value)


def _side(where: str, value: object, role: str) -> tuple[Message, ...]:
    """A prompt or a completion: a text, or a list of turns."""
    if isinstance(value, list):
        return _turns(where, value, sharegpt=False)
    return (Message(role, _text(where, value)),)


def _text(where: str, value: object) -> str:
    if not isinstance(value, str):
        raise RowError("null" if value is None or value is ABSENT else "type", where, _kind(value), "a text")
    _encodes(value, where)
    return value


def _optional_text(where: str, value: object) -> str:
    return "" if value is None or value is ABSENT else _text(where, value)


def _encodes(value: str, where: str) -> None:
    """Half of a surrogate pair is no character: no file and no tokenizer can hold it."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        found = f"the lone surrogate U+{ord(value[error.start]):04X} at character {error.start}"
        raise RowError("surrogate", where, found, "Unicode text") from None


def _scalars(row: RawRow, used: Iterable[str]) -> dict[str, object]:
    skip = set(used)
    kept: dict[str, object] = {}
    for name, value in row.items():
        if name in skip or value is None or (isinstance(value, float) and not math.isfinite(value)):
            continue
        if isinstance(value, (str, bool, int, float)):
            kept[name] = value
        elif not isinstance(value, (list, Mapping, bytes)):
            kept[name] = str(value)  # a date, a decimal
    return kept


def _plain_json(where: str, value: dict[str, object]) -> str:
    """The mapping as canonical JSON, proved to be JSON."""
    try:
        return canonical_json(json.loads(json.dumps(value, allow_nan=False)))
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError("type", where, str(error), "values that JSON can hold") from None


def unique_labels(labels: Iterable[str]) -> list[str]:
    """The labels with `#2`, `#3` … on those that were used before, so that no two sources share a row id."""
    out: list[str] = []
    for label in labels:
        number, name = 1, label
        while name in out:
            number += 1
            name = f"{label}#{number}"
        out.append(name)
    return out


def _near(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def listed(names: Iterable[object]) -> str:
    """The names, the first ones of very many; what no terminal and no file can hold shown as an escape."""
    shown = [name if (name := str(n)).isprintable() else ascii(name) for n in names]
    more = f", … ({len(shown)} in all)" if len(shown) > MOST_LISTED else ""
    return ", ".join(shown[:MOST_LISTED]) + more or "none"


def _kind(value: object) -> str:
    """What was found, as a person says it."""
    if value is None or value is ABSENT:
        return "null" if value is None else "no such column in this row"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    return "a list" if isinstance(value, list) else "a mapping" if isinstance(value, Mapping) else type(value).__name__
