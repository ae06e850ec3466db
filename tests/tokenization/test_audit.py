"""Every gate fires once and stays silent once."""

from __future__ import annotations

import pytest

from finetune.errors import GateRefused
from finetune.tokenization.answers import Answer
from finetune.tokenization.audit import (
    Tally,
    check_ids,
    check_pad,
    check_prompt,
    check_shares,
    check_special_counts,
    check_start,
    check_system,
    check_terminator,
    lost_text,
    shared_length,
)
from finetune.tokenization.chat import turn

CHAT = [turn("user", "Q"), turn("assistant", " A b ")]
TEXT = "<s>[Q] A b </s>"


def lost(text: str, spans: list[tuple[int, int]], chat: list, **more: object) -> str | None:
    return lost_text(text, [Answer(i, a, b, a, **more) for i, (a, b) in enumerate(spans)], chat)


def test_an_answer_that_is_found_whole_is_right() -> None:
    assert lost(TEXT, [(6, 15)], CHAT) is None
    assert lost("Q</s>", [(1, 5)], [turn("user", "Q"), turn("assistant", "")]) is None


@pytest.mark.parametrize(
    ("spans", "said"),
    [
        ([(3, 15)], "turn 1, a user's"),  # the question too
        ([(6, 8)], "the content of turn 2"),
        ([], "0 of its answers are in the text"),
        ([(3, 6), (6, 15)], "2 of its answers"),
    ],
)
def test_a_wrong_range_is_named(spans, said) -> None:
    assert said in str(lost(TEXT, spans, CHAT))


@pytest.mark.parametrize(
    ("text", "masked", "says"),
    [
        ("Q<think>why</think>A", "", None),
        ("QxxxxxxxxxxxxxxxxxxA", "", "the reasoning of turn 2"),
        ("QA", "left out", None),
    ],
)
def test_the_reasoning_is_in_an_answer_unless_it_is_masked(text, masked, says) -> None:
    chat = [turn("user", "Q"), {**turn("assistant", "A"), "reasoning_content": "why"}]
    found = lost(text, [(1, len(text))], chat, masked=masked)
    assert found is None if says is None else says in str(found)


def call(arguments: object, name: str = "look") -> dict[str, object]:
    return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


@pytest.mark.parametrize(
    ("written", "turns", "said"),
    [
        ("Q{A}R{B}", [("user", "Q"), "A", ("user", "R"), "B"], None),
        ("Q{A}{B}", [("user", "Q"), "A", ("user", "R"), "B"], "turn 3, a user's"),
        ("Q{A R}{B}", [("user", "Q"), "A R", ("user", "R"), "B"], "turn 3, a user's"),  # R is there, but as an answer
        ("RQ{A}{B}", [("user", "Q"), "A", ("user", "R"), "B"], "turn 3, a user's"),  # and in another turn's place
        ("SQ{A}", [("system", "S"), ("user", "Q"), "A"], None),
        ("Q{A}S R{B}", [("system", "S"), ("user", "Q"), "A", ("user", "R"), "B"], None),  # as Mistral v3 does
        ("Q{S}", [("system", "S"), ("user", "Q"), "S"], "the system message, turn 1"),
        ('Q{A}"a\\"b"{B}', [("user", "Q"), "A", ("tool", 'a"b'), "B"], None),  # escaped as in JSON
        ("Q{A}{B}", [("user", "Q"), "A", ("tool", "22"), "B"], "turn 3, a tool's"),
        ("Q{A}T", [("user", "Q"), "A", ("tool", "T")], None),
        ("Q{A}", [("user", "Q"), "A", ("user", "")], None),  # nothing to be lost
    ],
)
def test_every_turn_stands_in_its_place(written, turns, said) -> None:
    spans, text = [], ""
    for part in written.replace("}", "{").split("{"):
        if len(text.split("\0")) % 2 == 0:
            spans.append((len(text), len(text) + len(part)))
        text += part + "\0"
    chat = [turn("assistant", t) if isinstance(t, str) else turn(*t) for t in turns]
    problem = lost(text, spans, chat)
    assert (problem is None) if said is None else (said in str(problem))


@pytest.mark.parametrize(
    ("arguments", "block", "said"),
    [
        ({"at": "sea"}, '{"name": "look", "arguments": {"at": "sea"}}', None),
        ('{"at": "sea"}', '{"name": "look", "arguments": "{\\"at\\": \\"sea\\"}"}', None),
        ({"at": 'é"', "n": [1, 2.5, True, None]}, '{"name": "look", "arguments": {"at": "é\\"", "n": [1, 2.5]}}', None),
        ({"at": "é"}, 'look at "\\u00e9"', None),
        ({"at": "sea"}, "</s>", "call of look of turn 2"),
        ({"at": "sea"}, "look at", "'sea', an argument of the call of look, of turn 2"),
        ({"n": 17}, "look n", "'17', an argument"),
        (None, "look", None),
    ],
)
def test_every_call_stands_in_its_block(arguments, block, said) -> None:
    problem = lost("Q" + block, [(1, 1 + len(block))], [turn("user", "Q"), call(arguments)])
    assert (problem is None) if said is None else (said in str(problem))


