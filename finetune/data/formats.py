"""From one raw row, as a file or the Hub holds it, to the messages or the text that we train on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from finetune.data.chat_text import LLAMA2_START, parse_chat_text, parse_llama2
from finetune.data.records import Example, Message
from finetune.data.single_turn import optional_text, question_and_answer
from finetune.data.tool_calls import CALLS_AS_TEXT, tools_of, writes_call
from finetune.data.turns import READ_ROLES, turn_notation, turns_of
from finetune.data.values import ABSENT, RowError, is_blank, kind, leaves, listed, require_unicode, text_of
from finetune.utils.files import canonical_json
from finetune.utils.format import did_you_mean

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
BESIDE = ("system", "history", "reasoning_content", "tools")  # of formats with one question and one answer
OPTIONAL: dict[str, tuple[str, ...]] = {
    "messages": ("system", "tools"),
    "sharegpt": ("system", "tools"),
    "alpaca": ("input", *BESIDE),
    "prompt_completion": ("context", *BESIDE),
    "llama2_text": (),
    "text": (),
}
# What else the same column is called in the wild, tried where the canonical name is not there.
TURN_COLUMNS = ("messages", "conversations", "conversation", "dialog", "dialogue", "dialogs", "chat", "turns")
COMMON_ALIASES: dict[str, tuple[str, ...]] = {
    "system": ("system_prompt", "system_message"),
    "tools": ("functions",),
    "reasoning_content": ("thinking", "reasoning"),
}
ALIASES: dict[str, dict[str, tuple[str, ...]]] = {
    "messages": {"messages": TURN_COLUMNS[1:]},
    "sharegpt": {"conversations": ("conversation", "messages", *TURN_COLUMNS[3:])},
    "alpaca": {"output": ("response",), "input": ("context",)},
    "prompt_completion": {
        "prompt": ("question", "query"),
        "completion": ("response", "answer", "answers"),
        "context": ("input", "passage"),
    },
    "llama2_text": {},
    "text": {},
}
# Columns that mean something to a model in one of the known forms: left over, they are never left out silently.
MEANINGFUL = frozenset(
    {name for names in (*REQUIRED.values(), *OPTIONAL.values()) for name in names}
    | {n for aliases in (*ALIASES.values(), COMMON_ALIASES) for also in aliases.values() for n in also}
    | {"choices", "options", "document", "documents", "function_call", "tool_calls"}
    | {"image", "images", "audio", "audios", "video", "videos"}
)
SAME = (  # names of one thing: a recipe that maps one of them has chosen among them
    {"instruction", "prompt", "question", "query"},
    {"output", "completion", "response", "answer", "answers"},
    {"input", "context", "passage"},
    {"messages", "conversations", *TURN_COLUMNS},
    *({ours, *theirs} for ours, theirs in COMMON_ALIASES.items()),
)
BESIDE_TEXT = frozenset({"label", "labels", "label_text", "target", "summary"})  # an answer, if `text` is a question
NUMBERED = frozenset({"answer_start"})  # places in a text, not text
STRUCTURE = frozenset({*READ_ROLES, "text", "function"})  # words of a notation, not of a conversation


class FormatError(ValueError):
    """No format fits the columns, or `columns:` names what is not there; the recipe must be fixed.

    `column` is the column that means something and that the format does not read, if that is the reason.
    """

    def __init__(self, message: str, column: str | None = None) -> None:
        super().__init__(message)
        self.column = column


@dataclass(frozen=True, slots=True)
class Decision:
    """The format a source is read by: canonical column name -> the source's name, and a sentence of why.

    `known` are all columns of the first rows, `unused` those that the format does not read, and `watched` those of them
    that mean something: a row in which one holds what the messages do not is refused. `notes` counts what a person
    should know of the rows that were read.
    """

    format: str
    columns: Mapping[str, str]
    why: str
    unused: tuple[str, ...] = field(default=())
    raw: bool = False
    watched: tuple[str, ...] = ()
    known: frozenset[str] | None = None  # None: the rows are taken to have these columns
    required: frozenset[str] = frozenset()  # of the source's columns
    meaningful: bool = True  # False: no column is watched
    mapping: Mapping[str, str] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    notes: Counter[str] = field(default_factory=Counter, compare=False)
    later: dict[frozenset[str], Decision] = field(default_factory=dict, compare=False)
    auto: bool = False  # the format was found by the columns, so that of rows with other columns is found as well

    def for_row(self, row: RawRow) -> Decision:
        """This decision, or one for a row whose columns are not those of the first rows (another shard, say)."""
        keys = row.keys()
        if self.known is None or (keys <= self.known and self.required <= keys):
            return self
        present = frozenset(keys)
        if present not in self.later:
            self.later[present] = self._for_columns(present, row)
        if new := sorted(present - self.known):
            self.notes[f"the column {listed(new)} is not in the first rows"] += 1
        return self.later[present]

    def _for_columns(self, present: frozenset[str], row: RawRow) -> Decision:
        names = sorted(present - self.ignored)
        resolved = _resolve(self.format, self.mapping, names)
        if self.auto and any(needed not in resolved for needed in REQUIRED[self.format]):
            with suppress(FormatError):
                name, resolved, why = _guess(self.mapping, names, [row])
                self.notes[f"rows with the columns {listed(names)} were read as {name}, since {why}"] += 1
                other = _decision(name, resolved, why, names, self.mapping, self.ignored, self.raw)
                return replace(other, notes=self.notes, watched=other.watched if self.meaningful else ())
        columns = {**resolved, **{k: v for k, v in self.columns.items() if v in present or k not in resolved}}
        known = [*(self.known or ()), *sorted(present)]
        wider = _decision(self.format, columns, self.why, known, self.mapping, self.ignored, self.raw)
        return replace(wider, notes=self.notes, watched=wider.watched if self.meaningful else ())


def decide(
    asked: str,
    columns: Mapping[str, str],
    sample: Sequence[RawRow],
    ignored: Collection[str] = (),
    raw: bool = False,
) -> Decision:
    """How to read rows like those of `sample` (the first ones of a source; at least one).

    `asked` is a format or "auto"; `columns` is the recipe's mapping, canonical name -> the source's column name;
    `ignored` columns are not read, whatever they are called; `raw` takes texts as they are.
    Raises FormatError with what was found and what is allowed.
    """
    everything = list(dict.fromkeys(name for row in sample for name in row))
    present = [name for name in everything if name not in ignored]
    formats = REQUIRED if asked == "auto" else (asked,)
    check_mapping(columns, [n for name in formats for n in (*REQUIRED[name], *OPTIONAL[name])], present)
    if asked == "auto":
        name, resolved, why = _guess(columns, present, sample)
    else:
        name, why = asked, "the recipe sets it"
        resolved = _resolve(asked, columns, present, sample)
        missing = [needed for needed in REQUIRED[asked] if needed not in resolved]
        if missing:
            raise FormatError(
                f"format {asked} needs the column {missing[0]!r}; the columns are {listed(present)}. "
                f"Say which it is: columns: {{{missing[0]}: NAME}}"
            )
    decision = _decision(name, resolved, why, everything, columns, frozenset(ignored), raw)
    like = {column for row in sample if decision.required <= row.keys() for column in row}
    unused = tuple(c for c in decision.unused if not like or c in like)  # not those of rows in another format
    return replace(decision, unused=unused, auto=asked == "auto")


def _guess(
    columns: Mapping[str, str], present: Sequence[str], sample: Sequence[RawRow]
) -> tuple[str, dict[str, str], str]:
    no_turns = ""
    for name in ("messages", "alpaca", "prompt_completion"):
        resolved = _resolve(name, columns, present, sample)
        if any(column not in resolved for column in REQUIRED[name]):
            continue
        named = " and ".join(repr(resolved[column]) for column in REQUIRED[name])
        if name == "messages":
            column = resolved["messages"]
            keys = next((keys for row in sample if (keys := turn_notation(row.get(column))) is not None), None)
            if keys is None:
                first = next((value for row in sample if (value := row.get(column)) is not None), None)
                no_turns = f" The column {column!r} holds no list of turns: its first value is {kind(first)}."
                continue
            by = f"turns with {' and '.join(repr(k) for k in keys)}" if keys[0] else "texts, by turns the user's"
            why = f"there is {named}, a list of {by}"
            if keys[0] != "from":
                return name, resolved, why
            return "sharegpt", {"conversations" if k == "messages" else k: v for k, v in resolved.items()}, why
        return name, resolved, f"there is {named}"
    resolved = _resolve("text", columns, present)
    if "text" in resolved:
        texts = [t for row in sample if isinstance(t := row.get(resolved["text"]), str)]
        share = sum(bool(LLAMA2_START.match(t)) for t in texts) / max(1, len(texts))
        if share > 0.5:
            return "llama2_text", resolved, f"{resolved['text']!r} begins with [INST]"
        return "text", resolved, f"there is only {resolved['text']!r}"
    known = "; ".join(f"{name}: {' + '.join(needed)}" for name, needed in REQUIRED.items())
    raise FormatError(
        f"no format fits the columns {listed(present)}.{no_turns} Formats and their columns are {known}. "
        "Map yours, for example columns: {instruction: question, output: answer}"
    )


def check_mapping(columns: Mapping[str, str], canonical: Iterable[str], present: Sequence[str]) -> None:
    """Raise FormatError unless the recipe's `columns` map names of `canonical` to columns of `present`."""
    known = list(dict.fromkeys(canonical))
    for ours, theirs in columns.items():
        if ours not in known:
            raise FormatError(f"columns: unknown key {ours!r}; allowed: {listed(known)}{did_you_mean(ours, known)}")
        if theirs not in present:
            there = f"there is {listed(present)}{did_you_mean(theirs, present)}"
            raise FormatError(f"columns.{ours}: there is no column {theirs!r}; {there}")


