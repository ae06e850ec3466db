"""Raw rows of local files (jsonl, json, csv, parquet, also .gz and .zst) and of Hub datasets, one at a time."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn, cast

import xxhash

from finetune.data.zstd import ZstdStream
from finetune.errors import FinetuneError, InputError

CHUNK_BYTES = 1 << 20
ARROW_ROWS = 1000
ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
PACKED = (".gz", ".zst")
UNREADABLE = (EOFError, OSError, zlib.error)
BLANK = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as its source holds it.

    `number` is 1-based (in JSON lines: the line). `row` is None where `problem` says what is wrong with this row alone;
    `text` is then the start of what was found.
    """

    number: int
    row: dict[str, object] | None
    problem: str = ""
    text: str = ""


def content_digest(path: Path) -> str:
    """The xxh3-128 of a file's bytes, as 32 hexadecimal digits. Raises InputError where there is no such file."""
    require_file(path)
    digest = xxhash.xxh3_128()
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {_reason(error)}; change its permissions or copy it again") from None
    return digest.hexdigest()


def require_file(path: Path) -> None:
    """Raise InputError unless `path` is a file that is not empty, of a kind that we read."""
    try:
        str(path).encode()  # a row's id begins with the name, so it has to be text
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise InputError(f"{path} is a link to a file that is not there") from None
        raise InputError(
            f"there is no file {path}; a relative path is looked for beside the recipe, then under the working folder"
        ) from None
    except (OSError, ValueError) as error:  # a link to itself, no permission, a name too long or with a zero in it
        raise InputError(f"{str(path)!r} cannot be looked at: {_reason(error)}; name another file") from None
    if stat.S_ISDIR(found.st_mode):
        raise InputError(f"{path} is a folder; name one file in it ({', '.join(ENDINGS)}, also .gz and .zst)")
    if not stat.S_ISREG(found.st_mode):  # opening a pipe waits for ever, and a device has no end
        raise InputError(f"{path} is no regular file but a pipe, a socket or a device; save its rows in a file first")
    if found.st_size == 0:
        raise InputError(f"{path} is empty")
    _ending(path)


