"""The chat template and the terminators in a GGUF file, compared with those that were trained.

The file's template is rendered as llama.cpp does it: with plain Jinja and the token strings of the file's own metadata.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finetune.gguf.writer import read_facts
from finetune.tokenization.chat_template import TEMPLATE_FAULTS
from finetune.tokenization.template_sandbox import RenderingTooLong, limited

Chat = Sequence[dict[str, Any]]
Render = Callable[[Chat], str]  # raises ValueError if the template refuses the conversation
SYSTEM, ASKED = {"role": "system", "content": "Be brief."}, {"role": "user", "content": " What is 2 + 2?\n"}
TURNS = (ASKED, {"role": "assistant", "content": '4, "four".'}, {"role": "user", "content": "And \u65e5\u672c <s>?"})
CHATS: tuple[Chat, ...] = ((ASKED,), TURNS, (SYSTEM, ASKED), (SYSTEM, *TURNS))


def differences(path: Path, ours: Render | None, terminators: Sequence[int]) -> Iterator[str]:
    """Yield a sentence for each difference of the file at `path` from what was trained.

    Args:
        path: a GGUF file.
        ours: renders a conversation with the prompt for an answer; None if the model has no template.
        terminators: token ids that end an answer. The format has keys for three of them.
    """
    facts = read_facts(path)
    if missing := sorted(set(terminators[:3]) - set(facts["terminators"])):
        yield f"token {missing[0]} ends an answer, and its metadata ends at {facts['terminators']}"
    if (ours is None) != (facts["template"] is None):
        yield "it has a chat template and the model has none" if ours is None else "it has no chat template"
    elif ours is not None:
        theirs = _renderer(facts)
        for chat in CHATS:
            expected, actual = _attempt(ours, chat), _attempt(theirs, chat)
            if expected != actual:
                yield f"its chat template writes {_near(actual, expected)} instead of {_near(expected, actual)}"
                return


def _attempt(render: Render, chat: Chat) -> str:
    try:
        return render(chat)
    except TEMPLATE_FAULTS:  # ValueError among them
        return "nothing (it refuses the conversation)"


def _near(text: str, other: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    return repr(text[max(0, at - 10) : at + 30])


def _renderer(facts: dict[str, Any]) -> Render:
    class Generation(Extension):
        """The marker of answers: its content is written as if it had no marker."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def as_json(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    jinja.filters["tojson"] = as_json
    jinja.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}

    def render(chat: Chat) -> str:
        try:
            with limited(len(chat)):
                made = jinja.from_string(facts["template"])
                return made.render(messages=list(chat), add_generation_prompt=True, tools=None, **facts["strings"])
        except (TemplateError, RenderingTooLong) as error:
            raise ValueError(str(error)) from error

    return render
