"""Write the curated rows for a dataset repository: plain chat messages in Parquet, with ids and sources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.data.records import Example, batches, read_rows
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

    with_extra, with_text, with_tools, with_learn = False, False, False, False
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
        with_extra = with_extra or any(m.extra is not None for m in row.messages)
        with_text = with_text or row.text is not None
        with_tools = with_tools or row.tools is not None
        with_learn = with_learn or not all(m.learn for m in row.messages)
    fields = [("role", pa.string()), ("content", pa.string())] + ([("extra", pa.string())] if with_extra else [])
    fields += [("learn", pa.bool_())] if with_learn else []
    columns = [("id", pa.string()), ("source", pa.string()), ("messages", pa.list_(pa.struct(fields)))]
    texts = [("text", with_text), ("tools", with_tools)]
    schema = pa.schema(columns + [(name, pa.string()) for name, there in texts if there])
    target.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with pq.ParquetWriter(target, schema, compression="zstd") as writer:
        for batch in batches(read_rows(source), CHUNK):
            count += len(batch)
            writer.write_table(pa.Table.from_pylist([_as_dict(row) for row in batch], schema))
    return {"rows": count, "columns": schema.names}


def _as_dict(row: Example) -> dict[str, object]:
    messages = [{"role": m.role, "content": m.content, "extra": m.extra, "learn": m.learn} for m in row.messages]
    return {"id": row.id, "source": row.source, "messages": messages, "text": row.text, "tools": row.tools}
