"""The template decision, and the proof against what bases themselves write."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.records import Example, Message
from finetune.errors import GateRefused, InputError
from finetune.tokenization.answers import Finder
from finetune.tokenization.audit import lost_text
from finetune.tokenization.chat import TemplateRefused, strip_markers, turn
from finetune.tokenization.chat_template import (
    JinjaRenderer,
    choose_template,
    fingerprint_of,
    named_templates,
    sha256,
    template_text,
)
from tests.helpers.base_templates import ALL, kind_of
from tests.helpers.row_workers import learned, one, worker
from tests.helpers.tiny_tokenizers import BYTE_SPECIAL, build

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
ENDS = ("</s>", "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")
turns = st.lists(st.tuples(texts, texts), min_size=1, max_size=3)


FINDER = Finder([*BYTE_SPECIAL, "<s>", "</s>"], BYTE_SPECIAL)


def found(render: JinjaRenderer, chat: list) -> list[tuple[int, int]]:
    """Where the answers are by rendering alone; none of the chat's words is lost."""
    done = FINDER.find(lambda turns, prompt: (render(turns, prompt)[0], []), chat)
    assert lost_text(done.text, done.answers, chat) is None and done.own and not done.added
    assert all(a.ends and not a.masked and a.border == a.start for a in done.answers)
    return [(a.start, a.end) for a in done.answers]


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
    assert ours(chat)[1][-1][0] == len(ours(chat[:-1], True)[0])
    assert found(ours, chat) == found(theirs, chat) == ours(chat)[1]


def test_an_empty_answer_ends_before_what_the_template_writes_at_the_end_of_a_text() -> None:
    render = JinjaRenderer(ALL["phi3"], build("byte_level").special_tokens_map)
    assert render([turn("user", "q"), turn("assistant", "")])[0].endswith("<|end|>\n<|end_of_text|>")
    for answers in ([""], ["", ""], ["a", "", "b"]):
        chat = [m for a in answers for m in (turn("user", "q"), turn("assistant", a))]
        text = render(chat)[0]
        assert [text[a:b] for a, b in found(render, chat)] == [f"{a}<|end|>" for a in answers]


@pytest.mark.parametrize("name", ["qwen2.5", "llama3.1"])
@pytest.mark.parametrize("system", [None, " Be brief. "])
def test_calls_and_their_results_are_written_as_the_base_writes_them(name, system) -> None:
    special = build("byte_level").special_tokens_map
    ours, theirs = JinjaRenderer(template_text(name, None), special), JinjaRenderer(ALL[EQUAL[name]], special)
    chat = [turn("user", "Look."), CALL, turn("tool", '22 "C"'), turn("tool", "é"), turn("assistant", " Blue. ")]
    chat = [turn("system", system)] * (system is not None) + chat
    text, spans = ours(chat)
    assert text == theirs(chat)[0] and ours(chat[:-1], True)[0] == theirs(chat[:-1], True)[0]
    assert found(ours, chat) == found(theirs, chat) == spans
    assert "look" in text[slice(*spans[0])] and "22" not in text[slice(*spans[0])]


@pytest.mark.parametrize(
    "name", ["mistral", "mistral-v3", "mistral-tekken", "llama2", "zephyr", "phi3", "gemma2", "alpaca"]
)
def test_a_template_without_a_place_for_calls_does_not_lose_them_unseen(name) -> None:
    render = JinjaRenderer(template_text(name, None), {"bos_token": "<s>", "eos_token": "</s>"})
    with pytest.raises(TemplateRefused):
        render([turn("user", "Look."), CALL, turn("tool", "22"), turn("assistant", "Blue.")])
    chat = [turn("user", "Look."), CALL]
    done = FINDER.find(lambda turns, prompt: render(turns, prompt), chat)
    assert "call of look" in str(lost_text(done.text, done.answers, chat))