def _resolve(
    name: str, columns: Mapping[str, str], present: Sequence[str], sample: Sequence[RawRow] = ()
) -> dict[str, str]:
    aliases = {**COMMON_ALIASES, **ALIASES[name]}
    return resolve((*REQUIRED[name], *OPTIONAL[name]), aliases, columns, present, sample)


def resolve(
    wanted: Iterable[str],
    aliases: Mapping[str, tuple[str, ...]],
    columns: Mapping[str, str],
    present: Sequence[str],
    sample: Sequence[RawRow] = (),
) -> dict[str, str]:
    """Canonical name -> the source's column, for those that are there: the recipe's mapping, the name, an alias.

    Of several columns that could hold the turns, the first is taken that holds some in `sample`.
    """
    resolved: dict[str, str] = {}
    folded = {name.strip().lower(): name for name in reversed(present)}  # `Question`, ` Answer` of a spreadsheet
    for canonical in wanted:
        taken = set(resolved.values()) | {v for k, v in columns.items() if k != canonical}
        names = (columns.get(canonical, canonical), *aliases.get(canonical, ()))
        there = [name if name in present else folded.get(name) for name in names]
        options = [name for name in there if name is not None and name not in taken]
        if canonical in ("messages", "conversations") and len(options) > 1:
            options.sort(key=lambda o: not any(turn_notation(row.get(o)) for row in sample))
        if options:
            resolved[canonical] = options[0]
    return resolved


