"""Texts that templates wrote come back as the turns they were written from; what cannot be proved is refused.

The texts are written by jinja from real templates, which share nothing with the patterns that read them.
"""

from __future__ import annotations

from pathlib import Path

import jinja2
import jinja2.ext
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.chat_text import parse_chat_text
from finetune.data.records import Message
from finetune.data.values import RowError

TEMPLATES = Path(__file__).parents[2] / "recipes" / "templates"
WRITTEN = {
    "chatml": TEMPLATES / "chatml.jinja",
    "llama3": TEMPLATES / "llama3.jinja",
    "gemma2": TEMPLATES / "gemma2.jinja",
    "zephyr": TEMPLATES / "zephyr.jinja",
    "alpaca": TEMPLATES / "alpaca.jinja",
}
MARKS = {"bos_token": "<s>", "eos_token": "</s>"}
MARKS_OF = {"gemma2": {"bos_token": "<bos>"}, "llama3": {"bos_token": "<|begin_of_text|>"}, "alpaca": {"bos_token": ""}}
WORDS = st.text(st.sampled_from("ab é\n.,:#<>|/"), min_size=1, max_size=20).map(str.strip).filter(bool)


class Generation(jinja2.ext.Extension):
    """`{% generation %}` writes what is inside."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def write(template: str, messages: list[dict[str, str]]) -> str:
    environment = jinja2.Environment(extensions=[Generation, "jinja2.ext.loopcontrols"], autoescape=False)
    return environment.from_string(WRITTEN[template].read_text()).render(
        messages=messages, **{**MARKS, **MARKS_OF.get(template, {})}
    )


@pytest.mark.parametrize("template", WRITTEN)
@settings(max_examples=60, deadline=None)
@given(turns=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
def test_what_a_template_wrote_is_read_back_or_refused(template: str, turns: list[tuple[str, str]]) -> None:
    messages = [{"role": r, "content": t} for pair in turns for r, t in zip(("user", "assistant"), pair, strict=True)]
    try:
        found = parse_chat_text(write(template, messages))
    except RowError:
        assert any(mark in t for pair in turns for t in pair for mark in ("<", "|", "#"))
        return
    assert found is not None
    if not any("#" in t for pair in turns for t in pair):
        assert found[1] == tuple(Message(m["role"], m["content"]) for m in messages)


@pytest.mark.parametrize(
    "text",
    [
        "once <|im_start|> upon",
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho <|im_start|>user\nx<|im_end|>\n<|im_end|>\n",
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\nand more",
        "<|im_start|>judge\nhi<|im_end|>\n",
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n<|im_start|>user\nhi<|im_end|><|im_start|>assistant\nho<|im_end|>\n",
        "<|start|>user<|message|>hi<|end|>",
        "[INST] a [/INST] b [/INST] c",
        "hello [/INST] there",
        "### Instruction:\nhi\n\n### Response:\nho\n\n### Response:\nha",
        "<|user|>\nhi <|im_start|> there</s>\n<|assistant|>\nho</s>\n",
    ],
)
def test_control_tokens_that_prove_nothing_are_refused(text: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_chat_text(text)
    assert caught.value.reason in ("control_tokens", "llama2")


@pytest.mark.parametrize(
    "text",
    ["once upon", "a | b <| c |> d", "doc<|endoftext|>", "Human: a story", "see ### Instruction: below", "x[INSTALL]"],
)
def test_documents_stay_documents(text: str) -> None:
    assert parse_chat_text(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "### Human: hi### Assistant: ho",
        "### Human: hi\n### Assistant: ho",
        "\n\nHuman: hi\n\nAssistant: ho",
        "USER: hi ASSISTANT: ho</s>",
        "### Instruction:\nhi\n\n### Response:\nho",
        "<s>[INST] hi [/INST] ho </s>",
        "<|user|>\nhi\n<|assistant|>\nho<|endoftext|>\n",
        "<|user|>hi<|end|><|assistant|>ho<|end|>",
        "<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜>ho<｜end▁of▁sentence｜>",
        "<|start_of_role|>user<|end_of_role|>hi<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>ho<|end_of_text|>\n",
        "<|im_start|>user<|im_sep|>hi<|im_end|><|im_start|>assistant<|im_sep|>ho<|im_end|>",
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho",
    ],
)
def test_notations(text: str) -> None:
    found = parse_chat_text(text)
    assert found is not None and found[1] == (Message("user", "hi"), Message("assistant", "ho"))
