"""Rows of JSON files: lines, an array, objects one after the other, or an object that wraps an array."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from finetune.data.formats import MEANINGFUL
from finetune.data.text_files import MOST_ROW_BYTES, chunks, lines, refuse
from finetune.utils.format import first_line

BLANK = re.compile(r"[ \t\n\r]*")
WHOLE_BYTES = 1 << 26  # of a file whose first object is parsed as a whole to see whether it wraps an array


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as its source holds it.

    `number` is 1-based (in JSON lines: the line). `row` is None if `problem` is about this row alone;
    `text` is then the start of what was found.
    """

    number: int
    row: dict[str, object] | None
    problem: str = ""
    text: str = ""


def json_lines(path: Path, encoding: str | None = None) -> Iterator[RawRow]:
    """An object a line; a file whose first object goes over several lines is read as objects one after the other."""
    first = next(((n, t) for n, t in lines(path, encoding) if t.strip()), None)
    if first is not None and _is_spread(path, first[1], encoding):
        yield from _objects(path, ArrayText(chunks(path, encoding)))
        return
    for number, line in lines(path, encoding):
        if not line.strip():
            continue
        try:
            value = _LINE.decode(line)
        except json.JSONDecodeError as error:
            problem = f"line {number}, column {error.colno}: {_json_problem(error)}{_array_hint(line)}"
            yield RawRow(number, None, problem, line[:200])
        except (ValueError, RecursionError) as error:
            yield RawRow(number, None, f"line {number}: {first_line(error)}", line[:200])
        else:
            yield _as_row(number, value, f"line {number}", _array_hint(line))


def json_file(path: Path, encoding: str | None = None) -> Iterator[RawRow]:
    """An array of objects, also inside one object ({"data": […]}); columns; objects over lines; JSON lines."""
    text = ArrayText(chunks(path, encoding))
    if text.peek() != "{":
        yield from _json_array(path, text)
        return
    only = _only_object(path, encoding)
    if only and (columns := _columns(only)):
        yield from (
            RawRow(n, dict(zip(columns, cells, strict=True)))
            for n, cells in enumerate(zip(*columns.values(), strict=True), 1)
        )
        return
    if (name := _wrapped(path, encoding, only)) is not None:
        yield from _wrapped_array(path, text, name)
        return
    number, line = next((n, t) for n, t in lines(path, encoding) if t.strip())
    try:
        json.loads(line, parse_constant=_no_constant)
    except ValueError:
        if _is_spread(path, line, encoding):
            yield from _objects(path, text)
            return
        refuse(path, number, "JSON that is not an object", "an array of objects, or objects one after the other")
    yield from json_lines(path, encoding)


