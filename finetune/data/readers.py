"""Raw rows of local files (jsonl, json, csv, parquet, also .gz and .zst) and of Hub datasets, one at a time."""

from __future__ import annotations

import csv
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.json_files import RawRow, json_file, json_lines
from finetune.data.text_files import CHUNK_BYTES, MOST_ROW_BYTES, lines, refuse
from finetune.errors import FinetuneError, InputError
from finetune.utils.files import hash_file
from finetune.utils.format import clipped, first_line
from finetune.utils.limits import memory

if TYPE_CHECKING:
    import pyarrow as pa

ARROW_ROWS = 1000
BATCH_BYTES, BATCH_MEMORY = 1 << 26, 1 << 30  # of rows that are unpacked at once; what that may take
TEXT_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")  # also packed, and in any encoding
BINARY_ENDINGS = (".parquet", ".arrow")
ENDINGS = (*TEXT_ENDINGS, *BINARY_ENDINGS)
PACKED = (".gz", ".zst")
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
SEPARATOR = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)  # the line before the header in which Excel names the mark
BYTES_OF = {  # what other files begin with
    b"\x1f\x8b\x08": "gzip; name it .gz at the end",
    b"\x28\xb5\x2f\xfd": "Zstandard; name it .zst at the end",
    b"PK\x03\x04": "a ZIP archive or an Excel sheet; unpack it, or save the sheet as CSV",
    b"BZh91AY&SY": "bzip2; unpack it",
    b"\xfd7zXZ\0": "xz; unpack it",
    b"PAR1\x15": "Parquet; name it .parquet",
    b"ARROW1\0\0": "Arrow; name it .arrow",
}


