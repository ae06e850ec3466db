"""Rendered rows with what is known of each: its text in segments, its source, the duplicates dropped for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.report.row_lookup import Dropped, dropped_for, question_and_answer, rows_by_id, source_by_id
from finetune.tokenization.inspection import Segment

NEAREST = 3


@dataclass(frozen=True)
class Duplicate:
    """A row that was dropped for another, and its text (empty where the rows that dedup read are gone)."""

    dropped: Dropped
    text: str


@dataclass(frozen=True)
class InspectedRow:
    """One rendered row; `repeats` are the nearest of `dropped` rows in all."""

    id: str
    source: str
    tokens: int
    supervised: int
    segments: list[Segment]
    repeats: list[Duplicate]
    dropped: int


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