def local_rows(path: Path) -> Iterator[RawRow]:
    """The rows of a file in order, in memory that does not grow with the file (one row, or one parquet batch).

    A line of JSON lines or a CSV record that does not parse comes as a RawRow with a `problem`. Raises InputError,
    naming file, line and what was found, where the file as a whole cannot be read.
    """
    require_file(path)
    read = {".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    return read[_ending(path)](path)


def hub_rows(
    repo_id: str,
    split: str,
    *,
    config: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    skip: int = 0,
    take: int | None = None,
    cache: Path,
) -> Iterator[RawRow]:
    """Rows skip+1 … skip+take (all that are left where `take` is None) of a split, kept under `cache` unless streamed.

    Raises InputError for a data set, config or split that does not exist, FinetuneError where the Hub fails.
    """
    from datasets import Dataset, IterableDataset, load_dataset

    with _hub_errors(repo_id, split):
        data = load_dataset(
            repo_id, config, split=split, revision=revision, streaming=streaming, cache_dir=str(cache / "datasets")
        )
    if isinstance(data, IterableDataset):
        data = data.skip(skip) if skip else data
        data = data.take(take) if take is not None else data
    elif isinstance(data, Dataset):
        data = data.select(range(min(skip, len(data)), min(len(data), len(data) if take is None else skip + take)))
    else:
        raise InputError(f"Hub data set {repo_id}: {split!r} names several splits; name one")
    with _hub_errors(repo_id, split):
        for number, row in enumerate(data, start=skip + 1):
            yield RawRow(number, dict(row))


@contextmanager
def _hub_errors(repo_id: str, split: str) -> Iterator[None]:
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    what = f"Hub data set {repo_id}, split {split!r}"
    try:
        yield
    except DatasetNotFoundError as error:
        raise InputError(f"{what}: {_first_line(error)}; look at the name, or log in where it is private") from error
    except (ValueError, DatasetsError) as error:  # an unknown config or split, files that do not parse
        raise InputError(f"{what}: {_first_line(error)}") from error
    except (OSError, EOFError) as error:
        raise FinetuneError(f"{what} could not be read: {_first_line(error)}; run the same command again") from error


def _ending(path: Path) -> str:
    name = path.name.lower()
    packed = next((p for p in PACKED if name.endswith(p)), "")
    ending = next((e for e in ENDINGS if name.removesuffix(packed).endswith(e)), None)
    if ending is None or (ending == ".parquet" and packed):
        raise InputError(f"{path}: a file's name ends in {', '.join(ENDINGS)}; all but the last also with .gz or .zst")
    return ending


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked."""
    if path.suffix.lower() == ".gz":
        with gzip.open(path, "rb") as stream:
            yield cast("BinaryIO", stream)
    elif path.suffix.lower() == ".zst":
        with path.open("rb") as file:
            yield io.BufferedReader(ZstdStream(file), CHUNK_BYTES)
    else:
        with path.open("rb") as file:
            yield file


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their numbers; a byte order mark is left out."""
    number = 0
    try:
        with _opened(path) as stream:
            for number, raw in enumerate(stream, start=1):
                if number == 1:
                    raw = _without_mark(path, raw)
                yield number, raw.decode()
    except UnicodeDecodeError as error:
        _refuse(path, number, f"the byte 0x{error.object[error.start]:02x} at byte {error.start}", "UTF-8 text")
    except UNREADABLE as error:
        _refuse(path, number + 1, f"a file that is damaged or cut off ({_first_line(error)})", "a whole file")


def _without_mark(path: Path, start: bytes) -> bytes:
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        _refuse(path, 1, "UTF-16 text", "UTF-8 text; save it as UTF-8")
    if b"\0" in start[:2]:  # no text begins so, but one in UTF-16 does where its mark is missing
        _refuse(path, 1, "a zero byte, as in UTF-16 text", "UTF-8 text; save it as UTF-8")
    return start.removeprefix(codecs.BOM_UTF8)


def _json_lines(path: Path) -> Iterator[RawRow]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line, parse_constant=_no_constant)
        except json.JSONDecodeError as error:
            problem = f"line {number}, column {error.colno}: {_json_problem(error)}{_array_hint(line)}"
            yield RawRow(number, None, problem, line[:200])
        except (ValueError, RecursionError) as error:
            yield RawRow(number, None, f"line {number}: {_first_line(error)}", line[:200])
        else:
            yield _as_row(number, value, f"line {number}", _array_hint(line))


def _json(path: Path) -> Iterator[RawRow]:
    """An array of objects; a file of JSON lines that is only called .json is read as such."""
    text = _ArrayText(_chunks(path))
    if text.peek() != "{":
        yield from _json_array(path, text)
        return
    number, line = next((n, t) for n, t in _lines(path) if t.strip())
    try:
        json.loads(line, parse_constant=_no_constant)
    except ValueError:
        _refuse(path, number, "one JSON object over several lines", "an array of objects, or one object a line")
    yield from _json_lines(path)


def _json_array(path: Path, text: _ArrayText) -> Iterator[RawRow]:
    if text.peek() != "[":
        _refuse(path, text.line, repr(text.peek()), "an array of objects, [{…}, {…}]")
    text.skip()
    number = 0
    while text.peek() != "]" or number:
        text.peek()
        number, line = number + 1, text.line
        try:
            value = text.value()
        except json.JSONDecodeError as error:
            _refuse(path, text.line_at(error.pos), _json_problem(error), "JSON")
        except (ValueError, RecursionError) as error:
            _refuse(path, line, _first_line(error), "JSON")
        yield _as_row(number, value, f"element {number}, line {line}")
        mark = text.peek()
        if mark == "]":
            break
        if mark != ",":
            found = repr(mark) if mark else "the end of the file"
            _refuse(path, text.line, f"{found} after element {number}", "a comma or the closing ]")
        text.skip()
        if text.peek() == "]":
            _refuse(path, text.line, "a comma after the last element", "no comma there")
    text.skip()
    if text.peek():
        _refuse(path, text.line, f"{text.peek()!r} after the array", "nothing there")


