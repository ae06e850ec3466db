"""Each rule with a row it leaves out and one that it keeps."""

from __future__ import annotations

import re

import pytest

from finetune.data.records import Example, Message
from finetune.filters import basic


def chat(*turns: tuple[str, str], extra: str | None = None) -> Example:
    """A conversation; `extra` goes with its last turn."""
    messages = [Message(role, content) for role, content in turns]
    if extra:
        messages[-1] = Message(messages[-1].role, messages[-1].content, extra)
    return Example("s:1", "s", tuple(messages))


GOOD = chat(("user", "question"), ("assistant", "answer"))
TEXT = Example("s:1", "s", text="Once upon a time")


def why(verdict: basic.Verdict) -> tuple[str, str] | None:
    """The name and the sentence."""
    return verdict and (verdict.reason, verdict.detail)


def test_empty_turns() -> None:
    assert basic.empty_turn(GOOD) is None
    assert basic.empty_turn(TEXT) is None
    assert basic.empty_turn(chat(("user", "q"), ("assistant", ""), extra='{"tool_calls":[]}')) is None
    assert why(basic.empty_turn(chat(("user", " \n"), ("assistant", "a")))) == ("empty", "turn 1 (user) is blank")
    assert why(basic.empty_turn(Example("s:1", "s", text=" "))) == ("empty", "the text is blank")
    assert why(basic.empty_turn(Example("s:1", "s"))) == ("empty", "there is no turn")


def test_no_assistant() -> None:
    assert basic.no_assistant(GOOD) is None
    assert basic.no_assistant(TEXT) is None
    assert why(basic.no_assistant(chat(("user", "q")))) == ("no_assistant", "the roles are user")


@pytest.mark.parametrize(
    "roles",
    ["user assistant", "system user assistant", "user assistant tool tool assistant user assistant"],
)
def test_alternating_roles_are_kept(roles: str) -> None:
    assert basic.not_alternating(chat(*((role, "x") for role in roles.split()))) is None


@pytest.mark.parametrize(
    ("roles", "says"),
    [
        ("assistant", "turn 1 is assistant, expected is user"),
        ("system assistant", "turn 2 is assistant"),
        ("user user assistant", "turn 2 is user"),
        ("user system assistant", "turn 2 is system"),
        ("user assistant assistant", "turn 3 is assistant, expected is user or tool"),
        ("user tool assistant", "turn 2 is tool"),
        ("user assistant tool user", "turn 4 is user"),
        ("user assistant user", "the last turn"),
        ("user assistant tool", "the last turn"),
        ("system", "the last turn"),
    ],
)
def test_other_orders_are_left_out(roles: str, says: str) -> None:
    verdict = basic.not_alternating(chat(*((role, "x") for role in roles.split())))
    assert verdict is not None
    assert verdict.reason == "alternate"
    assert says in verdict.detail


def test_lengths_in_characters() -> None:
    assert basic.length_outside(GOOD, "user", 8, 8) is None
    assert why(basic.length_outside(GOOD, "user", 9, None)) == ("user_short", "8 characters, at least 9")
    assert why(basic.length_outside(GOOD, "assistant", 0, 5)) == ("assistant_long", "6 characters, at most 5")
    assert basic.length_outside(TEXT, "user", 100, None) is None
    assert why(basic.length_outside(TEXT, "assistant", 100, None)) == (
        "assistant_short",
        "16 characters, at least 100",
    )


def test_patterns() -> None:
    compiled = re.compile
    assert basic.matching(GOOD, [compile_ := compiled("absent")], [compiled("quest")]) is None
    assert why(basic.matching(GOOD, [compile_, compiled("a.s")], [])) == ("drop_matching", "'a.s' matches 'ans'")
    assert why(basic.matching(GOOD, [], [compile_])) == ("keep_matching", "matches none of 'absent'")
    assert basic.matching(TEXT, [compiled("^Once")], []) is not None


def test_tokens() -> None:
    assert basic.tokens_outside(10, 10, 10) is None
    assert basic.tokens_outside(3, None, None) is None
    assert basic.tokens_outside(11, None, 10) == basic.Drop("tokens", "11 tokens, at most 10", 11, 10)
    assert basic.tokens_outside(9, 10, None) == basic.Drop("tokens", "9 tokens, at least 10", 9, 10)


CALL = '{"tool_calls":[{"function":{"arguments":{},"name":"look"},"type":"function"}]}'


def test_a_row_without_a_learned_answer_is_left_out():
    asked, masked = Message("user", "Hi"), Message("assistant", "WRONG", learn=False)
    assert basic.no_assistant(Example("a:1", "a", (asked, masked))).reason == "no_assistant"
    assert basic.no_assistant(Example("a:1", "a", (asked, masked, asked, Message("assistant", "Ho")))) is None


def test_tool_turns_alternate_and_may_be_silent():
    asked, call, result = Message("user", "Hi"), Message("assistant", "", CALL), Message("tool", "")
    for turns in (
        (asked, call),
        (asked, call, result, result, Message("assistant", "Ho")),
        (asked, call, result, call),
    ):
        row = Example("a:1", "a", turns)
        assert basic.empty_turn(row) is None and basic.not_alternating(row) is None
        assert basic.length_outside(row, "assistant", 1, None) is None
    assert basic.not_alternating(Example("a:1", "a", (asked, result))).reason == "alternate"
    assert basic.empty_turn(Example("a:1", "a", (asked, Message("assistant", "")))).reason == "empty"
