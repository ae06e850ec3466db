"""Columns of a user's file: what they hold, which is the question, which the answer, and whether they are swapped."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finetune.errors import InputError
from finetune.utils.format import nearest, visible

QUESTION_WORDS = frozenset(
    "question query prompt instruction input user customer client ask asked request message problem subject issue "
    "frage pregunta".split()
)
ANSWER_WORDS = frozenset(
    "answer reply response output completion assistant agent bot solution resolution target antwort respuesta".split()
)
SAMPLE_CHARACTERS = 60
MANY_QUESTIONS, FEW_QUESTIONS = 0.4, 0.1  # share of texts that end with a question mark


@dataclass(frozen=True)
class Column:
    """One column over the first rows: a sample value, the share of rows that fill it, mean characters, all numbers."""

    name: str
    sample: str
    filled: float
    characters: float
    numeric: bool


@dataclass(frozen=True)
class Chosen:
    """Roles of the columns, as given by options or chosen by the user.

    `keep` are conditions for filter.keep_where, `ignore` columns for ingest.ignore.
    """

    question: str | None = None
    answer: str | None = None
    system: str | None = None
    keep: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    @property
    def given(self) -> bool:
        """Whether a column was named."""
        return bool(self.question or self.answer or self.system)


def describe(rows: Sequence[Mapping[str, object]]) -> list[Column]:
    """Return the columns of `rows` in the order in which they appear. Raises nothing; no rows give no columns."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    parts = []
    for name in names:
        values = [str(v).strip() for row in rows if (v := row.get(name)) is not None and str(v).strip()]
        lengths = sum(map(len, values)) / len(values) if values else 0.0
        numeric = bool(values) and all(re.fullmatch(r"[-+]?\d+([.,]\d+)?", v) for v in values)
        parts.append(Column(name, values[0] if values else "", len(values) / max(1, len(rows)), lengths, numeric))
    return parts


def table(columns: Sequence[Column]) -> str:
    """Return one line a column: name, share of rows with a value, a sample value."""
    width = max([len(visible(c.name)) for c in columns], default=0)
    lines = []
    for c in columns:
        sample = visible(" ".join(c.sample.split()))
        sample = sample if len(sample) <= SAMPLE_CHARACTERS else sample[:SAMPLE_CHARACTERS] + "…"
        lines.append(f"  {visible(c.name):<{width}}  {c.filled:>4.0%} filled  {sample}")
    return "\n".join(lines)


def suggest(columns: Sequence[Column]) -> tuple[str, str]:
    """Return the likeliest question and answer column, each "" if nothing suggests itself."""
    texts = [c for c in columns if not c.numeric and c.characters >= 8]
    by_length = sorted(texts, key=lambda c: -c.characters)
    question = _by_name(texts, QUESTION_WORDS, ANSWER_WORDS)
    answer = _by_name([c for c in texts if c.name != question], ANSWER_WORDS, QUESTION_WORDS)
    rest = sorted([c for c in by_length if c.name not in (question, answer)][: 2 - bool(question) - bool(answer)],
                  key=texts.index)  # fmt: skip
    for column in rest:
        if not question:
            question = column.name
        elif not answer:
            answer = column.name
    return question, answer


def check_names(chosen: Chosen, columns: Sequence[Column]) -> None:
    """Raise InputError if a named column is not there (with the nearest name), or two sides are one column."""
    names = [c.name for c in columns]
    for option in ("question", "answer", "system"):
        name = getattr(chosen, option)
        if name is not None and name not in names:
            meant = nearest(name, names)
            hint = f"; did you mean {meant!r}?" if meant else ""
            raise InputError(f"--{option} {name}: no column of that name{hint} The columns are:\n{table(columns)}")
    if not chosen.question or not chosen.answer:
        lacking = "--answer" if chosen.question else "--question"
        raise InputError(f"{lacking} COLUMN is missing. The columns are:\n{table(columns)}")
    if len({chosen.question, chosen.answer, chosen.system}) < 3:
        raise InputError(f"--question and --answer name one column, {chosen.question!r}; give each its own")


def swapped(question: str, answer: str, rows: Sequence[Mapping[str, object]]) -> str:
    """Return why the two sides seem to be swapped, or "": their names say so, or the answers are the questions."""
    if _means(question, ANSWER_WORDS, QUESTION_WORDS) and _means(answer, QUESTION_WORDS, ANSWER_WORDS):
        return "by their names"
    asked, answered = (_asking(rows, name) for name in (question, answer))
    if answered >= MANY_QUESTIONS and asked <= FEW_QUESTIONS and len(rows) >= 10:
        return f"{answered:.0%} of {answer!r} end with a question mark, {asked:.0%} of {question!r}"
    return ""


def _asking(rows: Sequence[Mapping[str, object]], name: str) -> float:
    texts = [str(row.get(name) or "").strip() for row in rows]
    return sum(t.endswith(("?", "？", "؟")) for t in texts) / max(1, len(texts))


def _by_name(columns: Sequence[Column], words: frozenset[str], others: frozenset[str]) -> str:
    return next((c.name for c in columns if _means(c.name, words, others)), "")


def _means(name: str, words: frozenset[str], others: frozenset[str]) -> bool:
    parts = {p.lower() for p in re.findall(r"[A-Z]?[a-zäöüß]+|[A-Z]+", name)}
    parts |= {p.removesuffix("s") for p in parts}
    return bool(parts & words) and not parts & others
