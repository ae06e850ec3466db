"""Rewriting a template's source."""

from __future__ import annotations

import pytest

from finetune.tokenization.chat import turn
from finetune.tokenization.chat_template import JinjaRenderer
from finetune.tokenization.generation_markers import has_markers, strip_markers, with_markers
from tests.helpers.base_templates import ALL

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT = [turn("user", "Hi"), turn("assistant", "Yes")]


@pytest.mark.parametrize("name", [n for n in ALL if n != "llama3"])
def test_every_candidate_writes_the_same_text(name) -> None:
    wanted = JinjaRenderer(ALL[name], SPECIAL)(CHAT)[0]
    candidates = with_markers(ALL[name], ["<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>"])
    assert candidates
    for candidate in candidates:
        text, spans = JinjaRenderer(candidate, SPECIAL)(CHAT)
        assert text == wanted and len(spans) == 1


def test_the_answer_ends_with_its_terminator_inside_a_literal() -> None:
    text, spans = JinjaRenderer(with_markers(ALL["chatml_one_literal"], ["<|im_end|>"])[0], SPECIAL)(CHAT)
    assert [text[a:b] for a, b in spans] == ["Yes<|im_end|>"]


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0]['content'] + eos_token }}",  # no loop: whose turn it is cannot be told
        "{% for m in messages %}{{ m.content }}{% endfor %}",  # no terminator
        "{% for m in messages %}{{ m.content + eos_token if m.content else '' }}{% endfor %}",  # not a plain chain
        "{% for m in messages %}{{ m.content + m.content + eos_token }}{% endfor %}",
        ALL["llama3"],  # put together in a variable
    ],
)
def test_what_cannot_be_marked_gives_no_candidates(template) -> None:
    assert with_markers(template, []) == []


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