def content_digest(path: Path) -> str:
    """The xxh3-128 of a file's bytes, as 32 hexadecimal digits. Raises InputError if there is no such file."""
    require_file(path)
    try:
        return hash_file(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {_reason(error)}; change its permissions or copy it again") from None


def require_file(path: Path) -> None:
    """Raise InputError unless `path` is a file that is not empty, of a kind that we read."""
    try:
        str(path).encode()  # a row's id begins with the name, so it has to be text
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise InputError(f"{path} is a link to a file that is not there") from None
        raise InputError(
            f"there is no file {path}; a relative path is searched next to the recipe, then in the working directory"
        ) from None
    except (OSError, ValueError) as error:  # a link to itself, no permission, a name too long or with a zero in it
        raise InputError(f"{str(path)!r} cannot be looked at: {_reason(error)}; name another file") from None
    if stat.S_ISDIR(status.st_mode):
        raise InputError(f"{path} is a folder, not a file ({', '.join(ENDINGS)}, also .gz and .zst)")
    if not stat.S_ISREG(status.st_mode):  # opening a pipe waits for ever, and a device has no end
        raise InputError(f"{path} is a pipe, a socket or a device, not a regular file; save its rows in a file first")
    if status.st_size == 0:
        raise InputError(f"{path} is empty")
    file_ending(path)


def local_rows(path: Path, encoding: str | None = None) -> Iterator[RawRow]:
    """The rows of a file in order, in memory that does not grow with the file (one row, or one parquet batch).

    A line of JSON lines or a CSV record that does not parse comes as a RawRow with a `problem`. Raises InputError,
    naming file, line and what was found, if the file as a whole cannot be read. `encoding` is that of a text file.
    """
    require_file(path)
    ending = file_ending(path)
    if encoding is not None and ending in BINARY_ENDINGS:
        raise InputError(f"{path}: encoding {encoding} is that of text, and {ending} holds none; leave encoding out")
    if ending == ".parquet":
        return _table_rows(path, "parquet", _parquet_batches(path))
    if ending == ".arrow":
        return _table_rows(path, "Arrow", _arrow_batches(path))
    if not path.name.lower().endswith(PACKED):
        _require_text(path)
    read: dict[str, Callable[[Path, str | None], Iterator[RawRow]]]
    read = {".jsonl": json_lines, ".ndjson": json_lines, ".json": json_file, ".csv": _csv, ".tsv": _csv}
    return read[ending](path, encoding)


def _require_text(path: Path) -> None:
    """Raise InputError if the bytes of a text file are those of a packed or binary one."""
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError:
        return  # the reader reports it
    if (content := next((words for mark, words in BYTES_OF.items() if start.startswith(mark)), None)) is not None:
        raise InputError(f"{path}: its name is that of a text file and its content is {content}")


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
    """Rows skip+1 … skip+take (all that are left if `take` is None) of a split, kept under `cache` unless streamed.

    Raises InputError for a data set, config or split that does not exist, FinetuneError if the Hub fails.
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
        raise InputError(f"{what}: {first_line(error)}; check the name, or log in if it is private") from error
    except (ValueError, DatasetsError) as error:  # an unknown config or split, files that do not parse
        raise InputError(f"{what}: {first_line(error)}") from error
    except (OSError, EOFError) as error:
        raise FinetuneError(f"{what} could not be read: {first_line(error)}; run the same command again") from error


def file_ending(path: Path) -> str:
    """The ending that decides how a file is read. Raises InputError for another name."""
    name = path.name.lower()
    packed = next((p for p in PACKED if name.endswith(p)), "")
    ending = next((e for e in ENDINGS if name.removesuffix(packed).endswith(e)), None)
    if ending is None or (ending in BINARY_ENDINGS and packed):
        raise InputError(
            f"{path}: a file's name ends in {', '.join(ENDINGS)}; all but {' and '.join(BINARY_ENDINGS)} also with "
            ".gz or .zst"
        )
    return ending


def _csv(path: Path, encoding: str | None) -> Iterator[RawRow]:
    csv.field_size_limit(MOST_ROW_BYTES)  # the default of 128 KiB would refuse a long document
    first = next((text for _, text in lines(path, encoding) if text.strip()), "")
    named = SEPARATOR.fullmatch(first)
    mark = named[1] if named else _delimiter(first)
    reader = csv.reader((text for _, text in lines(path, encoding)), strict=True, delimiter=mark)
    number, header, begin = 0, None, 1
    try:
        for cells in reader:
            begin = reader.line_num + 1  # of the next record, for an error in it
            if not cells:
                continue
            if named and header is None:
                named = None
                continue
            if header is None:
                header = cells
                twice = next((c for c, times in Counter(header).items() if times > 1), None)
                if twice is not None:
                    refuse(path, 1, f"two columns {twice!r}", "each name once in the first line")
                continue
            number += 1
            if len(cells) != len(header):
                problem = f"line {reader.line_num}: found {len(cells)} fields, allowed is one for each of the columns "
                yield RawRow(
                    number, None, problem + clipped(", ".join(header[:100]), 300), mark.join(cells[:200])[:200]
                )
            else:
                yield RawRow(number, dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        actual = f"{first_line(error)}, in the record that begins on line {begin}"
        if "unexpected end of data" in str(error):
            actual = f'a quotation mark (") opened in the record that begins on line {begin} and never closed'
        allowed = f'CSV with {DELIMITERS.get(mark, repr(mark))}, quoted by ", a quotation mark inside doubled'
        refuse(path, reader.line_num, actual, allowed)


def _delimiter(header: str) -> str:
    """The mark that divides the first line into most columns; a comma on a tie."""
    return max(DELIMITERS, key=lambda mark: len(next(csv.reader([header], delimiter=mark), [])))


def _table_rows(path: Path, kind: str, batches: Iterator[pa.RecordBatch]) -> Iterator[RawRow]:
    """The rows of a Parquet or Arrow file, each batch read and unpacked within BATCH_MEMORY.

    A dictionary of one long text, say, has no size of its own in the file.
    """
    import pyarrow as pa

    def unpacked() -> list[dict[str, Any]] | None:
        with memory(BATCH_MEMORY):
            batch = next(batches, None)
            return None if batch is None else batch.to_pylist()

    number = 0
    try:
        while (rows := unpacked()) is not None:
            for row in rows:
                number += 1
                yield RawRow(number, row)
    except MemoryError:
        raise InputError(
            f"{path}: after row {number}: rows that unpack to more than {MOST_ROW_BYTES >> 20} MB each, or to more "
            f"than {BATCH_MEMORY / 1e9:.1f} GB together; is it what it should be?"
        ) from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: after row {number}: not readable as {kind}: {first_line(error)}") from error


def _rows_at_once(size: int, rows: int) -> int:
    """The rows that are unpacked together, of `rows` rows of `size` bytes. Raises MemoryError if one is too large."""
    row_bytes = size / max(1, rows)
    if row_bytes > MOST_ROW_BYTES:
        raise MemoryError
    return int(min(ARROW_ROWS, max(1, BATCH_BYTES // max(1, row_bytes))))


def _parquet_batches(path: Path) -> Iterator[pa.RecordBatch]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, buffer_size=CHUNK_BYTES, pre_buffer=False) as file:  # else it is read as a whole
        for group in range(file.num_row_groups):
            about = file.metadata.row_group(group)
            step = _rows_at_once(about.total_byte_size, about.num_rows)
            yield from file.iter_batches(batch_size=step, row_groups=[group])


def _arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The batches of an Arrow file, or of a stream in a file, as `datasets` writes it, in slices."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        if source.read(6) == b"ARROW1":
            file = pa.ipc.open_file(source)
            whole = (file.get_batch(i) for i in range(file.num_record_batches))
        else:
            source.seek(0)
            whole = iter(pa.ipc.open_stream(source))
        for batch in whole:
            step = _rows_at_once(batch.nbytes, batch.num_rows)
            yield from (batch.slice(start, step) for start in range(0, batch.num_rows, step))


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
