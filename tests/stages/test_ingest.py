"""The stage over real files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from finetune.context import Context
from finetune.data.records import read_rows
from finetune.errors import InputError
from finetune.recipe import Recipe, Runtime, Tracking
from finetune.stages import ingest

GOOD = {"instruction": "Add", "input": "1, 2", "output": "3", "score": 0.5}
BAD = {"instruction": "Add", "output": None}


def file(folder: Path, rows: list[dict[str, Any]], name: str = "x.jsonl") -> str:
    """The path of a file with these rows."""
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def spec_of(*sources: dict[str, Any], allowed: float = 0.01) -> ingest.Spec:
    """What the stage sees of a recipe with these sources."""
    raw = {"name": "t", "model": "builtin:tiny-mistral", "data": sources, "ingest": {"max_refused_fraction": allowed}}
    return ingest.spec(Recipe.model_validate(raw))


def local(path: str, **how: Any) -> dict[str, Any]:
    """A local source as the recipe writes it."""
    return {"source": "local", "path": path, **how}


def run(spec: ingest.Spec, folder: Path, say: list[str] | None = None) -> tuple[dict[str, Any], Path]:
    """The metrics and the folder the stage wrote."""
    out = folder / "out"
    out.mkdir(exist_ok=True)
    heard = [] if say is None else say
    return ingest.run(spec, {}, out, Context(folder / "scratch", Runtime(), Tracking(), say=heard.append)), out


def test_rows_refusals_and_figures(tmp_path: Path) -> None:
    said: list[str] = []
    path = file(tmp_path, [GOOD, BAD, GOOD])
    metrics, out = run(spec_of(local(path), local(path, skip=2), allowed=0.5), tmp_path, said)
    assert metrics == {
        "rows_out": 3,
        "sources": {"x.jsonl": {"rows": 2, "refused": 1}, "x.jsonl#2": {"rows": 1, "refused": 0}},
        "refused": {"null": 1},
        "formats": {"x.jsonl": "alpaca", "x.jsonl#2": "alpaca"},
        "unused": {"x.jsonl": ["score"], "x.jsonl#2": ["score"]},
        "notes": {},
    }
    rows = list(read_rows(out / "rows.parquet"))
    assert [(r.id, r.source) for r in rows] == [
        ("x.jsonl:1",) * 1 + ("x.jsonl",),
        ("x.jsonl:3", "x.jsonl"),
        ("x.jsonl#2:3", "x.jsonl#2"),
    ]
    assert rows[0].messages[0].content == "Add\n\n1, 2"
    assert rows[0].column("score") == 0.5
    (refused,) = pq.read_table(out / "refused.parquet").to_pylist()
    assert (refused["id"], refused["reason"], refused["source"]) == ("x.jsonl:2", "null", "x.jsonl")
    assert "output: found null" in refused["detail"]
    assert said[0].startswith("x.jsonl: format alpaca, since there is 'instruction' and 'output'")


def test_too_many_refused_rows_stop_the_run_and_few_do_not(tmp_path: Path) -> None:
    path = file(tmp_path, [GOOD] * 98 + [BAD] * 2)
    assert run(spec_of(local(path), allowed=0.02), tmp_path)[0]["rows_out"] == 98
    with pytest.raises(
        InputError, match=r"2 of 100 rows \(2.0%\).*max_refused_fraction.*\[x.jsonl:99\] output: found null"
    ):
        run(spec_of(local(path), allowed=0.019), tmp_path)


def test_many_refused_rows_are_all_written_and_none_is_held(tmp_path: Path) -> None:
    path = file(tmp_path, [GOOD] + [BAD] * 10_500)
    metrics, out = run(spec_of(local(path), allowed=1), tmp_path)
    refused = pq.read_table(out / "refused.parquet")
    assert metrics["refused"] == {"null": 10_500} and refused.num_rows == 10_500
    assert pq.ParquetFile(out / "refused.parquet").num_row_groups == 2
    assert refused.column("id").to_pylist()[-1] == "x.jsonl:10501"


def test_long_rows_make_row_groups_of_fewer_rows(tmp_path: Path) -> None:
    path = file(tmp_path, [{"instruction": "Tell", "output": "long " * 400_000}] * 9)  # 2 MB each
    _, out = run(spec_of(local(path)), tmp_path)
    assert pq.ParquetFile(out / "rows.parquet").num_row_groups == 2
    assert len(list(read_rows(out / "rows.parquet"))) == 9


def test_no_row_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no row could be read from x.jsonl. \[x.jsonl:1\]"):
        run(spec_of(local(file(tmp_path, [BAD]), format="alpaca"), allowed=1), tmp_path)


def test_a_hopeless_source_is_given_up_early(tmp_path: Path) -> None:
    path = file(tmp_path, [BAD] * 5000)
    with pytest.raises(InputError, match="none of its first rows fits"):
        run(spec_of(local(path), allowed=1), tmp_path)


def test_the_same_content_gives_the_same_bytes_wherever_it_lies(tmp_path: Path) -> None:
    outs = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        outs.append(run(spec_of(local(file(tmp_path / name, [GOOD, BAD])), allowed=1), tmp_path / name)[1])
    for name in ("rows.parquet", "refused.parquet"):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()


def test_the_key_changes_with_the_content_and_not_with_place_or_weight(tmp_path: Path) -> None:
    def key(path: str, **how: Any) -> tuple[object, object]:
        spec = spec_of(local(path, **how))
        return spec.model_dump(mode="json"), ingest.fingerprint(spec)

    (tmp_path / "b").mkdir()
    path = file(tmp_path, [GOOD])
    first = key(path)
    assert key(path, weight=3) == first
    assert key(path, rows=3) == first
    assert key(file(tmp_path / "b", [GOOD])) == first
    assert str(tmp_path) not in json.dumps(first)
    assert key(path, take=1) != first
    assert key(file(tmp_path, [GOOD, GOOD])) != first


def test_a_second_run_imports_nothing_heavy(tmp_path: Path) -> None:
    heavy = ("torch", "datasets", "pyarrow", "numpy", "transformers", "huggingface_hub")
    code = (
        "import sys; from pathlib import Path; from finetune.recipe import LocalSource, PydocSource; "
        "from finetune.stages import ingest, filter; "
        "s = [LocalSource(source='local', path=Path(sys.argv[1])), PydocSource(source='pydoc')]; "
        "ingest.fingerprint(ingest.Spec(data=s, max_refused_fraction=0)); "
        f"sys.exit(','.join(m for m in {heavy!r} if m in sys.modules) or 0)"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code, file(tmp_path, [GOOD])]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
