"""Sources of each kind as examples and rejects."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from finetune.data import pydoc_rows
from finetune.data.records import Example, Reject
from finetune.data.sources import read_source, source_fingerprint
from finetune.errors import InputError
from finetune.recipe import HubSource, LocalSource, PydocSource
from tests.helpers.hub_server import serve

ROOT = Path(__file__).parents[2]


def local(folder: Path, rows: Sequence[object], name: str = "x.jsonl", **how: Any) -> LocalSource:
    """A file of rows as a source; a string is a line as it stands."""
    path = folder / name
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return LocalSource(source="local", path=path, **how)


PAIR = {"prompt": "Hi", "completion": "Ho"}


def test_rows_and_refusals_come_in_order_with_their_place(tmp_path: Path) -> None:
    source = local(tmp_path, [PAIR, {"prompt": "Hi", "completion": None}, "{,}", {**PAIR, "note": "\ud800"}, PAIR])
    decision, rows = read_source(source, "lab", tmp_path)
    found = list(rows)
    assert decision.format == "prompt_completion"
    assert [row.id for row in found] == [f"lab:{i}" for i in range(1, 6)]
    assert [row.reason for row in found if isinstance(row, Reject)] == ["null", "unreadable", "surrogate"]
    assert "completion: found null" in found[1].detail  # type: ignore[union-attr]
    assert "line 3" in found[2].detail  # type: ignore[union-attr]
    assert all(reject.text.encode() for reject in found if isinstance(reject, Reject))


def test_take_and_skip_count_rows_of_the_file(tmp_path: Path) -> None:
    source = local(tmp_path, [{**PAIR, "prompt": str(i)} for i in range(9)], skip=2, take=3)
    assert [row.id for row in read_source(source, "lab", tmp_path)[1]] == ["lab:3", "lab:4", "lab:5"]


@pytest.mark.parametrize(
    ("rows", "how", "says"),
    [
        ([{"q": 1}], {}, "data source lab: no format fits the columns q"),
        ([PAIR], {"columns": {"prompt": "Prompt"}}, "did you mean prompt"),
        (["{,}", "[]"], {}, "nothing in it can be read as a row: line 1"),
        ([PAIR], {"skip": 1}, "no row at all"),
    ],
)
def test_a_source_that_cannot_be_read(tmp_path: Path, rows: list[object], how: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        read_source(local(tmp_path, rows, **how), "lab", tmp_path)


def test_a_file_is_known_by_name_and_content(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    first = source_fingerprint(local(tmp_path, [PAIR]))
    assert first["file"] == "x.jsonl"
    assert source_fingerprint(local(tmp_path / "other", [PAIR])) == first
    assert source_fingerprint(local(tmp_path, [PAIR, PAIR])) != first
    with pytest.raises(InputError, match="there is no file"):
        source_fingerprint(LocalSource(source="local", path=tmp_path / "absent.jsonl"))


def test_the_documentation_of_python(tmp_path: Path) -> None:
    source = PydocSource(source="pydoc", take=5, skip=1)
    assert source_fingerprint(source) == {"python": pydoc_rows.fingerprint()}
    decision, rows = read_source(source, "pydoc", tmp_path)
    found = list(rows)
    assert decision.format == "messages"
    assert [row.id for row in found] == [f"pydoc:{i}" for i in range(2, 7)]
    assert all(isinstance(row, Example) and row.column("form") == "topic" for row in found)


SCRIPT = """
import sys
from pathlib import Path
from finetune.data.sources import read_source, source_fingerprint
from finetune.recipe import HubSource

for streaming in (False, True):
    source = HubSource(source="hub", id="me/chats", revision="main", streaming=streaming, skip=1, take=2)
    decision, rows = read_source(source, "me/chats", Path(sys.argv[1]))
    print(source_fingerprint(source, Path(sys.argv[1]))["commit"], decision.format, *(row.id for row in rows))
"""


def test_a_data_set_of_the_hub(tmp_path: Path) -> None:
    rows = "".join(json.dumps({**PAIR, "prompt": str(i)}) + "\n" for i in range(5))
    with serve() as hub:
        commit = hub.plant("me/chats", {"data/train.jsonl": rows, "README.md": "# Chats\n"}, "dataset")
        env = {**os.environ, **hub.env(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "scratch")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{commit} prompt_completion me/chats:2 me/chats:3"] * 2
    assert not (tmp_path / "home" / "datasets").exists()


def test_the_key_of_a_hub_source_needs_no_network_for_a_commit() -> None:
    assert source_fingerprint(HubSource(source="hub", id="a/b", revision="0" * 40)) == {"commit": "0" * 40}
