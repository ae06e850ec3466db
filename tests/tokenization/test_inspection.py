"""Segments for colouring."""

from __future__ import annotations

import pytest

from finetune.tokenization.inspection import Segment, segments
from tests.helpers.tiny_tokenizers import KINDS, build


def test_supervised_and_special_runs() -> None:
    tokenizer = build("metaspace")
    ids = tokenizer("<s>[INST] Write a poem [/INST] the sea</s>", add_special_tokens=False)["input_ids"]
    mask = [0] * (len(ids) - 3) + [1] * 3
    assert tokenizer.decode(ids[-3:-1]) == "the sea"
    assert segments(tokenizer, ids, mask) == [
        Segment("<s>", False, True),
        Segment("[INST] Write a poem [/INST]", False, False),
        Segment(" the sea", True, False),
        Segment("</s>", True, True),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_texts_joined_are_the_row_even_inside_a_character(kind) -> None:
    tokenizer = build(kind)
    ids = tokenizer("a 日本 \U0001f600 b", add_special_tokens=False)["input_ids"]
    for cut in range(len(ids)):
        found = segments(tokenizer, ids, [0] * cut + [1] * (len(ids) - cut))
        assert "".join(s.text for s in found) == tokenizer.decode(ids)


def test_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="zip"):
        segments(build("metaspace"), [5, 6], [1])
