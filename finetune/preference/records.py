"""Pair: a prompt with a better and a worse answer, or with one answer and a label."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from finetune.data.records import REJECTED_CHARACTERS, Example, Message, Reject
from finetune.data.text import field_text
from finetune.recipe import Jaccard as JaccardSection
from finetune.recipe import Section
from finetune.tokenization.chat import chat_of

SIDES = {"dpo": ("chosen", "rejected"), "kto": ("completion",)}
GROUP_THRESHOLD = 0.9  # of prompts, without a split section


class Repeats(Section):
    """By what pairs, and prompts, repeat each other: the dedup section, and the split section's threshold."""

    drop: bool = True  # False: the recipe drops no repeated rows
    exact: bool = True
    minhash: JaccardSection | None = None
    embedding: str | None = None
    threshold: float = 1.0
    group_threshold: float = GROUP_THRESHOLD
    by: Literal["pair", "prompt"] = "pair"
    folder: Annotated[Path | None, Field(exclude=True)] = None


class Rendering(Section):
    """Settings of the render section that decide a pair's tokens."""

    template: str
    system: Literal["merge", "refuse"]
    reasoning: Literal["auto", "keep", "last", "strip"] = "auto"
    template_file: Annotated[Path | None, Field(exclude=True)] = None


@dataclass(frozen=True, slots=True)
class Pair:
    """One row of preference data.

    `prompt` ends with a user's or a tool's turn. `answers` are (chosen, rejected), or one answer, then with `label`;
    each begins and ends with an assistant's turn. `extra` and `tools` are as in Example.
    """

    id: str
    source: str
    prompt: tuple[Message, ...]
    answers: tuple[tuple[Message, ...], ...]
    label: bool | None = None
    extra: str | None = None
    tools: str | None = None

    @property
    def sides(self) -> tuple[str, ...]:
        """Return the names of its answers."""
        return SIDES["dpo" if self.label is None else "kto"]

    def example(self, side: int) -> Example:
        """The prompt with one answer as a row in which only that answer is learned; its id names the side."""
        prompt = (replace(m, learn=False) if m.role == "assistant" else m for m in self.prompt)
        name = f"{self.id} ({self.sides[side]})"
        return Example(name, self.source, (*prompt, *self.answers[side]), None, self.extra, self.tools)

    def apart(self) -> tuple[Pair, Pair]:
        """The two answers as single ones with a label, ids `ID+` and `ID-`."""
        chosen, rejected = self.answers
        return (
            replace(self, id=f"{self.id}+", answers=(chosen,), label=True),
            replace(self, id=f"{self.id}-", answers=(rejected,), label=False),
        )

    def reject(self, reason: str, detail: str, value: float | None = None, limit: float | None = None) -> Reject:
        """Return the reject for this pair, with the beginning of its text."""
        text = "\n".join(part for part in (question(self.prompt), *map(said, self.answers)) if part)
        return Reject(self.id, self.source, reason, detail, text[:REJECTED_CHARACTERS], value, limit)


def question(prompt: Sequence[Message]) -> str:
    """Return the user turns of a prompt, joined by newlines: what near-duplicate prompts are compared by."""
    return "\n".join(m.content for m in prompt if m.role == "user")


def said(answer: Sequence[Message]) -> str:
    """Return the assistant turns of an answer with their tool calls."""
    return field_text(Example("", "", tuple(answer)), "output")


def context_text(pair: Pair) -> str:
    """Return all that stands before the answer: roles, contents, calls and tools."""
    turns = [f"{m.role}\n{m.content}\n{m.extra or ''}" for m in pair.prompt]
    return "\n".join([*turns, pair.tools or ""])


def as_json(messages: Sequence[Message]) -> str:
    """Return messages as JSON text, as chat templates read them."""
    return json.dumps(chat_of(messages), ensure_ascii=False, sort_keys=True)
