"""Message, Example and the row files that every stage reads and writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import pyarrow as pa

ROLES = ("system", "user", "assistant", "tool")
REJECTED_CHARACTERS = 200  # of a row that is left out, so that a person knows it again
ROW_GROUP_CHARACTERS = 1 << 24  # what a Parquet file is read and written by; long rows make groups of fewer


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `extra` is canonical JSON of what else the turn carries (tool_calls, name), or None.

    `learn` is False for an assistant turn that carries no label; it stays in the context of the turns after it.
    """

    role: str
    content: str
    extra: str | None = None
    learn: bool = True


@dataclass(frozen=True, slots=True)
class Example:
    """One training row.

    `id` is `SOURCE:N`, N the 1-based number of the row in its source, so that a person can find it again.
    `messages` is empty for a raw-text row; `text` is None for every other row.
    `extra` is canonical JSON of the scalar columns that the format did not use (a score, a licence), or None.
    `tools` is canonical JSON of the list of tool definitions that the row offers, or None.
    """

    id: str
    source: str
    messages: tuple[Message, ...] = ()
    text: str | None = None
    extra: str | None = None
    tools: str | None = None

    def joined(self, *roles: str) -> str:
        """The contents of all turns with one of `roles`, joined by newlines; a raw row's whole text."""
        if self.text is not None:
            return self.text
        return "\n".join(m.content for m in self.messages if m.role in roles)

    def column(self, name: str) -> str | int | float | bool | None:
        """The scalar that column `name` had in the source, or None."""
        return json.loads(self.extra).get(name) if self.extra else None


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that a step left out: which, by which rule, and why; if a figure decided, that figure and its limit."""

    id: str
    source: str
    reason: str
    detail: str
    text: str = field(default="")
    value: float | None = None
    limit: float | None = None

    @classmethod
    def of(cls, row: Example, reason: str, detail: str, value: float | None = None, limit: float | None = None) -> Self:
        """The reject for a row that was read, with the beginning of its text."""
        return cls(row.id, row.source, reason, detail, row.joined(*ROLES)[:REJECTED_CHARACTERS], value, limit)


def rows_schema() -> pa.Schema:
    """The columns of every `rows.parquet`."""
    import pyarrow as pa

    texts = [(name, pa.string()) for name in ("role", "content", "extra")]
    message = pa.struct([*texts, ("learn", pa.bool_())])
    return pa.schema(
        [
            ("id", pa.string()),
            ("source", pa.string()),
            ("messages", pa.list_(message)),
            ("text", pa.string()),
            ("extra", pa.string()),
            ("tools", pa.string()),
        ]
    )


def write_rows(path: Path, rows: Iterable[Example], chunk: int = 10_000) -> int:
    """Write `rows` to Parquet; returns their number.

    No more than `chunk` rows are held at a time, and no more than ROW_GROUP_CHARACTERS of text and one row.
    """
    import pyarrow.parquet as pq

    count = characters = 0
    with pq.ParquetWriter(path, rows_schema(), compression="zstd") as writer:
        batch: list[Example] = []
        for row in rows:
            batch.append(row)
            count += 1
            characters += len(row.text or "") + len(row.extra or "") + sum([len(m.content) for m in row.messages])
            if len(batch) == chunk or characters >= ROW_GROUP_CHARACTERS:
                writer.write_table(_as_table(batch))
                batch, characters = [], 0
        writer.write_table(_as_table(batch))
    return count


def batches(rows: Iterable[Example], size: int) -> Iterator[list[Example]]:
    """Yield lists of `size` rows; the last may be shorter."""
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch


def read_rows(path: Path, chunk: int = 1000) -> Iterator[Example]:
    """The rows of a file that `write_rows` wrote, in order, one row group and `chunk` rows of memory at a time.

    `learn` and `tools` have their defaults in files of earlier releases, which have no such columns.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, pre_buffer=False) as file:  # which would read all row groups ahead
        for batch in file.iter_batches(batch_size=chunk):
            yield from examples_of(batch)


