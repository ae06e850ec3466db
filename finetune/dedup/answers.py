"""Refuse to compare answers alone where answers are labels: few texts, each the right answer to many questions."""

from __future__ import annotations

from finetune.data.records import Example
from finetune.data.text import field_text, text_key
from finetune.errors import GateRefused

FEWEST = 50  # rows with different questions, below which nothing is said
MOST_LOST = 2 / 3  # share of the different (question, answer) pairs whose answer another one has


class AnswerCheck:
    """Counts the different questions and answers of rows, 16 bytes each.

    The reference recipe loses 27 % of its rows to near-duplicate answers of all kinds, and the built-in documentation
    rows, asked in several forms, 53 % to equal ones. With more than three questions an answer, on average, the answers
    are labels, and dropping them loses the task.
    """

    def __init__(self) -> None:
        self._answers: set[bytes] = set()
        self._rows: set[bytes] = set()

    def add(self, row: Example) -> None:
        """Take in one row; raw texts and rows without an answer do not count."""
        if row.text is None and (answer := text_key(field_text(row, "output"))):
            self._answers.add(answer)
            self._rows.add(text_key(field_text(row, "instruction")) + answer)

    def require_varied(self) -> None:
        """Raise GateRefused where answers repeat under different questions."""
        rows, answers = len(self._rows), len(self._answers)
        if rows >= FEWEST and 1 - answers / rows > MOST_LOST:
            raise GateRefused(
                f"dedup.field is output, and {rows:,} different rows have {answers:,} different answers: "
                f"{rows - answers:,} rows would be dropped whose question differs from that of the row they repeat. "
                "Where answers are labels, compare both: dedup.field=both (the default). To keep one row per answer "
                "all the same: dedup.max_dropped_fraction=1"
            )
