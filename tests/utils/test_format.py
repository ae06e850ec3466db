"""Figures with their units, and text in which no character hides."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.utils.format import clipped, duration, interval, number, percent, size, visible


@settings(deadline=None)
@given(st.text(alphabet=st.characters(codec=None), max_size=40))
def test_visible_text_can_be_written_and_holds_no_control(text) -> None:
    shown = visible(text)
    shown.encode()
    assert not [c for c in shown if (ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0 or ord(c) in (0x202E,)]
    assert visible(shown) == shown


def test_visible_leaves_plain_text_alone() -> None:
    assert visible("a\tb\nç日本 \U0001f600") == "a\tb\nç日本 \U0001f600"
    assert visible("\0\x1b\x7f\ud800\u202e") == "␀␛␡\ufffd⟨U+202E⟩"


@pytest.mark.parametrize(
    ("form", "value", "words"),
    [
        (number, None, "–"),
        (number, True, "yes"),
        (number, 11434, "11,434"),
        (number, 4399.8, "4,400"),
        (percent, 0.99999, "> 99.9 %"),
        (percent, 0.0001, "< 0.1 %"),
        (percent, None, "–"),
        (size, 1_090_846_720, "1.09 GB"),
        (size, 12, "12 bytes"),
        (duration, 59.96, "1 min 00 s"),
        (duration, 11100, "3 h 05 min"),
        (interval, [0.5, 2], "0.5 to 2"),
        (interval, None, "–"),
    ],
    ids=lambda v: getattr(v, "__name__", None) or str(v),
)
def test_forms(form, value, words) -> None:
    assert form(value) == words


def test_clipped_says_how_much_is_missing() -> None:
    assert clipped("abc", 3) == "abc"
    assert clipped("a" * 1200, 100) == "a" * 100 + " … (1,100 more characters)"
