"""Write the curated rows for a dataset repository: plain chat messages in Parquet, with ids and sources."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetune.data.records import batches, read_rows
from finetune.errors import InputError
from finetune.utils.secrets import find_secrets

CHUNK = 10_000


def write_curated(source: Path, target: Path) -> dict[str, Any]:
    """Write the rows of `source` (records.rows_schema) as `id`, `source`, `messages` (role, content).

    Messages also have `extra` (tool calls, as JSON) and `learn` (false for a turn without labels) if any row has them;
    rows have `text` (raw text) and `tools` (JSON) if any row has them. Other columns of a source are left out. Equal
    rows give equal bytes.

    Returns:
        {"rows", "columns": [name]}.

    Raises:
        InputError: a row holds an apparent credential.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    used = set()  # optional columns that some row has
    for row in read_rows(source):
        scanned = [
            row.joined("system", "user", "assistant", "tool"),
            *(m.extra or "" for m in row.messages),
            row.tools or "",
        ]
        if secrets := find_secrets("\n".join(scanned)):
            raise InputError(
                f"cannot publish the rows: {row.id} holds {secrets[0].split(' in line')[0]}; remove it and run again"
            )
        used |= {name for name in ("text", "tools") if getattr(row, name) is not None}
        used |= {"extra" for m in row.messages if m.extra is not None} | {"learn" for m in row.messages if not m.learn}
    optional = [("extra", pa.string()), ("learn", pa.bool_())]
    fields = [("role", pa.string()), ("content", pa.string()), *(field for field in optional if field[0] in used)]
    columns = [("id", pa.string()), ("source", pa.string()), ("messages", pa.list_(pa.struct(fields)))]
    schema = pa.schema(columns + [(name, pa.string()) for name in ("text", "tools") if name in used])
    target.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with pq.ParquetWriter(target, schema, compression="zstd") as writer:
        for batch in batches(read_rows(source), CHUNK):
            count += len(batch)
            writer.write_table(pa.Table.from_pylist([asdict(row) for row in batch], schema))
    return {"rows": count, "columns": schema.names}
