"""Turns that are not learned, tool calls, reasoning, and columns that may not be lost."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from finetune.data.formats import FormatError, decide, to_example
from finetune.data.records import Example, Message
from finetune.data.tool_calls import calls_of, tools_of
from finetune.data.turns import LEARN_KEYS, MASK_KEYS, turns_of
from finetune.data.values import RowError


def turns(*found: dict[str, Any]) -> tuple[Message, ...]:
    return turns_of("messages", list(found), Counter())


def convert(row: dict[str, Any], **how: Any) -> Example:
    return to_example(row, decide("auto", {}, [row], **how), "s:1", "s")


ASK = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize("key", [*LEARN_KEYS, *MASK_KEYS])
@pytest.mark.parametrize("value", [0, 1, 0.0, 1.0, False, True, None])
@pytest.mark.parametrize("names", [("role", "content", "assistant"), ("from", "value", "gpt")])
def test_a_turn_is_masked_by_any_of_the_names(key: str, value: object, names: tuple[str, str, str]) -> None:
    role, content, assistant = names
    _, answer = turns(ASK, {role: assistant, content: "WRONG", key: value})
    masked = value is not None and bool(value) == (key in MASK_KEYS)
    assert (answer.learn, answer.extra) == (not masked, None)


def test_pairs_and_calls_are_masked_too() -> None:
    assert [m.learn for m in turns({"human": "a", "assistant": "b", "train": False})] == [True, False]
    assert [m.learn for m in turns(ASK, {"from": "function_call", "value": '{"name": "f"}', "weight": 0})] == [
        True,
        False,
    ]


@pytest.mark.parametrize("value", [0.5, 2, -1, "0.5", "yes", [0]])
def test_any_other_weight_is_refused_by_name(value: object) -> None:
    with pytest.raises(RowError, match=r"messages\[1\]\.weight: found .*allowed is 0 or 1") as caught:
        turns(ASK, {"role": "assistant", "content": "Ho", "weight": value})
    assert caught.value.reason == "weight"


F = {"type": "function", "function": {"name": "f", "arguments": {"b": 1, "a": [2, None]}}}
CALLS: dict[str, object] = {
    "whole": [F],
    "null padded": [{**F, "id": None, "function": {**F["function"], "arguments": {"b": 1, "a": [2, None], "c": None}}}],  # type: ignore[dict-item]
    "arguments as text": [{"type": "function", "function": {"name": "f", "arguments": '{"b": 1, "a": [2, null]}'}}],
    "bare": [{"name": "f", "arguments": {"b": 1, "a": [2, None]}}],
    "parameters": [{"name": "f", "parameters": {"b": 1, "a": [2, None]}}],
    "one": {"name": "f", "arguments": {"b": 1, "a": [2, None]}},
    "text": json.dumps([F]),
    "text inside a list": [json.dumps(F)],
}


@pytest.mark.parametrize("found", CALLS.values(), ids=CALLS)
def test_tool_calls_come_in_one_form_and_in_their_own_order(found: object) -> None:
    assert json.dumps(calls_of("x", found, Counter())) == json.dumps([F])
    _, answer = turns(ASK, {"role": "assistant", "content": None, "tool_calls": found})
    assert (answer.content, answer.extra) == ("", json.dumps({"tool_calls": [F]}, separators=(",", ":")))


def test_arguments_that_are_no_object_stay_text_and_are_counted() -> None:
    notes: Counter[str] = Counter()
    call = calls_of("x", {"name": "f", "arguments": "2 + 2"}, notes)
    assert call[0]["function"]["arguments"] == "2 + 2" and notes.total() == 1
    assert calls_of("x", {"name": "f", "arguments": " "}, notes)[0]["function"]["arguments"] == {}


@pytest.mark.parametrize("found", ["{'name' 'f'}", 7, [7], [{"arguments": {}}], {"function": {"arguments": {}}}])
def test_what_is_no_tool_call_is_refused(found: object) -> None:
    with pytest.raises(RowError, match="tool call"):
        calls_of("x", found, Counter())


def test_calls_in_turns_of_their_own_join_the_turn_before() -> None:
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}
    found = turns(
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Let me see."},
        call,
        call,
        {"from": "observation", "value": ""},
    )
    assert [(m.role, m.content) for m in found] == [("user", "Hi"), ("assistant", "Let me see."), ("tool", "")]
    assert len(json.loads(found[1].extra or "")["tool_calls"]) == 2


def test_tools_in_any_form() -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
    wanted = json.dumps([tool], separators=(",", ":"))
    for found in ([tool], json.dumps([tool]), [tool["function"]], tool, [json.dumps(tool)], [{**tool, "strict": None}]):
        assert tools_of("tools", found, Counter()) == wanted
    assert [tools_of("tools", empty, Counter()) for empty in (None, "", "[]", [], " ")] == [None] * 5
    for bad in ("nonsense", 3, [3], [{"description": "no name"}]):
        with pytest.raises(RowError, match="tools"):
            tools_of("tools", bad, Counter())


def test_a_tool_may_return_an_object() -> None:
    assert turns(ASK, {"role": "tool", "content": {"temp": 20}})[1].content == '{"temp": 20}'


def test_reasoning_has_one_name_and_one_text() -> None:
    for key in ("reasoning_content", "thinking", "reasoning"):
        assert turns(ASK, {"role": "assistant", "content": "Ho", key: "hmm"})[1].extra == '{"reasoning_content":"hmm"}'
    with pytest.raises(RowError, match="different texts in reasoning_content, thinking"):
        turns(ASK, {"role": "assistant", "content": "Ho", "thinking": "a", "reasoning_content": "b"})


def test_unknown_fields_of_a_turn_are_kept_and_named() -> None:
    notes: Counter[str] = Counter()
    (_, answer) = turns_of("m", [ASK, {"role": "assistant", "content": "Ho", "mood": "good"}], notes)
    assert answer.extra == '{"mood":"good"}' and "'mood'" in next(iter(notes))


LEFT_OVER = {
    "choices": ({"question": "Hi", "answer": "Ho", "choices": ["a", "b"]}, True),
    "a second question": ({"instruction": "Hi", "output": "Ho", "question": "What?"}, True),
    "tools beside text": ({"text": "once", "tools": [{"name": "f"}]}, True),
    "a label beside text": ({"text": "once", "label": 3}, True),
    "images": ({"messages": [ASK, {"role": "assistant", "content": "Ho"}], "images": ["x.png"]}, True),
    "the prompt once more": ({"messages": [ASK, {"role": "assistant", "content": "Ho"}], "prompt": "Hi"}, False),
    "the turns once more": ({"messages": [ASK], "conversations": [{"from": "human", "value": "Hi"}]}, False),
    "a rendered text": (
        {"instruction": "Hi", "output": "Ho", "text": "### Instruction:\nHi\n### Response:\nHo"},
        False,
    ),
    "empty": ({"question": "Hi", "answer": "Ho", "choices": [], "input": ""}, False),
    "no meaning": ({"question": "Hi", "answer": "Ho", "score": 3}, False),
}


@pytest.mark.parametrize(("row", "lost"), LEFT_OVER.values(), ids=LEFT_OVER)
def test_a_column_that_means_something_is_used_or_refused(row: dict[str, Any], lost: bool) -> None:
    if not lost:
        convert(row)
        return
    with pytest.raises(RowError, match=r"ingest\.ignore: \[(\w+)\]") as caught:
        convert(row)
    assert caught.value.reason == "unused_column"
    convert(row, ignored=[str(caught.value).partition(":")[0]])


def test_a_column_of_later_rows_is_read_too() -> None:
    decision = decide("auto", {}, [{"instruction": "Hi", "output": "Ho"}])
    late = {"instruction": "Hi", "output": "Ho", "system": "Be brief", "input": "x", "mood": "good"}
    example = to_example(late, decision, "s:2", "s")
    assert [m.content for m in example.messages] == ["Be brief", "Hi\n\nx", "Ho"]
    assert example.extra == '{"mood":"good"}'
    assert decision.notes == {"the column input, mood, system is not in the first rows": 1}
    with pytest.raises(RowError, match="choices"):
        to_example({"instruction": "Hi", "output": "Ho", "choices": ["a"]}, decision, "s:3", "s")


def test_answers_nested_as_in_squad() -> None:
    row = {"question": "Hi", "context": "C", "answers": {"text": ["a", "b"], "answer_start": [0, 5]}}
    decision = decide("auto", {}, [row])
    assert [m.content for m in to_example(row, decision, "s:1", "s").messages] == ["C\n\nHi", "a"]
    assert decision.notes == {"rows have several answers; the first is learned": 1}
    for form in (["a"], [{"text": "a", "answer_start": 0}], {"value": "a", "aliases": []}, "a"):
        assert convert({"question": "Hi", "answers": form}).messages[1].content == "a"
    with pytest.raises(RowError, match="a question without an answer"):
        convert({"question": "Hi", "answers": {"text": [], "answer_start": []}})


def test_a_context_of_another_kind_names_the_way_on() -> None:
    with pytest.raises(RowError, match=r"ingest\.ignore: \[context\]"):
        convert({"question": "Hi", "answer": "Ho", "context": {"title": ["a"]}})


def test_a_sequence_as_datasets_keeps_it() -> None:
    row = {"messages": {"role": ["user", "assistant"], "content": ["Hi", "Ho"], "weight": [None, 0]}}
    assert convert(row).messages == (Message("user", "Hi"), Message("assistant", "Ho", learn=False))


def test_raw_is_for_texts() -> None:
    assert convert({"text": "<|im_start|>user"}, raw=True).text == "<|im_start|>user"
    with pytest.raises(FormatError):
        decide("text", {}, [{"q": 1}], raw=True)
