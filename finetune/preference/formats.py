"""From one raw row of preference data to a Pair: which columns hold what, where the prompt ends, what is refused."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from finetune.data.chat_text import parse_chat_text
from finetune.data.formats import (
    MEANINGFUL,
    FormatError,
    check_mapping,
    refuse_lost,
    resolve,
    scalar_columns,
    with_system,
)
from finetune.data.records import Message
from finetune.data.single_turn import optional_text
from finetune.data.tool_calls import tools_of
from finetune.data.turns import turn_notation, turns_of
from finetune.data.values import ABSENT, RowError, is_blank, kind, listed, text_of
from finetune.preference.records import Pair
from finetune.utils.files import canonical_json

RawRow = Mapping[str, object]
Messages = tuple[Message, ...]

COLUMNS: dict[str, tuple[str, ...]] = {  # canonical names
    "preference": ("prompt", "input", "system", "tools", "chosen", "rejected", "score_chosen", "score_rejected"),
    "kto": ("prompt", "input", "system", "tools", "completion", "label"),
}
REQUIRED = {"preference": ("chosen", "rejected"), "kto": ("label",)}
TURNS = ("conversations", "conversation", "messages", "dialog", "dialogue", "chat", "turns")
ALIASES: dict[str, tuple[str, ...]] = {
    "prompt": ("instruction", "question", "query", "input", *TURNS),
    "system": ("system_prompt", "system_message"),
    "tools": ("functions",),
    "chosen": ("chosen_response", "response_chosen", "preferred"),
    "rejected": ("rejected_response", "response_rejected", "dispreferred"),
    "completion": ("response", "answer", "output"),
    "label": ("kto_tag",),
    "score_chosen": ("chosen_score", "chosen_rating", "chosen-rating", "chosen_avg_rating"),
    "score_rejected": ("rejected_score", "rejected_rating", "rejected-rating", "rejected_avg_rating"),
}
CURATED = ("no_difference", "tied_scores", "scores_reversed")  # reasons that data, not their format, give
LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
HUMAN = re.compile(r"\s*Human:")
SPEAKER = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True, slots=True)
class Layout:
    """How a source is read: canonical column name -> the source's name, a sentence of why, the columns left over."""

    format: str
    columns: Mapping[str, str]
    why: str
    unused: tuple[str, ...] = ()
    ignored: frozenset[str] = frozenset()
    mapped: frozenset[str] = frozenset()  # canonical names that the recipe maps
    notes: Counter[str] = field(default_factory=Counter, compare=False)


def decide_pairs(
    asked: str, columns: Mapping[str, str], sample: Sequence[RawRow], ignored: Collection[str], method: str
) -> Layout:
    """Decide how to read rows like those of `sample`; `asked` is preference, kto or auto, `method` dpo or kto.

    Raises FormatError with what was found and what is allowed.
    """
    everything = list(dict.fromkeys(name for row in sample for name in row))
    present = [name for name in everything if name not in ignored]
    formats = [asked] if asked != "auto" else ["preference", "kto"]
    check_mapping(columns, [n for name in formats for n in COLUMNS[name]], present)
    for name in formats:
        resolved = resolve(COLUMNS[name], ALIASES, columns, present)
        lacking = [n for n in REQUIRED[name] if n not in resolved]
        if name == "kto" and not {"prompt", "completion"} & set(resolved):
            lacking.append("completion")
        if lacking:
            continue
        if name == "kto" and method == "dpo":
            raise FormatError("its rows are single answers with a label, and dpo needs pairs; set method: kto")
        why = "the recipe sets it" if asked != "auto" else f"it has {listed(resolved[n] for n in REQUIRED[name])}"
        unused = tuple(c for c in everything if c not in resolved.values())
        return Layout(name, resolved, why, unused, frozenset(ignored), frozenset(columns))
    wanted = " or ".join(f"{' and '.join(REQUIRED[n])} ({n})" for n in formats)
    first = REQUIRED[formats[0]][0]
    raise FormatError(f"needs the columns {wanted}; the columns are {listed(present)}. Say which: {{{first}: NAME}}")


def to_pairs(row: RawRow, layout: Layout, row_id: str, source: str, method: str) -> list[Pair]:
    """Return the row as a Pair; for kto a pair gives two.

    Raises RowError; the reason is in CURATED if the row has the right format but no usable preference.
    """
    get = {ours: (theirs, row.get(theirs, ABSENT)) for ours, theirs in layout.columns.items()}
    if layout.format == "kto":
        prompt, answers, label = _judged(get, layout.notes)
    else:
        prompt, *answers = _compared(get, layout.notes)
        label = None
    _check_unused(row, layout, prompt, answers)
    extra = canonical_json(scalars) if (scalars := scalar_columns(row, layout.columns.values())) else None
    tools = tools_of(*get["tools"], layout.notes) if "tools" in get else None
    pair = Pair(row_id, source, prompt, tuple(answers), label, extra, tools)
    return [*pair.apart()] if method == "kto" and label is None else [pair]


Cells = Mapping[str, tuple[str, object]]


