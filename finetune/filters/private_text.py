"""Count rows with apparent private text: e-mail addresses, phone numbers, card numbers, keys and tokens.

Counts only: the matches are never returned, printed or written. The patterns cover the usual notations; a row that
they do not count may still be private.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from finetune.data.records import ROLES, Example
from finetune.utils.secrets import find_secrets

EMAIL = re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){0,8}\.[A-Za-z]{2,24}\b")
# An international number (+49 30 901820), one with a code in brackets or a leading 0 and separators: 8 to 15 digits.
PHONE = re.compile(r"(?<![\w.+/-])(?:\+\d|\(0?\d|0\d)[\d ()/.-]{6,20}\d(?![\w-]|\.\d)")
CARD = re.compile(r"(?<![\d.-])\d(?:[ -]?\d){12,18}(?![\d-]|\.\d)")
DATE = re.compile(r"\d{1,4}[-./]\d{1,2}[-./]\d{1,4}")
KEY = re.compile(
    r"\b(?:sk|pk|rk|xox[abp]|glpat|AIza|ya29|eyJ)[-_A-Za-z0-9]*[-_.][-_.A-Za-z0-9]{16,}"
    r"|(?i:\b(?:api[ _-]?key|secret|token|password|passwd|pwd)\b['\"]?\s*[:=]\s*['\"]?)(?=\S*\d)[^\s'\"]{8,}"
)
KINDS = ("e-mail addresses", "phone numbers", "card numbers", "keys or passwords")


def count_private(rows: Iterable[Example]) -> dict[str, int]:
    """Return the number of rows for each kind found, and under "rows" the number of rows checked."""
    counts: Counter[str] = Counter()
    for row in rows:
        counts["rows"] += 1
        text = "\n".join(filter(None, [row.joined(*ROLES), row.tools, *(m.extra for m in row.messages)]))
        counts.update(kinds_in(text))
    return {name: counts[name] for name in ("rows", *KINDS) if counts[name]}


def kinds_in(text: str) -> list[str]:
    """Return the apparent kinds of private text in `text`, each once."""
    kinds = []
    if "@" in text and EMAIL.search(text):
        kinds.append(KINDS[0])
    if any(_is_card(m[0]) for m in CARD.finditer(text)):
        kinds.append(KINDS[2])
    if any(_is_phone(m[0]) for m in PHONE.finditer(text)):
        kinds.append(KINDS[1])
    if KEY.search(text) or find_secrets(text):
        kinds.append(KINDS[3])
    return kinds


def warning(counts: dict[str, int], before: str) -> str:
    """Return one line with the counts, or "" if there are none; `before` names the next step: training, a push."""
    counted = [f"{counts[kind]:,} with {kind}" for kind in KINDS if counts.get(kind)]
    if not counted:
        return ""
    return (
        f"PRIVATE TEXT? before {before}: of {counts['rows']:,} rows {', '.join(counted)} (by pattern, counts only). "
        "A model can repeat what it was trained on: remove them from the file, or drop such rows, for e-mail addresses "
        r"with filter: {drop_matching: ['\S+@\S+\.\w+']}"
    )


def luhn(digits: str) -> bool:
    """Return whether the check digit is right (ISO/IEC 7812-1, annex B)."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def _is_card(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and luhn(digits)


def _is_phone(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    return (
        8 <= len(digits) <= 15 and not DATE.fullmatch(text) and (text[0] in "+(" or bool(re.search(r"[ ()/.-]", text)))
    )
