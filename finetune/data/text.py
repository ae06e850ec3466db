"""The text of a row that duplicates are compared by."""

from __future__ import annotations

import hashlib
import unicodedata

from finetune.data.records import Example

FIELD_ROLES = {"instruction": ("user",), "output": ("assistant",), "both": ("user", "assistant")}


def normalised(text: str) -> str:
    """`text` as exact duplicates compare it: Unicode NFKC, case folded, every run of whitespace one space.

    NFKC comes a second time because folding can bring back characters it would join (Unicode 3.13, D145).
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def field_text(row: Example, field: str) -> str:
    """What of a row is compared: all user turns (`instruction`), all assistant turns (`output`) or `both`, in order.

    The text of a raw-text row is its whole text, whatever the field.
    """
    return row.joined(*FIELD_ROLES[field])


def text_key(text: str) -> bytes:
    """16 bytes that are equal for texts that are equal once normalised, and empty for a text that is then empty."""
    plain = normalised(text)
    return hashlib.blake2b(plain.encode(), digest_size=16).digest() if plain else b""
