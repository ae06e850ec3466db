"""Whole curations of rows in the shape of Open-Platypus: every absent row has one reason, the right one."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.e2e import platypus
from tests.e2e.absences import absences, present
from tests.e2e.in_process import Laboratory
from tests.report.test_page import text_of

NAME = "open-platypus.parquet"


@pytest.fixture
def lab(pristine, tmp_path: Path) -> Laboratory:
    return Laboratory(tmp_path, pristine.folder / "base")


def static_model(folder: Path, rows: platypus.Rows) -> Path:
    """A bag of random word vectors, as model2vec keeps one: the same words in any order have a cosine of 1."""
    model2vec, tokenizers = pytest.importorskip("model2vec"), pytest.importorskip("tokenizers")
    words = sorted({w for row in rows.rows for w in f"{row['output']} {row['instruction']}".split()})
    table = {w: i for i, w in enumerate(["[UNK]", *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(table, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    vectors = np.random.default_rng(0).standard_normal((len(table), 48)).astype(np.float32)
    model2vec.StaticModel(vectors, tokenizer, {"normalize": True}).save_pretrained(folder)
    return folder


def test_every_absent_row_has_one_reason_and_it_is_the_right_one(lab):
    rows = platypus.made()
    data, evaluation = platypus.write(lab.folder, rows)
    words = sorted({w for row in rows.rows for w in row["output"].split()})
    more = [{"instruction": f"What is {i}?", "output": " ".join(words[i * 20 : i * 20 + 14])} for i in range(40)]
    bad = [{"instruction": "Well?", "output": None}, {"instruction": "", "output": ""}]
    second = lab.put("more.jsonl", [*more, *bad, {"instruction": "Say it again.", "output": "Say it again."}])
    done = lab.run(
        data, second, source={"format": "alpaca"},
        sets=[
            "data.1.weight=0.5", "filter={max_assistant_characters: 400, rules: [echo]}",
            f"dedup={{jaccard: {{}}, embedding: 'model2vec:{static_model(lab.folder / 'static', rows)}'}}",
            "dedup.field=output",
            f"decontaminate={{against: [{{source: local, path: '{evaluation}'}}]}}",
            "sample={top_k: 150}", "split={eval_fraction: 0.1}",
            "render={max_length_tokens: 420, overlong: drop, max_dropped_fraction: 0.9}",
        ],
    )  # fmt: skip
    every = {f"{NAME}:{i}" for i in range(1, len(rows.rows) + 1)} | {f"more.jsonl:{i}" for i in range(1, 44)}
    found, here = absences(done.folders), present(done.folders)
    assert here | set(found) == every and not here & set(found)
    assert all(len(reasons) == 1 for reasons in found.values())
    why = {row_id: reasons[0] for row_id, reasons in found.items()}
    for kind in ("exact", "minhash", "embedding"):  # the twin may be the one that stays
        named = {w.named: i for i, w in why.items() if w.why == kind and w.stage == "dedup"}
        assert set(named) <= every - {i for i, w in why.items() if w.stage in ("ingest", "filter", "dedup")}
        copies = {f"{NAME}:{i}" for i in rows.of(kind)}
        assert named and copies & (set(named) | set(named.values())) and len(named) <= len(copies)
    leaked = {f"{NAME}:{i}" for i in rows.of("leaked")} & set(why)
    assert {why[i].stage for i in leaked} <= {"decontaminate", "filter"}
    assert all(why[i].named.startswith("benchmark.jsonl:") for i in leaked if why[i].stage == "decontaminate")
    assert {(w.stage, w.why) for w in why.values()} >= {
        ("filter", "echo"), ("filter", "empty"), ("filter", "assistant_long"), ("dedup", "exact"),
        ("dedup", "minhash"), ("dedup", "embedding"), ("decontaminate", "words"), ("sample", "weight"),
        ("sample", "top_k"), ("render", "longer than render.max_length_tokens"),
    }  # fmt: skip
    counts = Counter(w.stage for w in why.values())
    told = {name: done.metrics[name] for name in ("dedup", "decontaminate", "sample")}
    assert {n: m["rows_in"] - m["rows_out"] for n, m in told.items()} == {n: counts[n] for n in told}
    assert counts["ingest"] == sum(done.metrics["ingest"]["refused"].values()) > 0
    assert counts["filter"] == sum(done.metrics["filter"]["rejected"].values())
    assert counts["render"] == done.metrics["render"]["dropped"] > 0


def transformer(folder: Path, rows: platypus.Rows) -> Path:
    """The same bag of words as a folder of sentence-transformers."""
    tokenizers = pytest.importorskip("tokenizers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import StaticEmbedding

    words = sorted({w for row in rows.rows for w in row["output"].split()})
    table = {w: i for i, w in enumerate(["[UNK]", *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(table, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    vectors = np.random.default_rng(0).standard_normal((len(table), 48)).astype(np.float32)
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, vectors)], device="cpu").save(str(folder))
    return folder


@pytest.mark.slow
def test_mistral_platypus_from_local_files_as_its_own_comment_says(pristine, tmp_path):
    """The shipped recipe, offline: other places of base, rows and embedding model, and fewer rows."""
    workspace = type(pristine)(tmp_path)
    shutil.copytree(pristine.folder / "base", tmp_path / "base")
    rows = platypus.made()
    platypus.write(tmp_path, rows)
    transformer(tmp_path / "embedding", rows)
    sets = [
        "model=./base", f"data.0={{source: local, path: {NAME}, format: alpaca}}", "dedup.embedding=./embedding",
        "dedup.jaccard={}", "decontaminate.against=[{source: local, path: benchmark.jsonl}]", "sample.top_k=200",
        "pack={}",
    ]  # fmt: skip
    options = [part for option in sets for part in ("--set", option)]
    workspace.run("run", "mistral-platypus", "--until", "pack", *options)
    shown = workspace.show("mistral-platypus")["stages"]
    folders = {name: Path(s["path"]) for name, s in shown.items() if s["status"] == "done"}
    figures = {name: shown[name]["metrics"] for name in folders}
    assert figures["ingest"]["formats"] == {NAME: "alpaca"} and figures["embed"]["dimension"] == 48
    assert figures["dedup"] | {"exact": 0} == {
        "rows_in": len(rows.rows) - 6, "rows_out": len(rows.rows) - 6 - 47, "exact": 0, "minhash": 15, "embedding": 12,
    }  # fmt: skip
    assert (figures["decontaminate"]["words"], figures["split"]["leaks"]) == (9, 0)
    assert figures["render"]["template"] == "alpaca" and figures["pack"]["documents"] == 190
    found, here = absences(folders), present(folders)
    assert {f"{NAME}:{i}" for i in range(1, len(rows.rows) + 1)} == here | set(found) and not here & set(found)
    assert len(here) == 200 and all(len(reasons) == 1 for reasons in found.values())
    report = text_of((next((tmp_path / "artifacts/runs/mistral-platypus").glob("2*")) / "report.html").read_text())
    for words in (
        "20 the same text as a kept row, 15 nearly the words of a kept row, 12 nearly a kept row",
        "−9: words in common with the evaluation data", f"−{len(rows.rows) - 262}: not chosen: top k 200, of ",
        NAME, "alpaca", "190 to train on, 10 held out", "supervised", "190 rows into",
    ):  # fmt: skip
        assert words in report, words
