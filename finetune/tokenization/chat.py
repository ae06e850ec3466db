"""From a row's messages to rendered text: which turns a template is given, and which strings may control the model.

A chat template writes control strings such as `</s>`; so may a user. Once both are in one text they cannot be
distinguished, so `ControlStrings` replaces the user's by placeholders of the same length while the template runs. With
equal lengths every character position, and so every span, stays the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from finetune.data.records import Example, Message
from finetune.errors import InputError

THINKING = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
Span = tuple[int, int]
"""Half-open range of characters."""


Chat = list[dict[str, Any]]
"""Messages as a chat template reads them: role, content, and what else a turn carries."""


class TemplateRefused(InputError):
    """The template itself raised on these messages; the message is the template's."""


class Renderer(Protocol):
    """A compiled chat template."""

    def __call__(
        self, chat: Chat, generation_prompt: bool = False, tools: Sequence[Any] | None = None
    ) -> tuple[str, list[Span]]:
        """The text, and the ranges inside `{% generation %}` blocks in order. Raises TemplateRefused."""


def chat_of(messages: Iterable[Message]) -> Chat:
    """Messages as dictionaries; the fields of `extra` (tool_calls, name) stand beside role and content."""
    return [{**(json.loads(m.extra) if m.extra else {}), "role": m.role, "content": m.content} for m in messages]


def merge_system(chat: Chat) -> Chat:
    """Put a leading system message in front of the first user turn, parted by an empty line.

    Raises InputError if no user turn follows directly.
    """
    if not chat or chat[0]["role"] != "system":
        return chat
    if len(chat) < 2 or chat[1]["role"] != "user":
        raise InputError("a system message can be merged only into a user turn that follows it directly")
    first = {**chat[1], "content": f"{chat[0]['content']}\n\n{chat[1]['content']}"}
    return [first, *chat[2:]]


def takes_system(render: Renderer) -> bool:
    """Whether the template writes a system message, found by rendering one."""
    probe = "system-probe-7f3a"
    chat = [turn("system", probe), turn("user", "question"), turn("assistant", "answer")]
    try:
        return probe in render(chat)[0]
    except TemplateRefused:
        return False


def turn(role: str, content: str) -> dict[str, Any]:
    """One message as a template reads it."""
    return {"role": role, "content": content}