def _compared(get: Cells, notes: Counter[str]) -> tuple[Messages, Messages, Messages]:
    """Prompt, chosen, rejected."""
    before = _prompt(get, notes)
    sides = []
    for name in ("chosen", "rejected"):
        turns = _side(*get[name], before is not None, notes)
        sides.append(_joined(before, _with_system(turns, get, notes), get[name][0]))
    prompt, chosen, rejected = split_prompt(sides[0], sides[1], (get["chosen"][0], get["rejected"][0]))
    if before is not None and not _same_prompt(before, prompt, sides):
        where = get["prompt"][0]
        actual = kind(get["prompt"][1])
        raise RowError("prompts_differ", where, actual, f"the prompt that {listed(('chosen', 'rejected'))} begin with")
    scores = [_score(*get[name]) if name in get else None for name in ("score_chosen", "score_rejected")]
    if None not in scores:
        _check_scores(get["score_chosen"][0], *scores)
    elif scores != [None, None]:
        notes["pairs with one score only are taken as they are"] += 1
    return prompt, chosen, rejected


def _judged(get: Cells, notes: Counter[str]) -> tuple[Messages, list[Messages], bool]:
    """Prompt, [answer], label."""
    where, value = get["label"]
    label = LABELS.get(str(value).strip().lower()) if isinstance(value, (bool, int, float, str)) else None
    if label is None:
        raise RowError("label", where, kind(value), "0 or 1 (false or true)")
    before = _prompt(get, notes)
    if "completion" in get:
        where = get["completion"][0]
        whole = _joined(before, _with_system(_side(*get["completion"], before is not None, notes), get, notes), where)
    else:
        where, whole = get["prompt"][0], before or ()
    asked = max((i for i, m in enumerate(whole) if m.role in ("user", "tool")), default=-1)
    answer = whole[asked + 1 :]
    if asked < 0:
        raise RowError("no_prompt", where, "no turn of a user", "a prompt and an answer")
    if not answer:
        raise RowError("missing_side", where, "no assistant turn at the end", "a prompt and an answer")
    _check_answer(where, answer)
    return whole[: asked + 1], [answer], label


def _prompt(get: Cells, notes: Counter[str]) -> Messages | None:
    """The prompt's own column as messages; None without one."""
    if "prompt" not in get or is_blank(get["prompt"][1]):
        return None
    where, value = get["prompt"]
    turns = _side(where, value, True, notes, role="user")
    given = optional_text(*get["input"]) if "input" in get else ""
    if given.strip() and turns[-1].role == "user":  # as in Alpaca
        turns = (*turns[:-1], Message("user", f"{turns[-1].content}\n\n{given}"))
    return _with_system(turns, get, notes)


def _with_system(messages: Messages, get: Cells, notes: Counter[str]) -> Messages:
    """Put the column `system` in front of a conversation; an answer alone is left as it is."""
    return messages if not messages or messages[0].role == "assistant" else with_system(messages, get, notes)


def _side(where: str, value: object, has_prompt: bool, notes: Counter[str], role: str = "assistant") -> Messages:
    """A cell as turns: a text, one turn, a list of turns, or a whole conversation in a text."""
    if is_blank(value):
        raise RowError("missing_side", where, kind(value), "a text or a list of turns")
    if isinstance(value, Mapping) and any(key in value for key in ("role", "from")):
        return turns_of(where, [value], notes)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]
    if not isinstance(value, str):
        return turns_of(where, value, notes)
    text = text_of(where, value)
    if HUMAN.match(text) and SPEAKER.search(text):
        return _speakers(where, text)
    if turn_notation(text) not in (None, ("", "")):
        return turns_of(where, text, notes)
    if has_prompt:
        return (Message(role, text),)
    parsed = parse_chat_text(text, where)
    if parsed is None:
        allowed = "a whole conversation, since the row has no prompt (one in another column: columns: {prompt: NAME})"
        raise RowError("no_prompt", where, kind(value), allowed)
    notes[f"texts in {parsed[0]} notation were read back as turns"] += 1
    return parsed[1]


def _speakers(where: str, text: str) -> Messages:
    """Turns of Anthropic's HH notation, `Human: …`, empty line, `Assistant: …`; an open last one is left out."""
    parts = SPEAKER.split("\n\n" + text.lstrip())
    messages = [
        Message("user" if name == "Human" else "assistant", body.strip())
        for name, body in zip(parts[1::2], parts[2::2], strict=True)
    ]
    if messages[-1].role == "assistant" and not messages[-1].content:
        messages.pop()
    if any(not m.content for m in messages):
        raise RowError("empty", where, "a turn without text", "Human: and Assistant: each with a text")
    return tuple(messages)


def _joined(before: Messages | None, turns: Messages, where: str) -> Messages:
    """The whole conversation: a cell that begins with the assistant's turn is appended to the prompt."""
    if turns[0].role in ("system", "user"):
        return turns
    if before is None:
        raise RowError("no_prompt", where, f"a first turn of {turns[0].role}", "a conversation that a user begins")
    return (*before, *turns)


