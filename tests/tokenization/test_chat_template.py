"""The template decision, and the proof against what bases themselves write."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.records import Example, Message
from finetune.errors import GateRefused, InputError
from finetune.tokenization.audit import lost_turn, marking_problem
from finetune.tokenization.chat import TemplateRefused, turn
from finetune.tokenization.chat_template import (
    JinjaRenderer,
    choose_template,
    fingerprint_of,
    named_templates,
    sha256,
    template_text,
)
from finetune.tokenization.generation_markers import has_markers, strip_markers
from tests.helpers.base_templates import ALL, kind_of
from tests.helpers.tiny_tokenizers import build

EQUAL = {  # ours -> what the family's bases ship
    "mistral": "mistral_card",
    "mistral-v3": "mistral_v3",
    "mistral-tekken": "mistral_tekken",
    "llama2": "llama2",
    "llama3": "llama3",
    "llama3.1": "llama3.1",
    "chatml": "chatml",
    "qwen2.5": "qwen_tools",
    "gemma2": "gemma2",
    "phi3": "phi3",
    "zephyr": "zephyr",
}
WITHOUT_SYSTEM = ("mistral", "mistral-v3", "mistral-tekken", "gemma2")
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "look", "arguments": {"at": 'the "sea" é'}}}],
}
texts = st.text(st.sampled_from("ab \n<>[]/"), max_size=12)
turns = st.lists(st.tuples(texts, texts), min_size=1, max_size=3)


def example(number: int, *contents: str, system: str | None = None) -> Example:
    said = [Message(("user", "assistant")[i % 2], c) for i, c in enumerate(contents)]
    return Example(f"r:{number}", "r", tuple([Message("system", system)] * (system is not None) + said))


ROWS = [example(1, "Hi", "Hello."), example(2, " a ", "b\n", "c", " d"), example(3, "x", "y", system="Be brief.")]


def test_each_but_alpaca_has_a_base_to_be_compared_with() -> None:
    assert set(named_templates()) == {*EQUAL, "alpaca"}


@pytest.mark.parametrize("name", EQUAL)
@settings(max_examples=40, deadline=None)
@given(said=turns, system=st.none() | texts)
def test_ours_write_byte_for_byte_what_the_base_writes(name, said, system) -> None:
    special = build(kind_of(name)).special_tokens_map
    ours, theirs = JinjaRenderer(template_text(name, None), special), JinjaRenderer(ALL[EQUAL[name]], special)
    chat = [m for q, a in said for m in (turn("user", q), turn("assistant", a))]
    if system is not None and name not in WITHOUT_SYSTEM:
        chat.insert(0, turn("system", system))
    assert ours(chat)[0] == theirs(chat)[0]
    assert ours(chat[:-1], True)[0] == theirs(chat[:-1], True)[0]
    assert marking_problem(*ours(chat), chat) is None
    assert ours(chat)[1][-1][0] == len(ours(chat[:-1], True)[0])


@pytest.mark.parametrize("name", ["qwen2.5", "llama3.1"])
@pytest.mark.parametrize("system", [None, " Be brief. "])
def test_calls_and_their_results_are_written_as_the_base_writes_them(name, system) -> None:
    special = build("byte_level").special_tokens_map
    ours, theirs = JinjaRenderer(template_text(name, None), special), JinjaRenderer(ALL[EQUAL[name]], special)
    chat = [turn("user", "Look."), CALL, turn("tool", '22 "C"'), turn("tool", "é"), turn("assistant", " Blue. ")]
    chat = [turn("system", system)] * (system is not None) + chat
    text, spans = ours(chat)
    assert text == theirs(chat)[0] and ours(chat[:-1], True)[0] == theirs(chat[:-1], True)[0]
    assert marking_problem(text, spans, chat) is None and lost_turn(text, spans, chat) is None
    assert "look" in text[slice(*spans[0])] and "22" not in text[slice(*spans[0])]


@pytest.mark.parametrize(
    "name", ["mistral", "mistral-v3", "mistral-tekken", "llama2", "zephyr", "phi3", "gemma2", "alpaca"]
)
def test_a_template_without_a_place_for_calls_does_not_lose_them_unseen(name) -> None:
    render = JinjaRenderer(template_text(name, None), {"bos_token": "<s>", "eos_token": "</s>"})
    with pytest.raises(TemplateRefused):
        render([turn("user", "Look."), CALL, turn("tool", "22"), turn("assistant", "Blue.")])
    chat = [turn("user", "Look."), CALL]
    assert "call of look" in str(lost_turn(*render(chat), chat))


def test_auto_marks_calls_by_our_template_where_the_base_writes_them() -> None:
    message = Message("assistant", "", '{"tool_calls":[{"function":{"arguments":{"at":"sea"},"name":"look"}}]}')
    said = (Message("user", "Look."), message, Message("tool", "22"), Message("assistant", "Blue."))
    tokenizer = build("byte_level", ALL["qwen_tools"])
    chosen = choose_template("auto", None, tokenizer, [*ROWS, Example("r:9", "r", said)], merge=True)
    assert chosen.name == "base, marked as qwen2.5" and chosen.inference == ALL["qwen_tools"]


def test_alpaca_writes_the_published_prompt() -> None:
    render = JinjaRenderer(template_text("alpaca", None), {"bos_token": "<s>", "eos_token": "</s>"})
    text, spans = render([turn("user", "Add 1 and 2."), turn("assistant", "3")])
    assert text == (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd 1 and 2.\n\n### Response:\n3</s>"
    )
    assert [text[a:b] for a, b in spans] == ["3</s>"]


@pytest.mark.parametrize("name", ALL)
def test_auto_finds_the_assistants_text_in_every_base(name) -> None:
    tokenizer = build(kind_of(name), ALL[name])
    chosen = choose_template("auto", None, tokenizer, ROWS, merge=True)
    assert chosen.inference == ALL[name] and has_markers(chosen.training)
    assert chosen.system == (name not in ("mistral_first", "mistral_card", "mistral_v3", "mistral_tekken", "gemma2"))
    assert chosen.name == ("base, marked as llama3" if name == "llama3" else "base")
    render = JinjaRenderer(chosen.training, tokenizer.special_tokens_map)
    text, spans = render([turn("user", "Hi"), turn("assistant", "Hello.")])
    assert text[spans[0][0] : spans[0][1]].strip().removeprefix("Hello.").strip() in (
        "</s>",
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<end_of_turn>",
    )


def test_the_tiny_builtin_template_is_marked() -> None:
    from finetune.tiny.model import CHAT_TEMPLATE

    chosen = choose_template("auto", None, build("unigram", CHAT_TEMPLATE), ROWS, merge=True)
    assert chosen.name == "base" and chosen.inference == CHAT_TEMPLATE and has_markers(chosen.training)


def test_a_base_with_markers_keeps_its_template() -> None:
    own = template_text("zephyr", None)
    chosen = choose_template("auto", None, build("unigram", own), ROWS, merge=True)
    assert (chosen.training, chosen.inference, chosen.name) == (own, own, "base")
    assert chosen.digest == sha256(own)


def test_a_base_without_template_is_refused_with_the_names() -> None:
    with pytest.raises(GateRefused, match=r"alpaca, chatml, gemma2, llama2, llama3, llama3\.1, mistral, mistral-t"):
        choose_template("auto", None, build("metaspace"), ROWS, merge=True)


def test_a_template_that_nothing_matches_is_refused_with_reasons() -> None:
    strange = "{% for m in messages %}{% set x = m.role ~ ': ' ~ m.content %}{{ x }}{{ '\n' }}{% endfor %}"
    with pytest.raises(GateRefused, match=r"(?s)alpaca.*marked as mistral: row r:1 differs"):
        choose_template("auto", None, build("metaspace", strange), ROWS, merge=False)


def test_markers_in_the_wrong_place_are_not_proved() -> None:
    # the generation prompt holds a word that the template does not write before an answer
    wrong = ALL["chatml"].replace("assistant\n' }}{% endif", "assistant\n<think>' }}{% endif")
    with pytest.raises(GateRefused, match="generation prompt"):
        choose_template("auto", None, build("byte_level", wrong), ROWS, merge=True)


@pytest.mark.parametrize("name", list(EQUAL))
def test_a_named_template_travels_without_its_markers(name) -> None:
    tokenizer = build(kind_of(name))
    chosen = choose_template(name, None, tokenizer, ROWS, merge=True)
    assert chosen.training == template_text(name, None)
    assert chosen.inference == strip_markers(chosen.training) and "generation -" not in chosen.inference
    with_, without = (JinjaRenderer(t, tokenizer.special_tokens_map) for t in (chosen.training, chosen.inference))
    chat = [turn("user", " q"), turn("assistant", "a "), turn("user", "r"), turn("assistant", "b")]
    assert with_(chat)[0] == without(chat)[0]


def test_a_file_without_markers_gets_them(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(ALL["chatml"], encoding="utf-8")
    chosen = choose_template("mine.jinja", file, build("byte_level"), ROWS, merge=True)
    assert chosen.name == "mine.jinja" and chosen.inference == ALL["chatml"] and has_markers(chosen.training)


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(InputError, match=r"'mistrl'; allowed are auto, alpaca.*\.jinja"):
        fingerprint_of("mistrl", None)


def test_editing_a_template_changes_the_fingerprint(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("a", encoding="utf-8")
    before = fingerprint_of("mine.jinja", file)
    file.write_text("b", encoding="utf-8")
    assert fingerprint_of("mine.jinja", file) != before
    assert set(fingerprint_of("auto", None)["templates"]) == set(named_templates())


def test_a_template_may_refuse_a_chat_but_not_run_code() -> None:
    with pytest.raises(TemplateRefused, match="alternate"):
        JinjaRenderer(template_text("mistral", None), {})([turn("assistant", "a")])
    with pytest.raises(TemplateRefused):
        JinjaRenderer("{{ messages.__class__.__mro__ }}", {})([turn("user", "a")])
