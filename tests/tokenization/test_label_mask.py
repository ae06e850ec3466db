"""Masks from character ranges."""

from __future__ import annotations

import numpy as np

from finetune.tokenization.label_mask import fuses_with_prompt, last_tokens, token_mask

# "<s>Q A</s>": BOS, "Q", an empty added space, " A" (the template's space and the answer), EOS
OFFSETS = np.array([(0, 3), (3, 4), (5, 5), (4, 6), (6, 10)])


def test_a_token_over_the_left_edge_is_supervised_and_so_is_the_terminator() -> None:
    assert token_mask(OFFSETS, [(5, 10)]).tolist() == [0, 0, 1, 1, 1]
    assert token_mask(OFFSETS, []).tolist() == [0] * 5


def test_the_first_token_never_carries_a_label() -> None:
    assert token_mask(OFFSETS, [(0, 10)]).tolist() == [0, 1, 1, 1, 1]
    assert token_mask(np.zeros((0, 2), np.int64), [(0, 1)]).tolist() == []


def test_the_last_token_of_a_span() -> None:
    assert last_tokens(OFFSETS, [(5, 10), (3, 4), (10, 12)]) == [4, 1, None]


def test_fusing_over_the_end_of_the_prompt() -> None:
    assert fuses_with_prompt(OFFSETS, [5])
    assert not fuses_with_prompt(OFFSETS, [4, 6])
