"""Every format, what it makes of good rows, and the reason it gives for bad ones."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.chat_text import parse_llama2
from finetune.data.formats import Decision, FormatError, decide, to_example, unique_labels
from finetune.data.records import Example, Message
from finetune.data.values import RowError

USER, ANSWER = Message("user", "Hi"), Message("assistant", "Ho")


def convert(row: dict[str, Any], asked: str = "auto", columns: dict[str, str] | None = None) -> Example:
    """The row read by itself."""
    return to_example(row, decide(asked, columns or {}, [row]), "s:1", "s")


MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]


@pytest.mark.parametrize(
    ("row", "format_"),
    [
        ({"messages": MESSAGES}, "messages"),
        ({"conversations": MESSAGES}, "messages"),
        ({"conversations": SHAREGPT}, "sharegpt"),
        ({"messages": SHAREGPT}, "sharegpt"),
        ({"instruction": "Hi", "output": "Ho"}, "alpaca"),
        ({"instruction": "Hi", "input": "", "output": "Ho"}, "alpaca"),
        ({"instruction": "Hi", "input": None, "output": "Ho", "system": None}, "alpaca"),
        ({"instruction": "Hi", "context": "", "response": "Ho"}, "alpaca"),
        ({"prompt": "Hi", "completion": "Ho"}, "prompt_completion"),
        ({"prompt": "Hi", "response": "Ho"}, "prompt_completion"),
        ({"question": "Hi", "answer": "Ho"}, "prompt_completion"),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, "prompt_completion"),
        ({"text": "<s>[INST] Hi [/INST] Ho </s>"}, "llama2_text"),
    ],
)
def test_auto_decides_and_says_why(row: dict[str, Any], format_: str) -> None:
    decision = decide("auto", {}, [row])
    assert decision.format == format_
    assert decision.why
    assert convert(row).messages == (USER, ANSWER)


def test_auto_takes_other_text_as_it_is() -> None:
    assert decide("auto", {}, [{"text": "Once"}]).format == "text"
    assert convert({"text": "Once"}).text == "Once"


def test_auto_refuses_unknown_columns_with_all_it_knows() -> None:
    with pytest.raises(FormatError, match=r"columns q, a.*instruction \+ output.*columns: {"):
        decide("auto", {}, [{"q": "Hi", "a": "Ho"}])


def test_columns_map_our_names_to_the_files() -> None:
    row = {"q": "Hi", "a": "Ho", "output": "something else"}
    assert convert(row, columns={"instruction": "q", "output": "a"}).messages == (USER, ANSWER)
    assert convert(row, "prompt_completion", {"prompt": "q", "completion": "a"}).messages == (USER, ANSWER)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"instructon": "q"}, "did you mean instruction"),
        ({"instruction": "quest"}, "did you mean question"),
        ({"prompt": "question"}, "unknown key 'prompt'"),
    ],
)
def test_a_wrong_mapping_is_refused(columns: dict[str, str], says: str) -> None:
    with pytest.raises(FormatError, match=says):
        decide("alpaca", columns, [{"question": "Hi", "output": "Ho"}])


def test_a_format_asked_for_needs_its_columns() -> None:
    with pytest.raises(FormatError, match=r"needs the column 'output'.*columns: \{output: NAME}"):
        decide("alpaca", {}, [{"instruction": "Hi"}])


def test_alpaca_joins_instruction_and_input_and_takes_a_system() -> None:
    row = {"instruction": "Add", "input": "1, 2", "output": "3", "system": "Be brief"}
    system, user, answer = convert(row).messages
    assert (system.content, user.content, answer.content) == ("Be brief", "Add\n\n1, 2", "3")


def test_a_system_column_does_not_stand_beside_a_system_turn() -> None:
    row = {"messages": [{"role": "system", "content": "A"}, *MESSAGES], "system": "B"}
    assert [m.content for m in convert(row).messages] == ["A", "Hi", "Ho"]
    assert convert({"conversations": SHAREGPT, "system": "B"}).messages[0] == Message("system", "B")


def test_an_empty_system_turn_is_left_out() -> None:
    assert convert({"messages": [{"role": "system", "content": " "}, *MESSAGES]}).messages == (USER, ANSWER)


def test_tool_calls_and_names_stay_in_extra() -> None:
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"b": 1, "a": 2}}}]
    turns = [
        {"role": "user", "content": "Hi", "name": "ann", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
    ]
    user, call, tool = convert({"messages": turns}).messages
    assert user.extra == '{"name":"ann"}'
    assert (call.content, json.loads(call.extra or "")) == ("", {"tool_calls": calls})
    assert (tool.role, tool.extra) == ("tool", '{"tool_call_id":"1"}')


def test_text_parts_are_joined_and_pictures_refused() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert convert({"messages": [{"role": "user", "content": parts}, MESSAGES[1]]}).messages[0].content == "a\nb"
    with pytest.raises(RowError, match="'image_url'"):
        convert({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]})


def test_unused_plain_columns_are_kept() -> None:
    row = {"instruction": "Hi", "output": "Ho", "score": 0.5, "tags": ["a"], "nothing": None, "nan": float("nan")}
    example = convert(row)
    assert example.extra == '{"score":0.5}'
    assert example.column("score") == 0.5
    assert set(decide("auto", {}, [row]).unused) == {"score", "tags", "nothing", "nan"}


@pytest.mark.parametrize(
    ("row", "reason", "says"),
    [
        ({"messages": []}, "empty", "an empty list"),
        ({"messages": None}, "type", "null"),
        ({"messages": [7]}, "type", r"messages\[0\]: found the number 7"),
        ({"messages": [{"role": "system", "content": ""}]}, "empty", "system"),
        ({"messages": [{"role": "user", "content": None}]}, "null", r"messages\[0\].content: found null"),
        ({"messages": [{"role": "user", "content": 7}]}, "type", "the number 7"),
        ({"messages": [{"role": "assistent", "content": "Ho"}]}, "role", "did you mean 'assistant'"),
        ({"messages": [{"role": "asistant", "content": "Ho"}]}, "role", "did you mean 'assistant'"),
        ({"messages": [{"role": None, "content": "Ho"}]}, "role", "null"),
        ({"messages": [{"role": "user"}]}, "missing", "role and content"),
        ({"messages": [{"rol": "user", "content": "Hi"}]}, "missing", "did you mean 'rol'"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate", r"U\+D800"),
        ({"messages": [{"role": "user", "content": "Hi", "name": "\udfff"}]}, "surrogate", r"U\+DFFF"),
    ],
)
def test_a_row_that_does_not_fit_says_why(row: dict[str, Any], reason: str, says: str) -> None:
    decision = Decision("messages", {"messages": "messages"}, "")
    with pytest.raises(RowError, match=says) as caught:
        to_example(row, decision, "s:1", "s")
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "Hi", "output": None}, "null"),
        ({"instruction": "Hi"}, "null"),
        ({"instruction": 3, "output": "Ho"}, "type"),
        ({"instruction": "Hi", "output": "Ho", "note": "\ud800"}, "surrogate"),
    ],
)
def test_an_alpaca_row_that_does_not_fit(row: dict[str, Any], reason: str) -> None:
    decision = decide("alpaca", {}, [{"instruction": "Hi", "output": "Ho"}])
    with pytest.raises(RowError) as caught:
        to_example(row, decision, "s:1", "s")
    assert caught.value.reason == reason


def test_llama2_is_parsed_back_with_its_system_and_all_turns() -> None:
    text = "<s>[INST] <<SYS>>\nBe brief\n<</SYS>>\n\nHi [/INST] Ho </s><s>[INST] More? [/INST] No </s>"
    assert [(m.role, m.content) for m in parse_llama2(text)] == [
        ("system", "Be brief"),
        ("user", "Hi"),
        ("assistant", "Ho"),
        ("user", "More?"),
        ("assistant", "No"),
    ]


def test_llama2_without_its_ends_is_tolerated() -> None:
    assert parse_llama2("[INST] Hi [/INST] Ho") == (USER, ANSWER)
    assert parse_llama2("<s>[INST] Hi [/INST]") == (USER,)
    assert parse_llama2("<s>[INST] Hi [/INST] Ho [INST] Hi [/INST] Ho </s>") == (USER, ANSWER, USER, ANSWER)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Hi there",
        "<s>[INST] Hi",
        "<s>[INST] <<SYS>> a [/INST] b </s>",
        "<s>[INST] Hi [/INST] Ho </s> and more",
        "[INST] a [/INST] b </s><s>[INST] <<SYS>>x<</SYS>> c [/INST] d </s>",
    ],
)
def test_what_is_no_llama2_text_is_refused(text: str) -> None:
    with pytest.raises(RowError):
        parse_llama2(text)


WORDS = (
    st.text(st.characters(exclude_characters="<>[]", exclude_categories=["Cs"]), min_size=1).map(str.strip).filter(bool)
)


@given(st.none() | WORDS, st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4))
def test_llama2_is_the_inverse_of_writing_it(system: str | None, turns: list[tuple[str, str]]) -> None:
    expected = [Message(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
    head = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    texts = [f"<s>[INST] {head if i == 0 else ''}{q} [/INST] {a} </s>" for i, (q, a) in enumerate(turns)]
    assert parse_llama2("".join(texts)) == (*([Message("system", system)] if system else []), *expected)


def test_labels_are_unique() -> None:
    assert unique_labels(["a", "b", "a", "a#2", "a"]) == ["a", "b", "a#2", "a#2#2", "a#3"]
