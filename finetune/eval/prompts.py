"""Read the input of `finetune generate`: prompts in a text file, or rows in any format that a recipe reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from finetune.data.formats import FormatError, decide, to_example
from finetune.data.readers import local_rows
from finetune.data.values import RowError
from finetune.errors import InputError
from finetune.tokenization.chat import chat_of
from finetune.utils.files import canonical_json

ASKED = ("instruction", "prompt", "question", "query")  # columns that hold a question in rows without an answer
ANSWERS = ("output", "completion", "response", "answer")
SAMPLE_ROWS = 100


@dataclass(frozen=True)
class PromptRow:
    """One prompt: `number` is its 0-based position, `id` combines it with a hash of the content."""

    number: int
    messages: list[dict[str, Any]]
    tools: list[Any] | None = None

    @property
    def id(self) -> str:
        """Return `NUMBER-HASH`: the row's position and the xxh3-64 of its prompt."""
        content = canonical_json({"messages": self.messages, "tools": self.tools})
        return f"{self.number}-{xxhash.xxh3_64_hexdigest(content.encode('utf-8', 'surrogatepass'))}"


def read_prompts(path: Path, system: str | None) -> list[PromptRow]:
    """Return the prompts of all rows of a file.

    `.txt` holds one prompt per line; blank lines are skipped. In every other format the turns before a row's last
    answer are the prompt. `system` is added to rows without a system message.

    Raises InputError with file, row and field if a row cannot be read or has no prompt.
    """
    if path.suffix == ".txt":
        rows = [(n, _user(line)) for n, line in enumerate(_lines(path), start=1) if line.strip()]
        prompts = [PromptRow(i, messages) for i, (_, messages) in enumerate(rows)]
    else:
        prompts = _rows(path)
    if not prompts:
        raise InputError(f"{path} holds no prompt")
    if system is None:
        return prompts
    first = {"role": "system", "content": system}
    return [r if _has_system(r) else PromptRow(r.number, [first, *r.messages], r.tools) for r in prompts]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}") from None


def _user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def _has_system(row: PromptRow) -> bool:
    return row.messages[0]["role"] == "system"


def _rows(path: Path) -> list[PromptRow]:
    rows = list(local_rows(path))
    for raw in rows:
        if raw.row is None:
            raise InputError(f"{path}, row {raw.number}: {raw.problem}")
    asked = [with_answer(raw.row or {}) for raw in rows]
    if not asked:
        return []
    try:
        decision = decide("auto", {}, asked[:SAMPLE_ROWS])
    except FormatError as error:
        raise InputError(f'{path}: {error}; or write each row as {{"prompt": …}}') from None
    rows_read = []
    for number, (raw, row) in enumerate(zip(rows, asked, strict=True)):
        try:
            example = to_example(row, decision, f"{path.name}:{raw.number}", path.name)
        except RowError as error:
            raise InputError(f"{path}, row {raw.number}: {error}") from None
        messages = _user(example.text) if example.text is not None else prompt_of(chat_of(example.messages))
        if not messages:
            raise InputError(f"{path}, row {raw.number}: no prompt: the answer is the first turn")
        rows_read.append(PromptRow(number, messages, json.loads(example.tools) if example.tools else None))
    return rows_read


def with_answer(row: dict[str, Any], columns: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the row, with an empty answer added if it holds only a question, so that a format matches.

    `columns` maps names of the format to those of the row.
    """
    holds = {name for name, value in row.items() if value is not None}
    holds |= {ours for ours, theirs in (columns or {}).items() if theirs in holds}
    if not holds & set(ASKED) or holds & set(ANSWERS):
        return row
    return {**row, "output" if "instruction" in holds else "completion": ""}


def prompt_of(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages before the last answer; all if the last turn is not an answer."""
    chat = list(messages)
    if chat and chat[-1]["role"] != "assistant":
        return chat
    last = next((i for i in range(len(chat) - 1, -1, -1) if chat[i]["role"] == "assistant"), 0)
    return chat[:last]
