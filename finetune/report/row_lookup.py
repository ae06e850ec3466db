"""Look up rows by id, their dropped duplicates and token lengths; needs `tokenizers`, but no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.data.records import Example

if TYPE_CHECKING:
    import pyarrow as pa

COUNTED_ROWS = 20_000  # of a larger file every k-th row is counted: a histogram looks the same
BATCH_ROWS = 10_000


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that repeats another: its id, how that was found, the score, and its text once it is looked up."""

    id: str
    kept_id: str
    method: str
    score: float


def _read(path: Path, column: str, values: Collection[str], columns: Sequence[str] | None = None) -> pa.Table:
    """Return the rows of a Parquet file whose `column` is one of `values`; row groups are read one by one."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    wanted = pc.field(column).isin(pa.array(sorted(values), pa.string()))
    return pq.read_table(path, columns=columns, filters=wanted)


def rows_by_id(path: Path, ids: Collection[str]) -> dict[str, Example]:
    """Return the rows with those ids; missing ids are left out."""
    from finetune.data.records import examples_of

    return {row.id: row for batch in _read(path, "id", ids).to_batches() for row in examples_of(batch)}


def dropped_for(pairs: Path, kept: Collection[str]) -> dict[str, list[Dropped]]:
    """Return per kept id the rows dropped as its duplicates, nearest first; an id of a copy (`~2`) means its row."""
    from finetune.dedup.select import original_id

    originals = {row_id: original_id(row_id) for row_id in kept}
    groups: dict[str, list[Dropped]] = {}
    for row in _read(pairs, "kept_id", set(originals.values())).to_pylist():
        one = Dropped(row["dropped_id"], row["kept_id"], row["method"], row["score"])
        groups.setdefault(one.kept_id, []).append(one)
    for group in groups.values():
        group.sort(key=lambda d: (-d.score, d.id))
    return {row_id: groups.get(original, []) for row_id, original in originals.items()}


def largest_groups(pairs: Path, count: int) -> list[list[Dropped]]:
    """Return the `count` kept rows with most dropped duplicates, each group with its farthest row first."""
    import pyarrow.parquet as pq

    names = pq.read_table(pairs, columns=["kept_id"])["kept_id"].to_pylist()
    chosen = [name for name, _ in Counter(names).most_common(count)]  # ties: in the order of the rows
    groups = dropped_for(pairs, chosen)
    return [sorted(groups[name], key=lambda d: (d.score, d.id)) for name in chosen]


def sources_of(paths: Sequence[Path]) -> list[Counter[str]]:
    """Return for each rows file the number of rows per source."""
    import pyarrow.parquet as pq

    counted = (pq.read_table(path, columns=["source"])["source"].value_counts().to_pylist() for path in paths)
    return [Counter({entry["values"]: entry["counts"] for entry in counts}) for counts in counted]


def source_by_id(paths: Sequence[Path], ids: Collection[str]) -> dict[str, str]:
    """Return the source of each of those rows."""
    rows = [row for path in paths for row in _read(path, "id", ids, ["id", "source"]).to_pylist()]
    return {row["id"]: row["source"] for row in rows}


def rendered_lengths(paths: Sequence[Path]) -> list[int]:
    """Return the tokens of every rendered row."""
    import pyarrow.parquet as pq

    return [length for path in paths for length in pq.read_table(path, columns=["length"])["length"].to_pylist()]


def raw_lengths(rows: Path, tokenizer: Path) -> tuple[list[int], int]:
    """Tokens of the rows' turns without any template, and the number k: every k-th row was counted."""
    import pyarrow.parquet as pq
    from tokenizers import Tokenizer

    counter = Tokenizer.from_file(str(tokenizer))
    counter.no_truncation()
    counter.no_padding()
    step = max(1, -(-pq.read_metadata(rows).num_rows // COUNTED_ROWS))
    lengths: list[int] = []
    for texts in _turns(rows, step):
        flat = counter.encode_batch_fast([t for row in texts for t in row], add_special_tokens=False)
        counts = iter(map(len, flat))
        lengths += [sum(next(counts) for _ in row) for row in texts]
    return lengths, step


def _turns(rows: Path, step: int) -> Iterator[list[list[str]]]:
    """The texts of the turns of every `step`-th row, a batch at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    at = 0
    with pq.ParquetFile(rows) as file:
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=["messages", "text"]):
            first = -at % step
            picked = batch.take(pa.array(range(first, batch.num_rows, step), pa.int64()))
            at += batch.num_rows
            yield [_contents(row) for row in picked.to_pylist()]


def _contents(row: Mapping[str, object]) -> list[str]:
    if row["text"] is not None:
        return [str(row["text"])]
    messages = row["messages"]
    return [str(m["content"]) for m in messages] if isinstance(messages, list) else []


def question_and_answer(row: Example) -> tuple[str, str]:
    """Return a row's prompt and answer; a raw text is all prompt."""
    if row.text is not None:
        return row.text, ""
    asked = "\n".join(m.content for m in row.messages if m.role != "assistant")
    return asked, row.joined("assistant")