@dataclass(frozen=True, slots=True)
class RowRange:
    """The rows `start` to `stop` (exclusive) of a file that `write_rows` wrote."""

    path: Path
    start: int
    stop: int

    def read(self) -> list[Example]:
        """The rows, reading only the row groups that hold them."""
        return [row for batch in self.table().combine_chunks().to_batches() for row in examples_of(batch)]

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows as a table, reading only the row groups that hold them; all columns, or some."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.path, pre_buffer=False) as file:
            names = list(columns or file.schema_arrow.names)
            found, first = [file.schema_arrow.empty_table().select(names)], 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if first < self.stop and self.start < first + count:
                    low, high = max(self.start - first, 0), min(self.stop - first, count)
                    found.append(file.read_row_group(group, columns=names).slice(low, high - low))
                first += count
        return pa.concat_tables(found)


def row_ranges(path: Path, size: int) -> list[RowRange]:
    """A file of rows in ranges of `size` rows, the last one shorter."""
    import pyarrow.parquet as pq

    rows = pq.read_metadata(path).num_rows
    return [RowRange(path, start, min(start + size, rows)) for start in range(0, rows, size)]


def examples_of(batch: pa.RecordBatch) -> Iterator[Example]:
    """The rows of a batch of such a file; whole columns are converted at once, which takes a third of the time."""
    messages = batch.column("messages")
    fields = {f.name: i for i, f in enumerate(messages.type.value_type)}
    parts = messages.flatten().flatten()
    turns = map(Message, *(parts[fields[name]].to_pylist() for name in ("role", "content", "extra", "learn")
                           if name in fields))  # fmt: skip
    names = [name for name in ("id", "source", "text", "extra", "tools") if name in batch.schema.names]
    columns = [batch.column(name).to_pylist() for name in names]
    for length, row_id, source, text, extra, *tools in zip(messages.value_lengths().to_pylist(), *columns, strict=True):
        yield Example(row_id, source, tuple(islice(turns, length)), text, extra, *tools)


def _as_table(rows: Sequence[Example]) -> pa.Table:
    import pyarrow as pa

    schema = rows_schema()
    turns = [m for row in rows for m in row.messages]
    message = schema.field("messages").type
    columns = ([m.role for m in turns], [m.content for m in turns], [m.extra for m in turns], [m.learn for m in turns])
    fields = list(message.value_type)
    structs = pa.StructArray.from_arrays(
        [pa.array(c, f.type) for c, f in zip(columns, fields, strict=True)], fields=fields
    )
    offsets = pa.array([0, *accumulate(len(row.messages) for row in rows)], pa.int32())
    texts = {f.name: pa.array([getattr(r, f.name) for r in rows], f.type) for f in schema if f.name != "messages"}
    lists = pa.ListArray.from_arrays(offsets, structs, type=message)
    return pa.table([lists if f.name == "messages" else texts[f.name] for f in schema], schema=schema)


def write_table(
    path: Path, columns: Mapping[str, Sequence[object]], types: Mapping[str, pa.DataType] | None = None
) -> None:
    """Write named columns of equal length to Parquet; `types` fixes a column's type if it could be all null."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {name: pa.array(values, (types or {}).get(name)) for name, values in columns.items()}
    pq.write_table(pa.table(arrays), path, compression="zstd")


@contextmanager
def reject_writer(path: Path, chunk: int = 10_000) -> Iterator[Callable[[Reject], None]]:
    """Within this block a function that writes one reject; no more than `chunk` of them are held in memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [(name, pa.string()) for name in ("id", "source", "reason", "detail", "text")]
    schema = pa.schema([*texts, ("value", pa.float64()), ("limit", pa.float64())])
    batch: list[dict[str, object]] = []
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:

        def write(reject: Reject) -> None:
            batch.append(asdict(reject))
            if len(batch) == chunk:
                writer.write_table(pa.Table.from_pylist(batch, schema))
                batch.clear()

        yield write
        writer.write_table(pa.Table.from_pylist(batch, schema))
