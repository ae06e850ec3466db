"""The text of a row that duplicates are compared by."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence

from finetune.data.records import Example
from finetune.utils.files import canonical_json

WORD = re.compile(r"\w+")
FIELD_ROLES = {"instruction": ("user",), "output": ("assistant",), "both": ("user", "assistant")}


def normalised(text: str) -> str:
    """`text` as exact duplicates compare it: Unicode NFKC, case folded, every run of whitespace one space.

    NFKC comes a second time because folding can bring back characters it would join (Unicode 3.13, D145).
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def words(text: str) -> list[str]:
    """Return the words of a normalised text, without punctuation."""
    return WORD.findall(normalised(text))


def word_runs(found: Sequence[str], size: int) -> Iterator[str]:
    """Yield every run of `size` consecutive words, joined by spaces."""
    return (" ".join(found[i : i + size]) for i in range(len(found) - size + 1))


def field_text(row: Example, field: str) -> str:
    """Return the text of a row that is compared: all user turns (`instruction`), all assistant turns (`output`) or
    `both`, in order.

    An assistant's turn is its text and its tool calls. A raw-text row's text is its whole text, whatever the field.
    """
    if row.text is not None or all(m.extra is None for m in row.messages):
        return row.joined(*FIELD_ROLES[field])
    parts = []
    for message in row.messages:
        if message.role in FIELD_ROLES[field]:
            calls = json.loads(message.extra).get("tool_calls") if message.extra else None
            parts += [message.content] + ([canonical_json(calls)] if calls else [])
    return "\n".join(parts)


def text_key(text: str) -> bytes:
    """16 bytes that are equal for texts that are equal once normalised, and empty for a text that is then empty."""
    plain = normalised(text)
    return hashlib.blake2b(plain.encode(), digest_size=16).digest() if plain else b""