def _is_spread(path: Path, line: str, encoding: str | None) -> bool:
    """Whether the first object goes over several lines, and is not only a first line that does not parse."""
    if not line.lstrip().startswith("{"):
        return False
    try:
        json.loads(line, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        if error.pos < len(line.rstrip()) and not error.msg.startswith("Unterminated"):
            return False  # a fault within the line
    except (ValueError, RecursionError):
        return False
    else:
        return False
    text = ArrayText(chunks(path, encoding))
    try:
        text.peek()
        return isinstance(text.value(), dict)
    except (ValueError, RecursionError):
        # The only object is damaged: to read it as lines would make a fault of every line.
        following = next((t for n, t in lines(path, encoding) if n > 1 and t.strip()), "")
        return not following.lstrip().startswith("{")


def _objects(path: Path, text: ArrayText) -> Iterator[RawRow]:
    """Objects one after the other, however many lines each takes; commas between them are skipped."""
    number = 0
    while text.peek():
        number, line = number + 1, text.line
        yield _as_row(number, _value(path, text), f"object {number}, line {line}")
        if text.peek() == ",":
            text.skip()


def _only_object(path: Path, encoding: str | None) -> dict[str, object] | None:
    """The file's only object; {} if there are more, None if it is too large to be parsed as a whole, or damaged."""
    if path.stat().st_size > WHOLE_BYTES:
        return None
    text = ArrayText(chunks(path, encoding))
    text.peek()
    try:
        value = text.value()
        return value if isinstance(value, dict) and not text.peek() else {}
    except (ValueError, RecursionError):
        return None  # damaged: the reader reports the place


def _columns(only: dict[str, object]) -> dict[str, list[object]] | None:
    """Columns of equal length, as pandas writes a table: lists of plain values, or {"0": …, "1": …} each."""
    values = list(only.values())
    if all(isinstance(v, dict) and v and v.keys() == values[0].keys() for v in values):  # type: ignore[attr-defined]
        numbered = all(key.isdecimal() for key in values[0])  # type: ignore[attr-defined]
        return {name: list(v.values()) for name, v in only.items() if isinstance(v, dict)} if numbered else None
    lists = {
        name: v for name, v in only.items() if isinstance(v, list) and not any(isinstance(e, dict | list) for e in v)
    }
    alike = len({len(v) for v in lists.values()}) == 1
    return lists if alike and len(lists) == len(only) > 1 and values[0] else None


def _wrapped(path: Path, encoding: str | None, only: dict[str, object] | None) -> str | None:
    """The name under which a file's only object holds an array of rows, with no column of a row beside it; or None."""
    if only is not None:
        if any(name.lower() in MEANINGFUL for name in only):
            return None
        return next((n for n, v in only.items() if isinstance(v, list) and v and isinstance(v[0], dict)), None)
    text = ArrayText(chunks(path, encoding))
    text.skip_mark("{")
    try:
        while text.peek() == '"':
            name = str(text.value())
            if not text.skip_mark(":") or name.lower() in MEANINGFUL:
                return None
            if text.peek() == "[":
                text.skip()
                return name if text.peek() == "{" else None
            text.value()
            if not text.skip_mark(","):
                return None
    except (ValueError, RecursionError):
        return None
    return None


def _wrapped_array(path: Path, text: ArrayText, name: str) -> Iterator[RawRow]:
    text.skip_mark("{")
    while True:
        key = _value(path, text)
        if not text.skip_mark(":"):
            refuse(path, text.line, repr(text.peek()), "a colon after the name")
        if key == name:
            break
        _value(path, text)
        text.skip_mark(",")
    yield from _json_array(path, text, last=False)
    while text.skip_mark(","):
        line, key = text.line, _value(path, text)
        text.skip_mark(":")
        if text.peek() == "[":
            refuse(path, line, f"a second array {str(key)!r} beside {name!r}", "one array of rows a file")
        _value(path, text)
    if not text.skip_mark("}"):
        refuse(path, text.line, repr(text.peek() or "the end of the file"), "the closing } of the object")
    if text.peek():
        refuse(path, text.line, f"{text.peek()!r} after the object", "nothing there")


def _value(path: Path, text: ArrayText) -> object:
    line = text.line
    text.peek()
    try:
        return text.value()
    except json.JSONDecodeError as error:
        refuse(path, text.line_at(error.pos), _json_problem(error), "JSON")
    except (ValueError, RecursionError) as error:
        refuse(path, line, first_line(error), "JSON")


def _json_array(path: Path, text: ArrayText, last: bool = True) -> Iterator[RawRow]:
    if text.peek() != "[":
        refuse(path, text.line, repr(text.peek()), "an array of objects, [{…}, {…}]")
    text.skip()
    number = 0
    while text.peek() != "]" or number:
        text.peek()
        number, line = number + 1, text.line
        yield _as_row(number, _value(path, text), f"element {number}, line {line}")
        mark = text.peek()
        if mark == "]":
            break
        if mark != ",":
            actual = repr(mark) if mark else "the end of the file"
            refuse(path, text.line, f"{actual} after element {number}", "a comma or the closing ]")
        text.skip()
        if text.peek() == "]":
            refuse(path, text.line, "a comma after the last element", "no comma there")
    text.skip()
    if last and text.peek():
        refuse(path, text.line, f"{text.peek()!r} after the array", "nothing there")


class ArrayText:
    """A window over JSON text: it grows to the next value and lets go of what was parsed."""

    def __init__(self, texts: Iterator[str]) -> None:
        self._texts = texts
        self._decoder = json.JSONDecoder(parse_constant=_no_constant)
        self._window = ""
        self._position = 0
        self.line = 1

    def peek(self) -> str:
        """The next character that is not blank; empty at the end."""
        while True:
            blank = BLANK.match(self._window, self._position)
            self._go_to(blank.end() if blank else self._position)
            if self._position < len(self._window):
                return self._window[self._position]
            if not self._grow():
                return ""

    def skip(self) -> None:
        """Go past the character that `peek` gave."""
        self._position += 1

    def skip_mark(self, mark: str) -> bool:
        """Go past `mark` if it is the next character that is not blank."""
        if self.peek() != mark:
            return False
        self.skip()
        return True

    def value(self) -> object:
        """The JSON value here. Raises JSONDecodeError, with a position that `line_at` understands."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._window, self._position)
            except json.JSONDecodeError as error:
                # An error near the end of the window may only mean that the value goes on.
                near_end = error.pos > len(self._window) - 16 or error.msg.startswith("Unterminated")
                if not near_end or not self._grow():
                    raise
            else:
                if end == len(self._window) and self._grow():
                    continue  # a number may go on, too
                self._go_to(end)
                return value

    def line_at(self, position: int) -> int:
        """The line of a position in the window."""
        return self.line + self._window.count("\n", self._position, position)

    def _go_to(self, position: int) -> None:
        self.line = self.line_at(position)
        self._position = position

    def _grow(self) -> bool:
        """Let go of what was parsed and at least double the rest, so that a long value is not parsed too often."""
        self._window, self._position = self._window[self._position :], 0
        if len(self._window) > MOST_ROW_BYTES:
            raise ValueError(f"a value without end; allowed are {MOST_ROW_BYTES >> 20} MB a row")
        wanted = max(1, len(self._window))
        parts: list[str] = []
        while wanted > 0 and (text := next(self._texts, None)) is not None:
            parts.append(text)
            wanted -= len(text)
        self._window += "".join(parts)
        return bool(parts)


def _as_row(number: int, value: object, place: str, hint: str = "") -> RawRow:
    if isinstance(value, dict):
        return RawRow(number, value)
    actual = json.dumps(value)[:60]
    return RawRow(number, None, f"{place}: found {actual}, allowed is an object {{…}} with named columns{hint}", actual)


def _array_hint(line: str) -> str:
    return "; a file that holds one array [{…}, {…}] is named .json" if line.lstrip().startswith("[") else ""


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"found {name}, which JSON does not know; write null")


def _json_problem(error: json.JSONDecodeError) -> str:
    """Return the parser's message and the text at its position."""
    rest = error.doc[error.pos : error.pos + 20]
    # a comma before a closing bracket is what people write most
    comma = error.doc[: error.pos].rstrip()[-1:] == "," and rest[:1] in "}]"
    return f"{error.msg} at {rest!r}{' (take out the comma before it)' if comma and rest else ''}"


_LINE = json.JSONDecoder(parse_constant=_no_constant)