def test_auto_finds_calls_where_the_base_writes_them() -> None:
    message = Message("assistant", "", '{"tool_calls":[{"function":{"arguments":{"at":"sea"},"name":"look"}}]}')
    said = Example(
        "r:9", "r", (Message("user", "Look."), message, Message("tool", "22"), Message("assistant", "Blue."))
    )
    tokenizer = build("byte_level", ALL["qwen_tools"])
    chosen = choose_template("auto", None, tokenizer, [*ROWS, said])
    assert (chosen.name, chosen.training, chosen.inference) == ("base", ALL["qwen_tools"], ALL["qwen_tools"])
    call, answer = learned(tokenizer, one(worker(tokenizer, chosen), said)[0])
    assert call == '<tool_call>\n{"name": "look", "arguments": {"at": "sea"}}\n</tool_call><|im_end|>'
    assert answer == "Blue.<|im_end|>"


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
    chosen = choose_template("auto", None, tokenizer, ROWS)
    assert (chosen.name, chosen.training, chosen.inference) == ("base", ALL[name], ALL[name])
    known = ("mistral_first", "mistral_card", "mistral_v3", "mistral_tekken", "gemma2")
    assert chosen.profile.takes_system == (name not in known)
    for text in learned(tokenizer, one(worker(tokenizer, chosen), example(1, "the sea", "Paris", "sea", "blue"))[0]):
        assert text.strip().removeprefix("Paris").removeprefix("blue").strip() in ENDS


def test_the_tiny_builtin_template_works() -> None:
    from finetune.tiny.model import CHAT_TEMPLATE

    tokenizer = build("unigram", CHAT_TEMPLATE)
    chosen = choose_template("auto", None, tokenizer, ROWS)
    assert (chosen.name, chosen.training, chosen.inference) == ("base", CHAT_TEMPLATE, CHAT_TEMPLATE)
    (text,) = learned(tokenizer, one(worker(tokenizer, chosen), example(1, "the sea", "the sea"))[0])
    assert text.replace(" ", "") == "thesea</s>"


def test_a_base_with_markers_keeps_its_template() -> None:
    own = template_text("zephyr", None)
    chosen = choose_template("auto", None, build("unigram", own), ROWS)
    assert (chosen.training, chosen.inference, chosen.name) == (own, own, "base")
    assert chosen.digest == sha256(own)


def test_a_base_without_template_is_refused_with_the_names() -> None:
    with pytest.raises(GateRefused, match=r"alpaca, chatml, gemma2, llama2, llama3, llama3\.1, mistral, mistral-t"):
        choose_template("auto", None, build("metaspace"), ROWS)


def test_a_template_without_an_end_is_refused() -> None:
    strange = "{% for m in messages %}{% set x = m.role ~ ': ' ~ m.content %}{{ x }}{{ '\n' }}{% endfor %}"
    with pytest.raises(GateRefused, match=r"template base: .*no token that ends an answer.*alpaca and mistral"):
        choose_template("auto", None, build("metaspace", strange), ROWS)
    ended = strange.replace("m.content %}", "m.content ~ '</s>' %}")
    chosen = choose_template("auto", None, build("metaspace", ended), ROWS)
    made, _ = one(worker(build("metaspace"), chosen), ROWS[0])
    assert [t.strip() for t in learned(build("metaspace"), made)] == ["assistant: Hello.</s>"]  # nothing asks for it


@pytest.mark.parametrize("name", list(EQUAL))
def test_a_named_template_travels_without_its_markers(name) -> None:
    tokenizer = build(kind_of(name))
    chosen = choose_template(name, None, tokenizer, ROWS)
    assert chosen.training == template_text(name, None)
    assert chosen.inference == strip_markers(chosen.training) and "generation -" not in chosen.inference
    with_, without = (JinjaRenderer(t, tokenizer.special_tokens_map) for t in (chosen.training, chosen.inference))
    chat = [turn("user", " q"), turn("assistant", "a "), turn("user", "r"), turn("assistant", "b")]
    assert with_(chat)[0] == without(chat)[0]


def test_a_file_without_markers_stays_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(ALL["chatml"], encoding="utf-8")
    chosen = choose_template("mine.jinja", file, build("byte_level"), ROWS)
    assert chosen.name == "mine.jinja" and chosen.inference == chosen.training == ALL["chatml"]


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(InputError, match=r"'mistrl'; allowed are auto, alpaca.*\.jinja"):
        fingerprint_of("mistrl", None)


def test_editing_a_template_changes_the_fingerprint(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("a", encoding="utf-8")
    before = fingerprint_of("mine.jinja", file)
    file.write_text("b", encoding="utf-8")
    assert fingerprint_of("mine.jinja", file) != before
    assert fingerprint_of("auto", None) == {}  # the base's own is part of the base


def test_a_template_may_refuse_a_chat_but_not_run_code() -> None:
    with pytest.raises(TemplateRefused, match="alternate"):
        JinjaRenderer(template_text("mistral", None), {})([turn("assistant", "a")])
    with pytest.raises(TemplateRefused):
        JinjaRenderer("{{ messages.__class__.__mro__ }}", {})([turn("user", "a")])
