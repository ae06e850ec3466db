"""Generation markers of a template: found, and taken out."""

from __future__ import annotations

import pytest

from finetune.tokenization.chat import has_markers, strip_markers, turn
from finetune.tokenization.chat_template import JinjaRenderer

CHAT = [turn("user", "Hi"), turn("assistant", "Yes")]


@pytest.mark.parametrize(
    ("marked", "bare"),
    [
        ("a {%- generation -%} b {%- endgeneration %}\nc", "abc"),
        ("x{% generation %}\ny\n  {% endgeneration %}\nz", "xy\nz"),
        ("x {% generation %}y{% endgeneration -%}\n z", "x yz"),
    ],
)
def test_markers_are_stripped_as_jinja_would(marked, bare) -> None:
    assert has_markers(marked) and not has_markers(bare)
    assert strip_markers(marked) == bare
    assert JinjaRenderer(marked, {})(CHAT)[0] == JinjaRenderer(bare, {})(CHAT)[0]