def split_prompt(
    chosen: Messages, rejected: Messages, where: tuple[str, str] = ("chosen", "rejected")
) -> tuple[Messages, Messages, Messages]:
    """Split two conversations into what both begin with, and their two answers. Raises RowError.

    The prompt is the longest common beginning of whole turns; both sides go on with an assistant's turn.
    """
    same = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if _turn(a) != _turn(b)),
        min(len(chosen), len(rejected)),
    )
    if same == len(chosen) == len(rejected):
        raise RowError("no_difference", where[0], "the same answer as in " + where[1], "two different answers")
    prompt, sides = chosen[:same], (chosen[same:], rejected[same:])
    for name, side in zip(where, sides, strict=True):
        if not side:
            raise RowError("missing_side", name, "nothing after the common prompt", "an answer of its own")
    if prompt and prompt[-1].role not in ("user", "tool"):
        actual = f"a last turn of {prompt[-1].role} before the answers"
        raise RowError("no_prompt", where[0], actual, "a prompt that ends with a user's or a tool's turn")
    if any(side[0].role != "assistant" for side in sides) or not prompt:
        a, b = (f"{side[0].role}: {side[0].content[:40]!r}" for side in sides)
        actual = f"turn {same + 1} is {a} in one and {b} in the other"
        raise RowError("prompts_differ", where[0], actual, "the same turns up to the answers")
    for name, side in zip(where, sides, strict=True):
        _check_answer(name, side)
    if _meaning(sides[0]) == _meaning(sides[1]):
        actual = f"an answer that differs from {where[1]} only in outer white space, Unicode form or the order of keys"
        raise RowError("no_difference", where[0], actual, "two different answers")
    return prompt, sides[0], sides[1]


def _meaning(answer: Messages) -> list[tuple[str, str, object]]:
    return [
        (m.role, unicodedata.normalize("NFC", m.content).strip(), json.loads(m.extra) if m.extra else None)
        for m in answer
    ]


def _turn(message: Message) -> tuple[str, str, str | None]:
    return message.role, message.content, message.extra


def _check_answer(where: str, answer: Messages) -> None:
    if answer[-1].role != "assistant":
        raise RowError("missing_side", where, f"a last turn of {answer[-1].role}", "an answer of the assistant last")
    for message in answer:
        calls = message.extra is not None and '"tool_calls":' in message.extra
        if message.role == "assistant" and not message.content.strip() and not calls:
            raise RowError("missing_side", where, "a blank answer", "a text or a tool call")


def _same_prompt(before: Messages, prompt: Messages, sides: Sequence[Messages]) -> bool:
    """Whether the prompt's own column agrees with what both conversations begin with."""
    plain, common = [_turn(m) for m in before if m.role != "system"], [_turn(m) for m in prompt if m.role != "system"]
    if common[: len(plain)] == plain or any([_turn(m) for m in s if m.role != "system"] == plain for s in sides):
        return True
    if len(plain) > 1:
        return False
    text = before[-1].content.strip()
    return any(
        m.content.strip() and (_holds(text, m.content.strip()) or _holds(m.content, text))
        for m in prompt
        if m.role == "user"
    )


def _holds(text: str, part: str) -> bool:
    """Return whether `part` is in `text`, as whole words where it begins or ends with an ASCII letter or digit.

    Scripts without spaces have no word boundaries to look for.
    """
    before = r"(?<![A-Za-z0-9_])" if part[:1].isascii() and part[:1].isalnum() else ""
    after = r"(?![A-Za-z0-9_])" if part[-1:].isascii() and part[-1:].isalnum() else ""
    return re.search(before + re.escape(part) + after, text) is not None


def _score(where: str, value: object) -> float | None:
    if is_blank(value):
        return None
    try:
        score = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise RowError("score", where, kind(value), "a number") from None
    if not math.isfinite(score):
        raise RowError("score", where, kind(value), "a finite number, or null")
    return score


def _check_scores(where: str, chosen: float | None, rejected: float | None) -> None:
    assert chosen is not None and rejected is not None  # noqa: S101 - the caller looked
    if chosen == rejected:
        raise RowError("tied_scores", where, f"the score {chosen:g} on both sides", "a higher one for the chosen side")
    if not chosen > rejected:
        raise RowError("scores_reversed", where, f"{chosen:g} under {rejected:g}", "a higher one for the chosen side")


def _check_unused(row: RawRow, layout: Layout, prompt: Messages, answers: Sequence[Messages]) -> None:
    """Raise RowError if a column that is not read (and has a known meaning) has text that the pair lacks."""
    used = set(layout.columns.values()) | layout.ignored
    used |= {n for ours in layout.mapped for n in (ours, *ALIASES.get(ours, ()))}
    turns = (*prompt, *(m for a in answers for m in a))
    parts = [part for m in turns for part in (m.content, m.extra or "")]
    free = [n for n in COLUMNS[layout.format] if n not in layout.columns]
    for name, value in row.items():
        if name not in used and name.lower() in MEANINGFUL:
            refuse_lost(name, value, parts, layout.format, free)
