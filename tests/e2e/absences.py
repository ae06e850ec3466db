"""Why rows are absent, by what a person can read: the tables that the stages of a run leave, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

TABLES = (  # stage, file, the column that names the absent row
    ("ingest", "refused.parquet", "id"),
    ("filter", "rejects.parquet", "id"),
    ("dedup", "pairs.parquet", "dropped_id"),
    ("decontaminate", "pairs.parquet", "dropped_id"),
    ("sample", "rejects.parquet", "id"),
    ("render", "rejects.parquet", "id"),
)


@dataclass(frozen=True)
class Absence:
    """Which stage left a row out, the rule or method, and the other row or the sentence that it names."""

    stage: str
    why: str
    named: str


def absences(folders: Mapping[str, Path]) -> dict[str, list[Absence]]:
    """Row id → every reason that is on record for its absence."""
    found: dict[str, list[Absence]] = {}
    for stage, file, column in TABLES:
        if stage not in folders:
            continue
        for row in pq.read_table(folders[stage] / file).to_pylist():
            named = row.get("kept_id") or row.get("evaluation_id") or row["detail"]
            found.setdefault(row[column], []).append(Absence(stage, row.get("reason") or row["method"], named))
    return found


def present(folders: Mapping[str, Path]) -> set[str]:
    """The ids of the rows that are trained on or held out, copies under the id of their row."""
    tables = [pq.read_table(folders["render"] / f"{side}.parquet", columns=["id"]) for side in ("train", "eval")]
    return {row_id.split("~")[0] for table in tables for row_id in table["id"].to_pylist()}
