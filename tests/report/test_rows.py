"""The page of rendered rows: what is supervised can be told without colour, duplicates are there, all of it is text."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest

from finetune.report.html import render_page
from finetune.report.row_lookup import dropped_for, largest_groups, rows_by_id
from finetune.report.rows import InspectedRow, sources_and_repeats
from finetune.tokenization.inspection import Segment
from tests.report.chromium import BROWSER, NO_BROWSER, elements, opened
from tests.report.made_run import made_run
from tests.report.test_page import HOSTILE, assert_only_ours


def rows_page(tmp_path: Path, text: str) -> Path:
    run = made_run(tmp_path, text)
    ids = [f"rows:0{text}", f"rows:1{text}"]
    sources, repeats = sources_and_repeats(
        ids,
        [run.folder("split") / "train.parquet"],
        run.folder("dedup") / "pairs.parquet",
        run.folder("ingest") / "rows.parquet",
    )
    segments = [Segment("<s>", False, True), Segment(text, False, False), Segment(text, True, False)]
    rows = [
        InspectedRow(i, sources[i], 70, 40, [*segments, Segment("</s>", True, True)], *repeats[i]) for i in ids
    ]  # fmt: skip
    path = tmp_path / "rows.html"
    path.write_bytes(render_page("rows.jinja", {"recipe": "made", "rows": rows, "all_rows": 6}))
    return path


def test_the_page_holds_each_row_and_its_nearest_duplicates(tmp_path: Path) -> None:
    text = rows_page(tmp_path, "Plain & simple.").read_text(encoding="utf-8")
    assert '<span class=" tok">&lt;s&gt;</span>' in text and '<span class="sup tok">&lt;/s&gt;</span>' in text
    assert '<span class="sup">Plain &amp; simple.</span>' in text
    words = " ".join(html.unescape(re.sub("<[^>]*>", " ", text)).split())
    assert "source rows · 70 tokens, 40 supervised" in words
    assert "4 dropped as its duplicates" in words and words.count("dropped as") == 1
    assert "rows:8Plain & simple. , exact, 1.000" in words and "embedding, 0.900" in words and "0.800" not in words
    assert "the nearest 3; 1 more in pairs.parquet" in words
    style = text[text.index("<style>") : text.index("</style>")]
    assert re.search(r"\.sup \{[^}]*underline", style) and re.search(r"\.tok \{[^}]*border", style)


def test_hostile_rows_stay_text(tmp_path: Path) -> None:
    path = rows_page(tmp_path, HOSTILE)
    assert_only_ours(path.read_text(encoding="utf-8"))
    assert elements(path.read_text(encoding="utf-8")).titles == ["made: rows as the model sees them"]


@pytest.mark.skipif(not BROWSER, reason=NO_BROWSER)
def test_no_script_of_a_row_runs_in_a_browser_here_either(tmp_path: Path) -> None:
    found = opened(rows_page(tmp_path, HOSTILE), tmp_path / "profile")
    assert found.titles == ["made: rows as the model sees them"]
    assert not {"script", "img", "iframe", "svg"} & set(found.names)


def test_duplicates_of_a_copy_are_those_of_its_row(tmp_path: Path) -> None:
    run = made_run(tmp_path, "x")
    pairs = run.folder("dedup") / "pairs.parquet"
    found = dropped_for(pairs, ["rows:0x~2", "rows:1x"])
    assert [d.id for d in found["rows:0x~2"]] == ["rows:8x", "rows:9x", "rows:10x", "rows:11x"]
    assert found["rows:1x"] == []
    assert [[d.score for d in g] for g in largest_groups(pairs, 5)] == [[0.8, 0.9, 1.0, 1.0]]


def test_rows_by_id_leaves_out_what_is_not_there(tmp_path: Path) -> None:
    run = made_run(tmp_path, "x")
    found = rows_by_id(run.folder("ingest") / "rows.parquet", ["rows:3x", "rows:99x"])
    assert {i: r.messages[0].content for i, r in found.items()} == {"rows:3x": "x 3?"}
