"""Refusals and cut-off answers, and what looks like them and is neither."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.records import Example, Message
from finetune.filters import endings

STORY = (
    "The harbour was quiet when they came in. Two boats lay at the quay, and a man mended nets in the last light. He "
    "did not look up. Behind him the town climbed the hill, white and ochre, and the bells rang in the evening. "
)


def answer(text: str, question: str = "Tell me.") -> Example:
    return Example("s:1", "s", (Message("user", question), Message("assistant", text)))


@pytest.mark.parametrize(
    "text",
    [
        "As an AI language model, I do not have opinions.",
        "I’m sorry, but I can’t help with that.",
        "I CANNOT ASSIST WITH that request.",
        "Certainly! However, as an AI,\n I have no body.",
        "I am unable to provide that.",
    ],
)
def test_refusals_are_dropped(text):
    found = endings.refusals(answer(text), ())
    assert found and found.reason == "refusals" and "turn 2 says" in found.detail


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("I'm sorry to hear that you lost the match.", "Cheer me up."),
        ("I'm sorry, but I'm unable to come in to work today.", "Write an excuse."),
        ('print("Hello, I am an AI language model")', "Write code."),
        ("As an AI language model of 2100, I see further.", "Pretend to be an AI language model in 2100."),
        (STORY * 2 + "Anna said: I can't help with that.", "Write a story."),
        ("A language model gives each word a probability.", "What does it do?"),
    ],
    ids=["sympathy", "excuse", "quoted", "asked for", "in a story", "explained"],
)
def test_what_only_sounds_like_a_refusal_is_kept(text, question):
    assert endings.refusals(answer(text, question), ()) is None


def test_phrases_of_ones_own_and_only_in_answers():
    assert endings.refusals(answer("Well, BEEP   boop."), ["Beep Boop"]) is not None
    assert endings.refusals(answer("Fine.", "As an AI language model, what are you?"), ()) is None
    assert endings.refusals(Example("s:1", "s", text="As an AI language model, I"), ()) is None


def truncated(text: str):
    return endings.truncated(answer(text), 200)


@pytest.mark.parametrize(
    "text",
    [
        STORY + "She thought of the letter and of",
        STORY + "She thought of the letter, the ring,",
        STORY * 3 + "They went up. Then she opened the",
        STORY * 3 + "They went up the hill. Then they reversed",
        "港は静かだった。二隻の船が岸に着いていた。" * 12 + "男は 網を 直し ながら 海を 見て the",
        "Here it is:\n```python\nprint(1)",
        STORY + "She thought of the letter and of<|endoftext|>",
    ],
    ids=["word", "comma", "long word", "long verb", "cjk", "fence", "special token"],
)
def test_cut_off_answers_are_dropped(text):
    found = truncated(text)
    assert found and found.reason == "truncated"


@pytest.mark.parametrize(
    "text",
    [
        STORY,
        STORY * 3 + "Best regards, Albert Einstein",
        STORY * 3 + "With respect and hope, Your friend in the north",
        STORY * 3 + "It was wonderful, see you there! #love",
        STORY * 3 + "\n- apples and pears\n- bread and butter from the old mill",
        STORY * 3 + "\n\nA title for the next part of the story",
        STORY + "The answer is 42",
        STORY * 3 + "\nfor i in range(10): total += i if i else",
        STORY * 3 + "\nreturn the value that the function is given to",
        "สวัสดีครับ วันนี้อากาศดีมาก เราไปเดินเล่นที่สวนสาธารณะกัน " * 8,
        "no stops here just words that go on and on " * 10 + "and the",
        "The deadliest in the U.S. are on record and the",
        "Here:\n```\nx = 1\n```",
        "Paris",
        "",
    ],
    ids=range(15),
)
def test_whole_answers_are_kept(text):
    assert truncated(text) is None


def test_the_last_answer_counts():
    cut = STORY + "She thought of the letter and of"
    turns = [Message("user", "a"), Message("assistant", cut), Message("user", "b"), Message("assistant", STORY)]
    assert endings.truncated(Example("s:1", "s", tuple(turns)), 200) is None
    assert endings.truncated(Example("s:1", "s", text=cut), 200) is not None
    assert endings.truncated(Example("s:1", "s", (Message("user", cut),)), 200) is None


@given(st.text(max_size=300))
def test_no_text_is_too_odd(text):
    endings.refusals(answer(text), [])
    endings.truncated(answer(text), 1)


@given(st.sampled_from([".", "!", "?", "。", '."', ".)", "…"]))
def test_a_stop_at_the_end_is_an_end(stop):
    assert truncated(STORY * 3 + "And so it ended at the very" + stop) is None
