"""The page's section on data: the largest groups with their texts, the template's hash, and why rows went."""

from __future__ import annotations

from pathlib import Path

from finetune.data.records import write_rows, write_table
from finetune.pipeline import run_view
from finetune.report import page as report_page
from finetune.report.data_section import funnel, groups
from finetune.utils.files import write_json
from tests.report.made_run import MadeRun, example, made_run
from tests.report.test_page import page, text_of


def grouped(root: Path, sizes: list[int]) -> MadeRun:
    """A run in which row 0 has sizes[0] duplicates, row 1 sizes[1], and so on."""
    run = made_run(root)
    kept = [example(f"rows:{i}", f"Question {i}?", f"Kept answer {i}.") for i in range(len(sizes))]
    copies = [(k, n) for k, size in enumerate(sizes) for n in range(size)]
    dropped = [example(f"rows:{k}.{n}", f"Question {k}?", f"Copy {n} of answer {k}.") for k, n in copies]
    write_rows(run.folder("ingest") / "rows.parquet", kept + dropped)
    run.done("ingest", rows_out=len(kept) + len(dropped), sources={}, refused={}, formats={})
    pairs = {
        "dropped_id": [row.id for row in dropped], "kept_id": [f"rows:{k}" for k, _ in copies],
        "method": ["minhash"] * len(copies), "score": [0.8 + n / 100 for _, n in copies],
    }  # fmt: skip
    write_table(run.folder("dedup") / "pairs.parquet", pairs)
    run.done("dedup", rows_in=len(kept) + len(dropped), rows_out=len(kept), exact=0, minhash=len(copies), embedding=0)
    return run


def test_the_ten_largest_groups_come_with_their_texts(tmp_path: Path) -> None:
    sizes = [1, 5, 2, 12, 3, 4, 6, 7, 8, 9, 10, 11]
    run = grouped(tmp_path, sizes)
    words = text_of(page(run))
    found = groups(report_page._views(run.store, run_view.read(run.store, "made")))
    assert [group["size"] for group in found] == list(range(12, 2, -1))
    for group in found:
        number = int(group["kept"].removeprefix("rows:"))
        assert f"{group['size']} dropped for rows:{number}" in words and f"Kept answer {number}." in words
        assert group["rows"][0][:3] == (f"rows:{number}.0", "minhash", "0.800")
        assert all(text in words for row in group["rows"] for text in row[3])
    assert "Kept answer 0." not in words and "Kept answer 2." not in words


def test_the_template_is_named_with_its_hash(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    digest = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    facts = {"name": "mistral-v3", "sha256": digest, "terminators": [2], "pad_token": "<unk>"}
    write_json(run.folder("render") / "template" / "template.json", facts)
    metrics = run.stages["render"]["metrics"]
    run.done("render", **metrics)
    words = text_of(page(run))
    assert "mistral-v3" in words and digest in words and "supervised 50.0 % of 270 tokens" in words


def test_the_funnel_says_why(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    run.done("decontaminate", rows_in=8, rows_out=5, dropped=3, words=2, embedding=1)
    run.done("sample", rows_in=5, rows_out=4, kept_by={"weight": {"rows": 5}, "top_k": 4, "fewest_tokens": 1234})
    run.save()
    lines = {line["stage"]: line for line in funnel(report_page._views(run.store, run_view.read(run.store, "made")))}
    leaked = "2 words in common with the evaluation data, 1 nearly an evaluation question"
    assert (lines["decontaminate"]["lost"], lines["decontaminate"]["why"]) == (3, leaked)
    said = "not chosen: top k 4 and the sources' shares, of 1,234 tokens and more"
    assert (lines["sample"]["lost"], lines["sample"]["why"]) == (1, said)
