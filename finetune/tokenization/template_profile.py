"""Ask a chat template how it takes its input: list content, calls, reasoning, a system message.

Nothing here reads the template's source. Each question is a short made-up conversation; the answer is what the
rendering holds.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from finetune.errors import InputError
from finetune.tokenization.chat import (
    Chat,
    Renderer,
    Span,
    TemplateRefused,
    has_calls,
    merge_system,
    reasoning_of,
    takes_system,
    text_of,
    without_reasoning,
)

Reasoning = Literal["auto", "keep", "last", "strip"]
QUESTION, ANSWER, THOUGHT = "question-5b1e", "answer-90ad", "thought-2c7f"
CALL = {"name": "probe_tool", "arguments": {"probe_key": "probe-value"}}
CALL_FORMS = tuple(itertools.product(("object", "text"), ("", None)))


@dataclass
class TemplateProfile:
    """A template and the form in which it takes turns.

    `render` writes rows without tools, `tool_render` (a base may have two templates) rows with tools. `system` says
    what happens to a system message the template has no place for.
    """

    render: Renderer
    tool_render: Renderer | None = None
    system: Literal["merge", "refuse"] = "merge"
    reasoning: Reasoning = "auto"
    _tools_default: list[Any] | None = field(default=None, init=False)
    _listed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._settle()

    def write(
        self, chat: Chat, generation_prompt: bool = False, tools: Sequence[Any] | None = None
    ) -> tuple[str, list[Span]]:
        """Render a chat that `adapt` has returned. Raises TemplateRefused."""
        render = self.tool_render if tools and self.tool_render else self.render
        return render(chat, generation_prompt, list(tools) if tools else self._tools_default)

    def adapt(self, chat: Chat) -> Chat:
        """The chat in the template's form. Raises InputError if a part of it has no place in the template."""
        if chat and chat[0]["role"] == "system" and not self.takes_system:
            chat = merge_system(chat)
        if any(reasoning_of(turn) for turn in chat if turn["role"] == "assistant"):
            chat = self._with_reasoning(chat)
        if any(has_calls(turn) or turn["role"] == "tool" for turn in chat):
            chat = self._with_calls(chat)
        return [_listed(turn) for turn in chat] if self._listed else chat

    @property
    def wants_tools(self) -> bool:
        """Whether the template must be given a list of tools, an empty one if there are none."""
        return self._tools_default is not None

    @cached_property
    def takes_system(self) -> bool:
        """Whether the template writes a system message."""
        return takes_system(lambda chat, prompt=False, tools=None: self.write(_listed_all(chat, self._listed), prompt))

    @cached_property
    def reasoning_form(self) -> Literal["field", "inline", "prompt"] | None:
        """How the template takes reasoning: as field `reasoning_content`, as a <think> block in the content, by a
        prompt that opens the block (its own rendering drops it), or not at all.
        """
        for form in ("field", "inline"):
            turn = _reasoned({"role": "assistant", "content": ANSWER, "reasoning_content": THOUGHT}, form)
            if self._holds([_ask(), turn], THOUGHT, ANSWER):
                return "field" if form == "field" else "inline"
        try:
            prompt = self.write(_listed_all([_ask()], self._listed), True)[0]
        except TemplateRefused:
            return None
        return "prompt" if prompt.rstrip().endswith("<think>") else None

    @cached_property
    def call_form(self) -> tuple[str, str | None] | None:
        """Whether the arguments of a call are an object or JSON text, and what the content beside it is."""
        for form in CALL_FORMS:
            call = {"id": "call00000", "type": "function", "function": dict(CALL)}
            turn = {"role": "assistant", "content": "", "tool_calls": [call]}
            result = {"role": "tool", "content": "result-77", "name": "probe_tool", "tool_call_id": "call00000"}
            chat = [_ask(), _called(turn, form), result]
            if self._holds(chat, "probe_tool", "probe_key", "probe-value", "result-77"):
                return form
        return None

    # --- forms ------------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Find out whether content is a string or a list, and whether `tools` must be a list. Raises TemplateRefused
        with the template's own words if it takes no conversation of a question and an answer.
        """
        plain = [_ask(), {"role": "assistant", "content": ANSWER}]
        problem = None
        forms: tuple[list[Any] | None, ...] = (None, [])
        for listed, tools in itertools.product((False, True), forms):
            self._listed, self._tools_default = listed, tools
            try:
                text = self.write(_listed_all(plain, listed))[0]
            except TemplateRefused as error:
                problem = problem or error
            else:
                if text.find(QUESTION) >= 0 and text.find(ANSWER, text.find(QUESTION)) >= 0:
                    return
        self._listed, self._tools_default = False, None
        raise problem or TemplateRefused("the chat template does not write a question and its answer")

    def _holds(self, chat: Chat, *words: str) -> bool:
        try:
            text = self.write(_listed_all(chat, self._listed))[0]
        except TemplateRefused:
            return False
        return all(word in text for word in words)

    def _with_reasoning(self, chat: Chat) -> Chat:
        answers = [i for i, turn in enumerate(chat) if turn["role"] == "assistant"]
        asked = [i for i, turn in enumerate(chat) if turn["role"] == "user"]
        after = asked[-1] if asked else -1
        turns = list(chat)
        for i in answers:
            if self.reasoning == "strip" or (self.reasoning == "last" and i < after):
                turns[i] = without_reasoning(chat[i])
            elif chat[i].get("reasoning_content"):
                if self.reasoning_form is None:
                    raise InputError(
                        "the template does not write the row's reasoning_content; render.reasoning: strip leaves it out"
                    )
                turns[i] = _reasoned(chat[i], self.reasoning_form)
        return turns

    def _with_calls(self, chat: Chat) -> Chat:
        form = self.call_form
        if form is None:
            raise InputError("the template has no place for tool calls and their results")
        turns, waiting = [], []
        for number, turn in enumerate(chat):
            if has_calls(turn):
                turn = _called(turn, form, number)
                waiting = list(turn["tool_calls"])
            elif turn["role"] == "tool" and waiting:
                call = next((c for c in waiting if c["id"] == turn.get("tool_call_id")), waiting[0])
                waiting.remove(call)
                turn = {"tool_call_id": call["id"], "name": call["function"]["name"], **turn}
            turns.append(turn)
        return turns


def _ask() -> dict[str, Any]:
    return {"role": "user", "content": QUESTION}


def _listed(turn: dict[str, Any]) -> dict[str, Any]:
    return {**turn, "content": [{"type": "text", "text": text_of(turn["content"])}]}


def _listed_all(chat: Chat, listed: bool) -> Chat:
    return [_listed(turn) for turn in chat] if listed else chat


def _reasoned(turn: dict[str, Any], form: str) -> dict[str, Any]:
    """The turn with its field reasoning_content in the template's form."""
    if form != "inline":
        return turn
    kept = {k: v for k, v in turn.items() if k != "reasoning_content"}
    return {**kept, "content": f"<think>\n{turn['reasoning_content']}\n</think>\n\n{text_of(turn['content'])}"}


def _called(turn: dict[str, Any], form: tuple[str, str | None], number: int = 0) -> dict[str, Any]:
    """The turn with its calls complete (id, type) and in the template's form."""
    arguments, empty = form
    calls = []
    for place, call in enumerate(turn["tool_calls"]):
        function = dict(call.get("function") or {k: v for k, v in call.items() if k not in ("id", "type")})
        given = function.get("arguments", {})
        if arguments == "text" and not isinstance(given, str):
            given = json.dumps(given, ensure_ascii=False)
        elif arguments == "object" and isinstance(given, str):
            given = _parsed(given)
        function["arguments"] = given
        known = {k: v for k, v in call.items() if k in ("id", "type") and v}
        calls.append({"id": f"call{number:03d}{place:02d}", "type": "function", **known, "function": function})
    return {**turn, "content": turn["content"] or empty, "tool_calls": calls}


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text
