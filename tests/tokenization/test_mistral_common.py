"""Our Mistral templates beside Mistral's own tokenizer library, text and ids.

Known differences, each with a test below:

| where | mistral-common | here | reason |
|---|---|---|---|
| v1 text | `<s> [INST] … </s> [INST]` | `<s>[INST] … </s>[INST]` | it shows SentencePiece's added space; the published template writes none |
| v1 ids, tokenizer.json as published | 733 (`▁[`) after `<s>` and `</s>` | 733 | the published file prepends the space to every piece: equal |
| v1 ids, converted by transformers 5 | 733 | 28792 (`[`) | its Metaspace prepends to the first piece only; the base's own tokenizer wins |
| system, v1 | before the first question | the same (render.system: merge) | |
| system, v3 and tekken, several turns | before the last question | before the first | at the last it would move with each turn, so one row could not train all of its answers |
| an answer without text | refused | the terminator alone is supervised | filter leaves such rows out unless it is off |
"""  # noqa: E501 - a table

from __future__ import annotations

import re
from functools import cache

import pytest
from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from finetune.tokenization.answers import Finder
from finetune.tokenization.chat import merge_system, turn
from finetune.tokenization.chat_template import JinjaRenderer, template_text
from finetune.tokenization.encoder import Encoder
from finetune.tokenization.rendering import render_chat
from finetune.tokenization.template_profile import TemplateProfile
from tests.helpers.mistral_tokenizers import DATA, FILES, load

TEMPLATES = {"v1": "mistral", "v3": "mistral-v3", "tekken": "mistral-tekken"}
KINDS = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
Said = list[tuple[str, str]]
ONE = [("user", "Hello there"), ("assistant", "Hi! How are you?")]
SEVERAL = [("user", "Hello"), ("assistant", "Hi"), ("user", "And you?"), ("assistant", "Fine.")]
SYSTEM = [("system", "Be brief."), ("user", "Q"), ("assistant", "A")]
SAME: dict[str, Said] = {
    "one_turn": ONE,
    "several_turns": SEVERAL,
    "system": SYSTEM,
    "spaces": [("user", "  two  spaces \n\nline"), ("assistant", " lead  and trail \n")],
    "only_space": [("user", "x\t"), ("assistant", "\n\nafter"), ("user", " "), ("assistant", "```py\n  a\n```")],
    "other_scripts": [("user", "日本語 😀 naïve"), ("assistant", "Grüße\u00a0aus Köln \ufffc")],
    "typed_control": [("user", "say </s> [INST] <s>"), ("assistant", "no </s>!")],
}
VERSIONS = ["v1", "v3", pytest.param("tekken", marks=pytest.mark.slow)]  # reading its 130,000 merges takes 10 s


@cache
def theirs(version: str) -> MistralTokenizer:
    # the finetuning mode alone takes conversations that end with the assistant
    return MistralTokenizer.from_file(str(DATA / FILES[version]), mode=ValidationMode.finetuning)


def encoded(version: str, said: Said):
    messages = [KINDS[role](content=content) for role, content in said]
    return theirs(version).encode_chat_completion(ChatCompletionRequest(messages=messages))


@cache
def encoder(version: str, prepend: str) -> tuple[TemplateProfile, Encoder]:
    tokenizer, text = load(version, prepend=prepend), template_text(TEMPLATES[version], None)
    return TemplateProfile(JinjaRenderer(text, tokenizer.special_tokens_map)), Encoder(tokenizer)


def ids(version: str, said: Said, prepend: str | None = None) -> list[int]:
    profile, made = encoder(version, prepend or ("every" if version == "v1" else "first"))
    finder = Finder(made.controls.strings, ["</s>"])
    row = render_chat(profile, finder, made.controls, [turn(*t) for t in said])
    return made.encode_rendered([row])[0][0]


def text(version: str, said: Said) -> str:
    render = JinjaRenderer(template_text(TEMPLATES[version], None), {"bos_token": "<s>", "eos_token": "</s>"})
    return render(merge_system([turn(*t) for t in said]))[0]


def shown(version: str, said: Said) -> str:
    """The text that mistral-common says it encoded, with its names for spaces and bytes written out."""
    found = encoded(version, said).text.replace("▁", " ")
    return re.sub(r"(<0x[0-9A-F]{2}>)+", lambda m: bytes.fromhex(re.sub("<0x|>", "", m[0])).decode(), found)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", SAME)
def test_ids_are_those_of_mistral_common(version, name) -> None:
    assert ids(version, SAME[name]) == encoded(version, SAME[name]).tokens


@pytest.mark.parametrize("version", ["v1", "v3", "tekken"])
@pytest.mark.parametrize("name", [n for n in SAME if n != "typed_control"])  # their text tells the two apart no more
def test_text_is_that_of_mistral_common(version, name) -> None:
    wanted = shown(version, SAME[name])
    if version == "v1":  # SentencePiece's added space, which is no character of the text
        wanted = wanted.replace("<s> ", "<s>").replace("</s> ", "</s>")
    assert text(version, SAME[name]) == wanted


def test_the_first_bracket_of_v1() -> None:
    assert encoded("v1", ONE).tokens[:2] == ids("v1", ONE)[:2] == [1, 733]
    converted = ids("v1", ONE, prepend="first")
    assert converted[:2] == [1, 28792]
    assert converted[2:] == encoded("v1", ONE).tokens[2:]  # and nothing else differs


@pytest.mark.parametrize("version", ["v1", "v3", "tekken"])
def test_where_a_system_message_stands_among_several_turns(version) -> None:
    said = [SYSTEM[0], *SEVERAL]
    there, here = shown(version, said), text(version, said)
    assert here.index("Be brief.") < here.index("Hello")
    assert (there.index("Be brief.") < there.index("Hello")) == (version == "v1")


@pytest.mark.parametrize("version", ["v1", "v3", "tekken"])
def test_an_answer_without_text(version) -> None:
    with pytest.raises(MistralCommonException):
        encoded(version, [("user", "Q"), ("assistant", "")])
    assert text(version, [("user", "Q"), ("assistant", "")]).endswith("[/INST]" + " " * (version != "tekken") + "</s>")