def test_a_call_without_a_name_is_lost() -> None:
    assert "a tool without a name" in str(lost("Q x", [(2, 3)], [turn("user", "Q"), call({}, name="")]))


def test_ids_are_the_bases_own() -> None:
    check_ids("r:1", [1, 2, 3], [1, 2, 3], str)
    for ids in ([1, 9, 3], [1, 2], [1, 2, 3, 4], []):
        with pytest.raises(GateRefused, match=r"row r:1: its token ids differ .* apply_chat_template at token \d"):
            check_ids("r:1", ids, [1, 2, 3], str)


def test_typed_special_tokens_are_no_ids() -> None:
    check_special_counts("r:1", [1, 5, 2], [1, 2, 5, 2], {2: 1}, str)
    check_special_counts("r:1", [1, 2, 2], [1, 2], {}, str)  # nothing was typed
    with pytest.raises(GateRefused, match=r"row r:1: .*'2' \(id 2\) is in its ids 2 times.*writes it 1 times.*1 times"):
        check_special_counts("r:1", [1, 2, 5, 2], [1, 2, 5, 2], {2: 1}, str)


def test_a_system_message_without_a_place() -> None:
    check_system("r:1", [turn("user", "Q")], "mistral")
    check_system("r:1", [], "mistral")
    with pytest.raises(GateRefused, match=r"row r:1 has a system message.*mistral.*render\.system: merge"):
        check_system("r:1", [turn("system", "S")], "mistral")


def test_too_many_without_an_end_names_rows() -> None:
    made = Tally()
    made.rows_in = 10
    for i in range(10):
        made.keep(f"r:{i}", 10, 4, truncated=False, unterminated=i < 2)
    check_shares([made], 0.1, 0.1, 0.2)
    with pytest.raises(GateRefused, match=r"2 of 10 rows hold an answer without its end.*\(r:0, r:1\)"):
        check_shares([made], 0.1, 0.1, 0.1)


def test_two_bos_tokens() -> None:
    check_start("r:1", [1, 5], 1)
    check_start("r:1", [1, 1], None)
    with pytest.raises(GateRefused, match="r:1"):
        check_start("r:1", [1, 1, 5], 1)


def test_terminator() -> None:
    check_terminator("r:1", 2, True, {2}, "</s>")
    with pytest.raises(GateRefused, match="no special token"):
        check_terminator("r:1", 7, True, {2}, ">")
    with pytest.raises(GateRefused, match="no label"):
        check_terminator("r:1", 2, False, {2}, "</s>")


def test_prompt_is_a_prefix() -> None:
    check_prompt("r:1", [1, 2], [1, 2, 3], "mistral")
    with pytest.raises(GateRefused, match="at token 1 of 2"):
        check_prompt("r:1", [1, 9], [1, 2, 3], "mistral")
    with pytest.raises(GateRefused, match="r:1"):
        check_prompt("r:1", [1, 2, 3, 4], [1, 2, 3], "mistral")
    assert shared_length("abc", "abd") == 2


def test_pad_is_no_label() -> None:
    check_pad(0, {1, 2})
    with pytest.raises(GateRefused, match="id 2"):
        check_pad(2, {1, 2})


def tally(kept: int, cut: int = 0, lost: int = 0) -> Tally:
    made = Tally()
    for i in range(kept):
        made.rows_in += 1
        made.keep(f"r:{i}", 10, 4, truncated=i < cut)
    for i in range(lost):
        made.drop(f"x:{i}", "no assistant turn")
    return made


def test_shares_within_bounds() -> None:
    check_shares([tally(9, cut=1, lost=1), tally(0)], 0.1, 0.1)


def test_too_many_dropped_names_reasons_and_rows() -> None:
    with pytest.raises(GateRefused, match=r"2 of 10 rows.*2 × no assistant turn \(x:0, x:1\)"):
        check_shares([tally(8, lost=2)], 0.1, 0.1)


def test_too_many_cut_names_rows() -> None:
    with pytest.raises(GateRefused, match=r"4 of 10 rows would be cut.*r:0, r:1, r:2, …"):
        check_shares([tally(10, cut=4)], 0.1, 0.1)


def test_nothing_left() -> None:
    with pytest.raises(GateRefused, match="no training row is left"):
        check_shares([tally(0)], 1, 1)


def test_a_tally_counts() -> None:
    figures = tally(3, cut=1, lost=30).as_json()
    assert (figures["rows_in"], figures["rows"], figures["tokens"], figures["supervised"]) == (33, 3, 30, 12)
    assert figures["dropped"] == {"no assistant turn": 30}
    assert len(figures["examples"]["no assistant turn"]) == 20