def _decision(
    name: str,
    columns: Mapping[str, str],
    why: str,
    present: Sequence[str],
    mapping: Mapping[str, str],
    ignored: frozenset[str],
    raw: bool,
) -> Decision:
    unused = tuple(c for c in present if c not in columns.values())
    meaningful = MEANINGFUL | BESIDE_TEXT if name in ("text", "llama2_text") else MEANINGFUL
    replaced = {n for ours in mapping for same in SAME if ours in same for n in same}  # by the recipe, knowingly
    watched = tuple(c for c in unused if c.strip().lower() in meaningful and c not in ignored and c not in replaced)
    required = frozenset(columns[ours] for ours in REQUIRED[name] if ours in columns)
    return Decision(name, columns, why, unused, raw, watched, frozenset(present), required, True, mapping, ignored)


def to_example(row: RawRow, decision: Decision, row_id: str, source: str) -> Example:
    """The row as an Example; columns that the format did not use and that hold one plain value go into `extra`.

    Raises RowError if the row does not fit.
    """
    decision = decision.for_row(row)
    get = {ours: (theirs, row.get(theirs, ABSENT)) for ours, theirs in decision.columns.items()}
    extra = canonical_json(scalars) if (scalars := scalar_columns(row, decision.columns.values())) else None
    if extra is not None:
        require_unicode(extra, "a column beside the text")
    text = None
    messages: tuple[Message, ...] = ()
    if decision.format == "text":
        text = text_of(*get["text"])
        if not decision.raw and (chat := parse_chat_text(text, get["text"][0])) is not None:
            decision.notes[f"texts in {chat[0]} notation were read back as turns"] += 1
            text, messages = None, chat[1]
    elif decision.format == "llama2_text":
        messages = parse_llama2(text_of(*get["text"]), get["text"][0])
    elif decision.format in ("messages", "sharegpt"):
        messages = turns_of(*get[REQUIRED[decision.format][0]], decision.notes)
    else:
        messages = question_and_answer(get, decision.format, decision.notes)
    messages = with_system(messages, get, decision.notes)
    tools = tools_of(*get["tools"], decision.notes) if "tools" in get else None
    if tools is not None and decision.format in ("alpaca", "prompt_completion") and writes_call(messages[-1].content):
        decision.notes[CALLS_AS_TEXT] += 1
    if decision.watched:
        free = [n for n in (*REQUIRED[decision.format], *OPTIONAL[decision.format]) if n not in decision.columns]
        parts = [text] if text is not None else [part for m in messages for part in (m.content, m.extra or "")]
        for name in decision.watched:
            refuse_lost(name, row.get(name), parts, decision.format, free, is_text=text is not None)
    return Example(row_id, source, messages, text, extra, tools)


