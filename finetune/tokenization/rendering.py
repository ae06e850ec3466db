"""Rows to text: a conversation under a template, with what a person typed kept apart from what the template wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.tokenization.answers import Answer, Finder
from finetune.tokenization.chat import Chat, ControlStrings, Span, TemplateRefused
from finetune.tokenization.template_profile import TemplateProfile


@dataclass(frozen=True, slots=True)
class Rendered:
    """One row as text.

    `sealed` is a text of the same length in which the template's control strings go by private names (see
    ControlStrings), or None when the plain text holds no control string but the template's own. `answers`, `blocks`,
    `own` and `added` are those of answers.Conversation; `chat` is the conversation in the template's form.
    """

    text: str
    answers: tuple[Answer, ...] = ()
    blocks: tuple[Span, ...] = ()
    own: bool = True
    added: str = ""
    sealed: str | None = None
    chat: Chat | None = None


def render_chat(
    profile: TemplateProfile,
    finder: Finder,
    controls: ControlStrings,
    chat: Chat,
    tools: Sequence[Any] | None = None,
) -> Rendered:
    """Render a conversation and find its answers; no typed control string can become a control token.

    Raises TemplateRefused if the template refuses the chat, loses an answer, or acts on a control string inside a
    message (then the text with placeholders is not the plain text, and no position can be trusted).
    """
    chat = profile.adapt(chat)
    keep = profile.reasoning == "keep"
    if not controls.in_chat([*chat, *(tools or ())]):
        located = finder.find(lambda turns, prompt: profile.write(turns, prompt, tools), chat, keep)
        return Rendered(located.text, located.answers, located.blocks, located.own, located.added, chat=chat)
    hidden = controls.hide(chat)
    hidden_tools = controls.hide(list(tools)) if tools else None

    def write(turns: Chat, prompt: bool) -> tuple[str, list[Span]]:
        return profile.write(turns, prompt, hidden_tools)

    if controls.show(write(hidden, False)[0]) != profile.write(chat, False, tools)[0]:
        raise TemplateRefused("the template changes what it writes when a message holds a control string")
    located = finder.find(write, hidden, keep)
    sealed = controls.seal(located.text)
    return Rendered(
        controls.show(located.text), located.answers, located.blocks, located.own, located.added, sealed, chat
    )


def render_prompt(
    profile: TemplateProfile, controls: ControlStrings, chat: Chat, tools: Sequence[Any] | None = None
) -> Rendered:
    """Render what inference feeds the model: `chat` with the generation prompt behind it. Raises TemplateRefused."""
    chat = profile.adapt(chat)
    text = profile.write(chat, True, tools)[0]
    if not controls.in_chat([*chat, *(tools or ())]):
        return Rendered(text, chat=chat)
    hidden = profile.write(controls.hide(chat), True, controls.hide(list(tools)) if tools else None)[0]
    if controls.show(hidden) != text:
        raise TemplateRefused("the template changes what it writes when a message holds a control string")
    return Rendered(text, sealed=controls.seal(hidden), chat=chat)
