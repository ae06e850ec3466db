"""Every gate fires once and stays silent once."""

from __future__ import annotations

import pytest

from finetune.data.audit import (
    Tally,
    check_pad,
    check_prompt,
    check_shares,
    check_start,
    check_terminator,
    marking_problem,
    shared_length,
)
from finetune.data.chat import turn
from finetune.errors import GateRefused

CHAT = [turn("user", "Q"), turn("assistant", " A b ")]
TEXT = "<s>[Q] A b </s>"


def test_a_block_with_the_answer_and_its_terminator_is_right() -> None:
    assert marking_problem(TEXT, [(6, 15)], CHAT) is None
    assert marking_problem("Q</s>", [(1, 5)], [turn("user", "Q"), turn("assistant", "")]) is None


@pytest.mark.parametrize(
    ("spans", "said"),
    [
        ([(3, 15)], "more than the answer"),  # the question too
        ([(6, 8)], "not in its generation block"),
        ([], "0 generation blocks for 1"),
        ([(3, 6), (6, 15)], "2 generation blocks"),
    ],
)
def test_a_wrong_block_is_named(spans, said) -> None:
    assert said in str(marking_problem(TEXT, spans, CHAT))


def test_text_after_the_terminator_is_no_answer() -> None:
    assert marking_problem("A</s> user: Q", [(0, 13)], [turn("assistant", "A")])


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