def with_system(
    messages: tuple[Message, ...], get: Mapping[str, tuple[str, object]], notes: Counter[str]
) -> tuple[Message, ...]:
    """Put the column `system` in front of messages without a system turn."""
    system = optional_text(*get["system"]) if "system" in get else ""
    if not system.strip():
        return messages
    if messages and messages[0].role == "system":
        if messages[0].content.strip() != system.strip():
            notes[f"the column {get['system'][0]!r} is not used where a row has a system turn of its own"] += 1
        return messages
    return (Message("system", system), *messages)


def refuse_lost(
    name: str, value: object, parts: Sequence[str], format_: str, free: Sequence[str], *, is_text: bool = False
) -> None:
    """Raise RowError if a column that the format does not read holds what no text of `parts` does.

    `free` are the canonical names without a column; `is_text`: the row is a text, and the column may be its answer.
    """
    if is_blank(value):
        return
    joined = "\n".join(parts)
    if isinstance(value, str):
        if all(part.strip() in value for part in parts if part and not part.startswith("{")):
            return  # the whole conversation once more, as a template writes it
        lost = value.strip() not in joined
    else:
        held = value if not isinstance(value, Mapping) else {k: v for k, v in value.items() if k not in NUMBERED}
        lost = any(leaf not in joined and leaf.lower() not in STRUCTURE for leaf in leaves(held))
    if lost:
        use = f"use it (columns: {{{free[0]}: {name}}}, or another of {listed(free)}), or " if free else ""
        if is_text:
            use = f"use it (format: prompt_completion, columns: {{prompt: text, completion: {name}}}), or "
        raise RowError(
            "unused_column",
            name,
            kind(value),
            f"nothing there, since format {format_} does not read this column; {use}leave it out with "
            f"ingest.ignore: [{name}]",
        )


def scalar_columns(row: RawRow, used: Iterable[str]) -> dict[str, object]:
    """The plain values of the columns that are not `used`: text, numbers, dates as text."""
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
