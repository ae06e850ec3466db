"""Rows with one question and one answer: Alpaca, prompt and completion, question answering over a passage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from finetune.data.records import Message
from finetune.data.turns import turns_of
from finetune.data.values import RowError, is_blank, kind, listed, parsed, plain_json, text_of


def question_and_answer(
    get: Mapping[str, tuple[str, object]], format_: str, notes: Counter[str]
) -> tuple[Message, ...]:
    """The turns of a row with one question and one answer, and of the history before it."""
    asked, answered = ("instruction", "output") if format_ == "alpaca" else ("prompt", "completion")
    question = _side(*get[asked], "user", notes)
    beside = "input" if format_ == "alpaca" else "context"
    given = optional_text(*get[beside]) if beside in get else ""
    if given.strip():
        last = question[-1]
        # As the data sets of either kind are written: Alpaca's input comes after, a passage before its question.
        parts = (last.content, given) if beside == "input" else (given, last.content)
        question = (*question[:-1], replace(last, content="\n\n".join(parts)))
    where, first, several = _first_answer(*get[answered])
    if several:
        notes["rows have several answers; the first is learned"] += 1
    answer = _side(where, first, "assistant", notes)
    thoughts = optional_text(*get["reasoning_content"]) if "reasoning_content" in get else ""
    if thoughts.strip():
        if answer[0].extra is not None:
            raise RowError("reasoning", get["reasoning_content"][0], kind(thoughts), "nothing beside turns with fields")
        answer = (replace(answer[0], extra=plain_json("answer", {"reasoning_content": thoughts})), *answer[1:])
    return (*_history(*get.get("history", ("history", None)), notes), *question, *answer)


def _history(where: str, value: object, notes: Counter[str]) -> tuple[Message, ...]:
    """Earlier turns: a list of [question, answer], or a list of turns."""
    if is_blank(value):
        return ()
    value = parsed(where, value, "a list of [question, answer]")
    if not isinstance(value, list) or not all(isinstance(pair, list) for pair in value):
        return turns_of(where, value, notes)
    messages: list[Message] = []
    for i, pair in enumerate(value):
        if len(pair) != 2:
            raise RowError("history", f"{where}[{i}]", f"a list of {len(pair)}", "[question, answer]")
        messages += [Message(r, text_of(f"{where}[{i}]", t)) for r, t in zip(("user", "assistant"), pair, strict=True)]
    return tuple(messages)


def _first_answer(where: str, value: object) -> tuple[str, object, bool]:
    """Where the answer is, the answer, and whether there are others: in SQuAD's nesting ({"text": […], …}) or in a list
    of answers; a plain answer as it is.
    """
    if isinstance(value, Mapping):
        key = next((k for k in ("text", "value", "answer") if k in value), None)
        if key is None:
            raise RowError("type", where, f"the keys {listed(value)}", "a text, or a mapping with text")
        return _first_answer(f"{where}.{key}", value[key])
    if not isinstance(value, list) or any(isinstance(v, Mapping) and ("role" in v or "from" in v) for v in value):
        return where, value, False
    if not value:
        raise RowError("no_answer", where, "an empty list (a question without an answer)", "one answer or more")
    answers = [_first_answer(where, v) for v in value]
    several = any(inner or answer != answers[0][1] for _, answer, inner in answers)
    return where, answers[0][1], several


def _side(where: str, value: object, role: str, notes: Counter[str]) -> tuple[Message, ...]:
    """A prompt or a completion: a text, or a list of turns."""
    if isinstance(value, list):
        return turns_of(where, value, notes)
    return (Message(role, text_of(where, value)),)


def optional_text(where: str, value: object) -> str:
    """A text that may be absent; a list of texts is joined by empty lines."""
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        value = "\n\n".join(str(part) for part in value)
    if is_blank(value):
        return ""
    try:
        return text_of(where, value)
    except RowError as error:
        if error.reason != "type":
            raise
        allowed = f"a text or a list of texts, or the column left out with ingest.ignore: [{where}]"
        raise RowError("type", where, kind(value), allowed) from None
