"""Conditions on a source's other columns (`rating >= 4`), for the filter and for `finetune init --keep`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

from finetune.data.records import Example
from finetune.filters.basic import Drop, Verdict
from finetune.recipe.filters import parse_condition

COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
    "!=": operator.ne,
}


def check_of(conditions: Sequence[str]) -> Callable[[Example], Verdict]:
    """Return one check of all conditions; a row must meet each. Columns are those that the format did not use as text.

    If value and limit are both numbers (also as text in a CSV), they are compared as numbers; otherwise `==` and `!=`
    compare texts. A row without the column, or with a text where a number is needed, is dropped.
    """
    parsed = [(text, *parse_condition(text)) for text in conditions]

    def check(row: Example) -> Verdict:
        for text, column, sign, limit in parsed:
            if (verdict := _judge(row, text, column, sign, limit)) is not None:
                return verdict
        return None

    return check


def _judge(row: Example, text: str, column: str, sign: str, limit: str) -> Verdict:
    value = row.column(column)
    if value is None:
        return Drop("keep_where", f"{text}: this row has no value in the column {column!r}")
    number, bound = _number(value), _number(limit)
    if number is not None and bound is not None:
        return None if COMPARE[sign](number, bound) else Drop("keep_where", f"{text}: {number:g}", number, bound)
    if sign not in ("==", "!="):
        return Drop("keep_where", f"{text}: the value {str(value)[:40]!r} is not a number")
    same = str(value).strip() == limit
    return None if same == (sign == "==") else Drop("keep_where", f"{text}: {str(value)[:40]!r}")


def _number(value: object) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        return float(str(value).strip().replace(",", "."))
    except ValueError:
        return None