def text_of(content: object) -> str:
    """The text of a turn's content, which is a string, None, or a list of parts."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) if isinstance(part, dict) else str(part) for part in content)
    return "" if content is None else str(content)


def reasoning_of(turn: dict[str, Any]) -> str:
    """The reasoning of an assistant turn: its field `reasoning_content`, or a leading <think> block, or empty."""
    if turn.get("reasoning_content"):
        return str(turn["reasoning_content"])
    block = THINKING.match(text_of(turn["content"]))
    return block[1].strip("\n") if block else ""


def without_reasoning(turn: dict[str, Any]) -> dict[str, Any]:
    """The turn without its reasoning, as field and as leading <think> block."""
    kept = {k: v for k, v in turn.items() if k != "reasoning_content"}
    if isinstance(kept["content"], str):
        kept["content"] = THINKING.sub("", kept["content"], count=1)
    return kept


def answer_core(turn: dict[str, Any]) -> str:
    """The words of an assistant turn without reasoning and without white space at the edges."""
    return THINKING.sub("", text_of(turn["content"]), count=1).strip()


def first_call(turn: dict[str, Any]) -> str:
    """The name of the first tool that a turn calls, or an empty string."""
    for call in turn.get("tool_calls") or []:
        return str(call.get("function", call).get("name", ""))
    return ""


def has_calls(turn: dict[str, Any]) -> bool:
    """Whether the turn calls a tool."""
    return bool(turn.get("tool_calls"))


def verification_sample(rows: Iterable[Example], limit: int) -> list[Example]:
    """At most `limit` rows to prove a template on, the same ones each time.

    Up to half are rows that a template may treat in its own way (a system message, several turns, a call, white
    space at an edge); the rest is spread over all chats.
    """
    every, odd = _Spread(limit), _Spread(limit // 2)
    for row in rows:
        if row.messages:
            every.offer(row)
            if _unusual(row):
                odd.offer(row)
    chosen = {r.id: r for r in (*odd.rows(), *every.rows())}
    return list(chosen.values())[:limit]


class _Spread:
    """About evenly spaced items of a stream whose length is not known: half are thrown out whenever it is full."""

    def __init__(self, count: int) -> None:
        self._count, self._step, self._seen = count, 1, 0
        self._kept: list[Example] = []

    def offer(self, row: Example) -> None:
        if self._count and self._seen % self._step == 0:
            self._kept.append(row)
            if len(self._kept) > 2 * self._count:
                self._kept, self._step = self._kept[::2], self._step * 2
        self._seen += 1

    def rows(self) -> list[Example]:
        count = min(self._count, len(self._kept))
        return [self._kept[i * len(self._kept) // count] for i in range(count)]


def _unusual(row: Example) -> bool:
    several = len(row.messages) > 2 or any(m.role not in ("user", "assistant") or m.extra for m in row.messages)
    return several or any(m.content != m.content.strip() for m in row.messages)


class ControlStrings:
    """The strings that become control tokens, and how to keep a user's apart from the template's.

    Two blocks of the private-use plane 16 stand for string number i, repeated to its length: `TYPED + i` for one that a
    person typed, `TRUE + i` for one that the template wrote.
    """

    TYPED, TRUE, SIZE = 0x108000, 0x100000, 0x7FFD

    def __init__(self, strings: Iterable[str]) -> None:
        self.strings = tuple(sorted(set(strings), key=lambda s: (-len(s), s)))
        if len(self.strings) > self.SIZE:
            raise InputError(f"{len(self.strings)} control tokens; at most {self.SIZE} are supported")
        self.names = {s: chr(self.TRUE + i) * len(s) for i, s in enumerate(self.strings)}
        self._typed = {s: chr(self.TYPED + i) * len(s) for i, s in enumerate(self.strings)}
        self._find = _any_of(self.strings)
        self._find_typed = _any_of(self._typed.values())
        self._back = {v: k for k, v in self._typed.items()}

    def in_text(self, text: str) -> bool:
        """Whether any control string occurs in `text`."""
        return self._find.search(text) is not None

    def in_chat(self, chat: Chat) -> bool:
        """Whether any control string occurs in what a person typed."""
        return any(self.in_text(s) for s in _strings(chat))

    def hide(self, chat: Chat) -> Chat:
        """The chat with every typed control string replaced by its placeholder.

        Raises InputError if a turn already holds characters of plane 16.
        """
        if any(ord(c) >= self.TRUE for s in _strings(chat) for c in s):
            raise InputError("the row holds both a control string and a private-use character U+100000 or above")

        def hidden(text: str) -> str:
            return self._find.sub(lambda hit: self._typed[hit[0]], text)

        return [{name: _map_strings(value, hidden) for name, value in turn.items()} for turn in chat]

    def show(self, text: str) -> str:
        """The text with typed control strings put back: what a plain rendering gives."""
        return self._find_typed.sub(lambda hit: self._back[hit[0]], text)

    def seal(self, text: str) -> str:
        """The text with the template's control strings under their private names and the typed ones put back."""
        return self.show(self._find.sub(lambda hit: self.names[hit[0]], text))


def _any_of(strings: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, strings)) or r"(?!)")


def _strings(value: object) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _map_strings(value: object, change: Callable[[str], str]) -> object:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {k: _map_strings(v, change) for k, v in value.items()}
    return [_map_strings(v, change) for v in value] if isinstance(value, list) else value


MARKER = re.compile(r"(\s*\{%-|(?:^[ \t]+|(?<=\n)[ \t]+)?\{%)\s*(?:end)?generation\s*(-%\}\s*|%\}\n?)")


def has_markers(template: str) -> bool:
    """Whether the template has generation markers."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def strip_markers(template: str) -> str:
    """The template without generation markers, for software that knows only plain Jinja."""
    return MARKER.sub("", template) if "generation" in template else template


def with_core(turn: dict[str, object], core: str, name: str) -> dict[str, object]:
    """Return the turn with `name` in place of its words `core`."""
    content = turn["content"]
    if isinstance(content, list):
        return {**turn, "content": [{**part, "text": part["text"].replace(core, name)} for part in content]}
    before, _, after = str(content).rpartition(core)
    return {**turn, "content": before + name + after}


def padding_of(turn: dict[str, object]) -> tuple[str, str]:
    """The white space at both edges of an answer's words."""
    text = without_reasoning(turn)["content"]
    visible = text_of(text)
    return visible[: len(visible) - len(visible.lstrip())], visible[len(visible.rstrip()) :]


def same_form(content: object, word: str) -> object:
    """Return `word` as a content of the same form, a string or a list of parts."""
    return [{"type": "text", "text": word}] if isinstance(content, list) else word


def shared_start(one: str, other: str) -> int:
    """Characters that both texts begin with."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def before_tag(text: str, at: int) -> int:
    """`at`, or the place of a `<` before it whose tag or token it is inside of."""
    opened = text.rfind("<", 0, at)
    return opened if opened >= 0 and ">" not in text[opened:at] else at


def skip_space(text: str, at: int) -> int:
    """Return the place of the first character at or after `at` that is not white space."""
    while at < len(text) and text[at].isspace():
        at += 1
    return at
