"""Rendered rows with their text in segments, source and dropped duplicates."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from finetune.data.records import Example
from finetune.report.row_lookup import Dropped, dropped_for, question_and_answer, rows_by_id, source_by_id
from finetune.tokenization.chat import chat_of, reasoning_of
from finetune.tokenization.inspection import Segment

NEAREST = 3


@dataclass(frozen=True)
class Duplicate:
    """A row that was dropped for another, and its text (empty if the rows that dedup read are gone)."""

    dropped: Dropped
    text: str


@dataclass(frozen=True)
class InspectedRow:
    """One rendered row; `repeats` are the nearest of `dropped` rows in all, `notes` what its text does not show."""

    id: str
    source: str
    tokens: int
    supervised: int
    segments: list[Segment]
    repeats: list[Duplicate]
    dropped: int
    notes: list[str] = field(default_factory=list)


def notes_on(ids: Sequence[str], split_rows: Sequence[Path], masked: Path) -> dict[str, list[str]]:
    """For each id: the tools it offers, the turns that hold reasoning, and the turns that carry no label, and why.

    `masked` is render's masked.jsonl, which may not exist.
    """
    notes: dict[str, list[str]] = {row_id: [] for row_id in ids}
    for path in split_rows:
        for row_id, row in rows_by_id(path, set(ids)).items():
            notes[row_id] += _notes_on_row(row)
    if masked.is_file():
        with masked.open(encoding="utf-8") as file:
            for line in file:
                turn = json.loads(line)
                if turn["id"] in notes:
                    notes[turn["id"]].append(f"turn {turn['turn']} carries no label: {turn['reason']}")
    return notes


def _notes_on_row(row: Example) -> Iterator[str]:
    if row.tools:
        named = [t.get("function", t).get("name", "?") for t in json.loads(row.tools) if isinstance(t, dict)]
        yield f"tools: {', '.join(map(str, named))}"
    answers = [(n, turn) for n, turn in enumerate(chat_of(row.messages), 1) if turn["role"] == "assistant"]
    if thinking := [n for n, turn in answers if reasoning_of(turn)]:
        yield f"reasoning in turn {', '.join(map(str, thinking))}"


def sources_and_repeats(
    ids: Sequence[str], split_rows: Sequence[Path], pairs: Path | None, before_dedup: Path | None
) -> tuple[dict[str, str], dict[str, tuple[list[Duplicate], int]]]:
    """For each id its source, and its nearest dropped duplicates with their number in all."""
    sources = source_by_id(split_rows, ids)
    if pairs is None:
        return sources, {}
    groups = dropped_for(pairs, ids)
    near = {row_id: group[:NEAREST] for row_id, group in groups.items()}
    wanted = {d.id for group in near.values() for d in group}
    texts = rows_by_id(before_dedup, wanted) if before_dedup and wanted else {}

    def text(row_id: str) -> str:
        return "\n".join(part for part in question_and_answer(texts[row_id]) if part) if row_id in texts else ""

    return sources, {
        row_id: ([Duplicate(d, text(d.id)) for d in group], len(groups[row_id])) for row_id, group in near.items()
    }
