"""Chats: system merging, the verification sample, control strings."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.records import Example, Message
from finetune.errors import InputError
from finetune.tokenization.answers import Finder
from finetune.tokenization.chat import (
    Chat,
    ControlStrings,
    Renderer,
    Span,
    TemplateRefused,
    chat_of,
    merge_system,
    takes_system,
    turn,
    verification_sample,
)
from finetune.tokenization.rendering import Rendered, render_chat
from finetune.tokenization.template_profile import TemplateProfile

CONTROLS = ControlStrings(["<s>", "</s>", "<|im_end|>", "<|im_end|>x"])


def plain(chat: Chat, generation_prompt: bool = False, tools: object = None) -> tuple[str, list[Span]]:
    text, spans = "<s>", []
    for message in chat:
        start = len(text)
        text += message["content"] + "</s>"
        if message["role"] == "assistant":
            spans.append((start, len(text)))
    return text, spans


def rendered(render: Renderer, chat: Chat) -> Rendered:
    return render_chat(TemplateProfile(render), Finder(CONTROLS.strings, ["</s>"]), CONTROLS, chat)


def test_extra_fields_stand_beside_role_and_content() -> None:
    chat = chat_of([Message("assistant", "hi", '{"name":"bot","role":"ignored"}')])
    assert chat == [{"name": "bot", "role": "assistant", "content": "hi"}]


def test_system_is_merged_into_the_first_user_turn() -> None:
    chat = [turn("system", "Be brief."), turn("user", "Hi"), turn("assistant", "Hello")]
    assert merge_system(chat) == [turn("user", "Be brief.\n\nHi"), turn("assistant", "Hello")]
    assert merge_system(chat[1:]) == chat[1:]


def test_system_without_a_user_turn_cannot_be_merged() -> None:
    with pytest.raises(InputError, match="user turn"):
        merge_system([turn("system", "Be brief."), turn("assistant", "Hello")])


def test_whether_a_template_takes_a_system_message_is_tried_out() -> None:
    def deaf(chat: Chat, generation_prompt: bool = False, tools: object = None) -> tuple[str, list[Span]]:
        return plain([m for m in chat if m["role"] != "system"])

    def strict(chat: Chat, generation_prompt: bool = False, tools: object = None) -> tuple[str, list[Span]]:
        raise TemplateRefused("no system")

    assert takes_system(plain) and not takes_system(deaf) and not takes_system(strict)


def test_the_sample_is_bounded_repeatable_and_holds_unusual_rows() -> None:
    rows = [Example(f"r:{i}", "r", (Message("user", "q"), Message("assistant", "a"))) for i in range(1000)]
    rows[501] = Example("odd", "r", (Message("user", " q"), Message("assistant", "a")))
    rows[502] = Example("raw", "r", text="raw")
    chosen = verification_sample(iter(rows), 20)
    assert len(chosen) == 20 and chosen == verification_sample(rows, 20)
    assert "odd" in {r.id for r in chosen} and "raw" not in {r.id for r in chosen}
    assert max(int(r.id[2:]) for r in chosen if r.id != "odd") > 750
    assert verification_sample([], 20) == [] and len(verification_sample(rows, 1)) == 1


pieces = st.lists(st.sampled_from(["<s>", "</s>", "<|im_end|>", "<", "s>", "x", " ", "\n", "é"]), max_size=8).map(
    "".join
)


@given(pieces, pieces)
def test_hiding_and_sealing_keep_lengths_and_the_typed_text(question: str, answer: str) -> None:
    chat = [turn("user", question), turn("assistant", answer)]
    row = rendered(plain, chat)
    text, spans = plain(chat)
    assert row.text == text and [(a.start, a.end) for a in row.answers] == spans
    if not any(CONTROLS.in_text(s) for s in (question, answer)):
        assert row.sealed is None
        return
    assert row.sealed is not None and len(row.sealed) == len(text)
    back = {name: string for string, name in CONTROLS.names.items()}
    true = [back[name] for name in re.findall("|".join(back), row.sealed)]
    assert true == ["<s>", "</s>", "</s>"]  # the template's own, and no other
    assert all(s in row.sealed for s in (question, answer))


def test_a_template_that_acts_on_a_typed_control_string_is_refused() -> None:
    def reader(chat: Chat, generation_prompt: bool = False, tools: object = None) -> tuple[str, list[Span]]:
        return ("cut", []) if "</s>" in chat[0]["content"] else plain(chat)

    assert rendered(reader, [turn("user", "fine")]).text == "<s>fine</s>"
    with pytest.raises(TemplateRefused, match="control string"):
        rendered(reader, [turn("user", "a</s>b")])


def test_private_characters_beside_a_control_string_are_refused() -> None:
    assert rendered(plain, [turn("user", "\U00100000")]).sealed is None
    with pytest.raises(InputError, match=r"U\+100000"):
        rendered(plain, [turn("user", "\U00100000</s>")])
