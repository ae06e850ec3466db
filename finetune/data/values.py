"""Checks on the values of a raw row, and the error that names what does not fit."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping

MOST_LITERAL = 1_000_000  # characters of Python text; reading it takes a hundred times that in memory
MOST_LISTED = 20  # column names in a message
ABSENT = object()  # in place of a value: this row has no such column


class RowError(ValueError):
    """A row that does not fit its format; the text is for a person.

    `reason` is a short name to count by, `where` the column or the place in it.
    """

    def __init__(self, reason: str, where: str, actual: str, allowed: str, near: str | None = None) -> None:
        hint = f"; did you mean {near!r}?" if near else ""
        super().__init__(f"{where}: found {actual}, allowed is {allowed}{hint}")
        self.reason, self.where = reason, where


def text_of(where: str, value: object) -> str:
    """`value`, proved to be Unicode text. Raises RowError."""
    if not isinstance(value, str):
        raise RowError("null" if value is None or value is ABSENT else "type", where, kind(value), "a text")
    require_unicode(value, where)
    return value


def require_unicode(value: str, where: str) -> None:
    """Raise RowError for a lone surrogate (U+D800–U+DFFF), which UTF-8 and tokenizers cannot encode."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        actual = f"the lone surrogate U+{ord(value[error.start]):04X} at character {error.start}"
        raise RowError("surrogate", where, actual, "Unicode text") from None


def is_blank(value: object) -> bool:
    """Whether a column is empty in this row: absent, null, an empty list or mapping, or blank text."""
    if value is None or value is ABSENT:
        return True
    if isinstance(value, str):
        return not value.strip()
    return isinstance(value, (list, Mapping)) and not value


def parsed(where: str, value: object, allowed: str, reason: str = "type") -> object:
    """`value`, or what it holds when it is JSON text. Raises RowError for other text."""
    if not isinstance(value, str):
        return value
    try:
        return loads(value)
    except (ValueError, RecursionError):
        raise RowError(reason, where, kind(value), f"{allowed}, also as JSON text") from None


def loads(text: str) -> object:
    """Return the value of JSON text, also in Python's notation (pandas writes lists to CSV so). Raises ValueError."""
    try:
        return json.loads(text)
    except ValueError:
        if len(text) > MOST_LITERAL or not text.lstrip().startswith(("[", "{")):
            raise
    try:
        with warnings.catch_warnings(action="ignore"):  # of a backslash before a letter
            return ast.literal_eval(text.strip())
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(str(error)) from None


def without_nulls(value: object) -> object:
    """`value` without the null fields that Arrow adds to mappings; nulls that are elements of a list stay."""
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def plain_json(where: str, value: object) -> str:
    """`value` as compact JSON, proved to be JSON and Unicode. Raises RowError.

    Only the keys of an outermost mapping are sorted: a template writes tool definitions and arguments in the order that
    they have here, and the model would otherwise learn an order that it never sees when it is used.
    """
    if isinstance(value, Mapping):
        value = dict(sorted(value.items()))
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError("type", where, str(error), "values that JSON can hold") from None
    require_unicode(text, where)
    return text


def leaves(value: object) -> Iterator[str]:
    """The texts and numbers inside a value, as texts, blank ones left out."""
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner)
    elif value is not None and (text := str(value).strip()):
        yield text


def listed(names: Iterable[object]) -> str:
    """The names, the first ones of very many; what no terminal and no file can hold shown as an escape."""
    texts = [name if (name := str(n)).isprintable() else ascii(name) for n in names]
    more = f", … ({len(texts)} in all)" if len(texts) > MOST_LISTED else ""
    return ", ".join(texts[:MOST_LISTED]) + more or "none"


def kind(value: object) -> str:
    """Return a readable description of the value found."""
    if value is None or value is ABSENT:
        return "null" if value is None else "no such column in this row"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return f"the number {str(value)[:40]}"
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    return "a list" if isinstance(value, list) else "a mapping" if isinstance(value, Mapping) else type(value).__name__