class _ArrayText:
    """A window over the text of a JSON array: it grows to the next value and lets go of what was parsed."""

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
        wanted = max(1, len(self._window))
        parts: list[str] = []
        while wanted > 0 and (text := next(self._texts, None)) is not None:
            parts.append(text)
            wanted -= len(text)
        self._window += "".join(parts)
        return bool(parts)


def _chunks(path: Path) -> Iterator[str]:
    """The text of a file in pieces, none of them empty."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, first = 1, True
    try:
        with _opened(path) as stream:
            while raw := stream.read(CHUNK_BYTES):
                text = decoder.decode(_without_mark(path, raw) if first else raw)
                first = False
                if text:
                    yield text
                line += text.count("\n")
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        line += error.object[: error.start].count(b"\n")
        _refuse(path, line, f"the byte 0x{error.object[error.start]:02x}", "UTF-8 text")
    except UNREADABLE as error:
        _refuse(path, line, f"a file that is damaged or cut off ({_first_line(error)})", "a whole file")


def _csv(path: Path) -> Iterator[RawRow]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB would refuse a long document
    reader = csv.reader((text for _, text in _lines(path)), strict=True)
    number, header, begin = 0, None, 1
    try:
        for cells in reader:
            begin = reader.line_num + 1  # of the next record, for an error in it
            if not cells:
                continue
            if header is None:
                header = cells
                twice = next((c for i, c in enumerate(header) if c in header[:i]), None)
                if twice is not None:
                    _refuse(path, 1, f"two columns {twice!r}", "each name once in the first line")
                continue
            number += 1
            if len(cells) != len(header):
                problem = f"line {reader.line_num}: found {len(cells)} fields, allowed is one for each of the columns "
                yield RawRow(number, None, f"{problem}{', '.join(header)}", ",".join(cells)[:200])
            else:
                yield RawRow(number, dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        found = f"{_first_line(error)}, in the record that begins on line {begin}"
        if "unexpected end of data" in str(error):
            found = f'a quotation mark (") opened in the record that begins on line {begin} and never closed'
        _refuse(path, reader.line_num, found, 'CSV with commas, quoted by ", a quotation mark inside doubled')


def _parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path, buffer_size=CHUNK_BYTES, pre_buffer=False) as file:  # else it is read as a whole
            for batch in file.iter_batches(batch_size=ARROW_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield RawRow(number, row)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: after row {number}: not readable as parquet: {_first_line(error)}") from error


def _as_row(number: int, value: object, place: str, hint: str = "") -> RawRow:
    if isinstance(value, dict):
        return RawRow(number, value)
    found = json.dumps(value)[:60]
    return RawRow(number, None, f"{place}: found {found}, allowed is an object {{…}} with named columns{hint}", found)


def _array_hint(line: str) -> str:
    return "; a file that holds one array [{…}, {…}] is named .json" if line.lstrip().startswith("[") else ""


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"found {name}, which JSON does not know; write null")


def _json_problem(error: json.JSONDecodeError) -> str:
    """What the parser says, and the text where it says it."""
    rest = error.doc[error.pos : error.pos + 20]
    # a comma before a closing bracket is what people write most
    comma = error.doc[: error.pos].rstrip()[-1:] == "," and rest[:1] in "}]"
    return f"{error.msg} at {rest!r}{' (take out the comma before it)' if comma and rest else ''}"


def _refuse(path: Path, line: int, found: str, allowed: str) -> NoReturn:
    raise InputError(f"{path}, line {line}: found {found}; allowed is {allowed}")


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _first_line(error: object) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
