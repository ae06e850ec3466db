"""A folder of rows in several formats' files and held-out rows of one's own, through the stages up to pack."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.in_process import Laboratory


@pytest.fixture
def lab(pristine, tmp_path: Path) -> Laboratory:
    return Laboratory(tmp_path, pristine.folder / "base")


def test_own_held_out_rows_are_rendered_apart_and_never_trained_on(lab: Laboratory) -> None:
    (lab.folder / "rows").mkdir()
    rows = [{"prompt": f"What is number {i}?", "completion": f"It is {i}."} for i in range(12)]
    lab.put("rows/a.jsonl", rows[:6])
    lab.put("rows/b.csv", "question;answer;score\n" + "".join(f"{r['prompt']};{r['completion']};1\n" for r in rows[6:]))
    held = lab.put("held.json", json.dumps({"data": [rows[2], rows[8], {"prompt": "Who?", "completion": "I."}]}))
    done = lab.run(lab.folder / "rows", sets=[f'eval_data=[{{"source": "local", "path": "{held}"}}]'])
    assert (done.metrics["ingest"]["rows_out"], done.metrics["ingest"]["eval_rows"]) == (12, 3)
    assert done.metrics["ingest"]["notes"]["rows"] == {
        **{f"the column {name!r} is missing in b.csv": 1 for name in ("completion", "prompt")},
        **{f"the column {name!r} is missing in a.jsonl": 1 for name in ("answer", "question", "score")},
    }
    pairs = [(p["dropped_id"], p["evaluation_id"]) for p in done.table("decontaminate", "pairs.parquet")]
    assert pairs == [("rows/a.jsonl:3", "held.json:1"), ("rows/b.csv:3", "held.json:2")]
    assert (done.metrics["render"]["rows"], done.metrics["render"]["eval_rows"]) == (10, 3)
