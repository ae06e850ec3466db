"""Pairs made from the documentation of this Python: the right answer against another row's, or against an edit of it.

The same Python gives the same pairs in the same order. `other` pairs show whether the answer fits the prompt, `edit`
pairs whether the answer is right in itself: a name in it was replaced by that of another entry, or two
neighbouring words were swapped.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from finetune.data import pydoc_rows

NAME = re.compile(r"`[^`\n]+`")
WORD = re.compile(r"\S+")


def pydoc_pairs(
    format_: str = "preference", rows: Iterable[dict[str, object]] | None = None
) -> Iterator[dict[str, object]]:
    """Rows {prompt, chosen, rejected, kind}; as kto two rows {prompt, completion, label, kind} of each.

    A row whose answer cannot be edited gives none.
    """
    every = [_turns(row) for row in (pydoc_rows.rows() if rows is None else rows)]
    names = sorted({name for _, answer in every for name in NAME.findall(answer)})
    for prompt, answer in every:
        kind = ("other", "edit")[_number(f"kind {prompt}") % 2]
        rejected = _other(prompt, answer, every) if kind == "other" else edited(prompt, answer, names)
        if rejected is None or " ".join(rejected.split()) == " ".join(answer.split()):
            continue
        if format_ == "kto":
            yield {"prompt": prompt, "completion": answer, "label": True, "kind": kind}
            yield {"prompt": prompt, "completion": rejected, "label": False, "kind": kind}
        else:
            yield {"prompt": prompt, "chosen": answer, "rejected": rejected, "kind": kind}


def edited(prompt: str, answer: str, names: Sequence[str]) -> str | None:
    """Return the answer with its first name replaced by one of `names`, or with two neighbouring words swapped.

    None if it has neither a name nor two neighbouring words that differ.
    """
    number = _number(f"edit {prompt}")
    match = NAME.search(answer)
    others = [names[(number + i) % len(names)] for i in range(min(2, len(names)))]
    other = next((name for name in others if match is not None and name != match[0]), None)
    if match is not None and other is not None and number % 2:
        return answer[: match.start()] + other + answer[match.end() :]
    words = list(WORD.finditer(answer))
    places = [i for i in range(len(words) - 1) if words[i][0] != words[i + 1][0]]
    if not places:
        return None
    at = places[number % len(places)]
    first, second = words[at], words[at + 1]
    between = answer[first.end() : second.start()]
    return answer[: first.start()] + second[0] + between + first[0] + answer[second.end() :]


def _other(prompt: str, answer: str, every: Sequence[tuple[str, str]]) -> str | None:
    start = _number(f"other {prompt}")
    candidates = (every[(start + step) % len(every)][1] for step in range(len(every)))
    return next((text for text in candidates if text != answer), None)


def _turns(row: Mapping[str, Any]) -> tuple[str, str]:
    question, answer = row["messages"]
    return question["content"], answer["content"]


def _number(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
