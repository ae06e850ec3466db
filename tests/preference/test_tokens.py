"""The checks on a rendered pair: each fires on the fault that it names, and is silent without."""

from __future__ import annotations

import pytest

from finetune.errors import GateRefused
from finetune.preference.tokens import check_labels, check_length_bias, length_bias

# ids: 1 = BOS, 2 = the terminator, 9 = an end of line, others words
IDS, PROMPT = [1, 5, 6, 7, 8, 2, 9], 3


def decode(ids):
    return "".join({9: "\n"}.get(i, "w") for i in ids if i not in (1, 2))


def check(mask, ids=IDS):
    check_labels("r:1 (chosen)", ids, mask, PROMPT, {2}, decode)


def test_labels_on_the_answer_and_its_terminator_are_right():
    check([0, 0, 0, 1, 1, 1, 0])
    check([0, 0, 0, 1, 1, 1], IDS[:6])
    check([0, 0, 0, 0, 1, 1, 0])  # a template's own words in front


@pytest.mark.parametrize(
    ("mask", "ids", "words"),
    [
        ([0, 0, 1, 1, 1, 1, 0], IDS, "1 tokens of its prompt carry a label"),
        ([0, 0, 0, 0, 0, 0, 0], IDS, "no token of its answer carries a label"),
        ([0, 0, 0, 1, 1, 0, 0], IDS, "do not end with the answer's terminator"),
        ([0, 0, 0, 1, 1, 1, 1], IDS, "do not end with the answer's terminator"),
        ([0, 0, 0, 1, 0, 0, 0], IDS, "'w' after them"),
        ([0, 0, 0, 1, 1, 1, 0, 0], [*IDS, 7], "'w' after them"),
        ([0, 0, 0, 1], IDS, "7 ids and a mask of 4"),
    ],
)
def test_labels_elsewhere_are_refused_with_the_row(mask, ids, words):
    with pytest.raises(GateRefused, match=words) as error:
        check(mask, ids)
    assert "row r:1 (chosen)" in str(error.value)


def test_length_bias_is_the_share_of_pairs_with_the_longer_answer_chosen():
    assert length_bias([(3, 2), (2, 3), (4, 1), (5, 5)]) == 2 / 3
    assert length_bias([(1, 1)]) is None
    check_length_bias(0.7, None, ["a"])
    check_length_bias(0.7, 0.7, ["a"])
    check_length_bias(None, 0.1, [])
    with pytest.raises(GateRefused, match=r"in 71.0% of the pairs .*as in a, b, c\)"):
        check_length_bias(0.71, 0.7, ["a", "b", "c", "d"])
