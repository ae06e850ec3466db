"""Labels are recognised before they are dropped, and answers that differ are let through."""

from pathlib import Path

import pytest

from finetune.dedup.answers import AnswerCheck, answer_key
from finetune.errors import GateRefused
from finetune.stages import dedup, embed
from tests.stages.rows import chat, context, folder, recipe, sentences

INTENTS = [chat(i, f"Please help me with matter number {i}", f"label_{i % 77}") for i in range(462)]


def checked(rows):
    check = AnswerCheck()
    check.add(map(answer_key, rows))
    check.require_varied()


def both_stages(tmp_path: Path, rows, **section):
    whole = recipe(dedup=section)
    kept, embedded, out = folder(tmp_path / "filter", rows), tmp_path / "embed", tmp_path / "out"
    embedded.mkdir()
    out.mkdir()
    embed.run(embed.spec(whole), {"filter": kept}, embedded, context(tmp_path))
    return dedup.run(dedup.spec(whole), {"filter": kept, "embed": embedded}, out, context(tmp_path))


def test_labels_stop_the_run_before_rows_are_embedded(tmp_path):
    whole = recipe(dedup={"field": "output"})
    out = tmp_path / "embed"
    out.mkdir()
    with pytest.raises(GateRefused, match=r"462 different rows have 77 different answers: 385 .*dedup\.field=both"):
        embed.run(embed.spec(whole), {"filter": folder(tmp_path / "filter", INTENTS)}, out, context(tmp_path))
    assert not list(out.iterdir())


def test_the_dedup_stage_refuses_them_too_without_vectors(tmp_path):
    whole = recipe(dedup={"field": "output", "embedding": None})
    kept, out = folder(tmp_path / "filter", INTENTS), tmp_path / "out"
    out.mkdir()
    with pytest.raises(GateRefused, match=r"dedup\.max_dropped_fraction=1"):
        dedup.run(dedup.spec(whole), {"filter": kept, "embed": kept}, out, context(tmp_path))


def test_all_questions_stay_by_default(tmp_path):
    metrics = both_stages(tmp_path, INTENTS)
    assert (metrics["rows_in"], metrics["rows_out"]) == (462, 462)


def test_distinct_questions_with_labels_stay_under_the_defaults(tmp_path):
    rows = [chat(i, text, f"label_{i % 77}") for i, text in enumerate(sentences(462))]
    metrics = both_stages(tmp_path, rows)
    assert (metrics["rows_in"], metrics["rows_out"]) == (462, 462)


def test_one_row_an_answer_can_be_asked_for(tmp_path):
    metrics = both_stages(tmp_path, INTENTS, field="output", max_dropped_fraction=1)
    assert metrics["rows_out"] <= 77


def test_varied_answers_copies_and_few_rows_pass():
    checked([chat(i, f"q{i}", t) for i, t in enumerate(sentences(100))])
    checked([chat(i, "q", "the same row") for i in range(500)])  # copies of one row are duplicates, not labels
    checked([chat(i, f"q{i}", "yes") for i in range(49)])
    checked([chat(i, f"q{i}", t if i % 2 else "yes") for i, t in enumerate(sentences(200))])
    often = [chat(1000 + i, f"of {i}", "an inherited method") for i in range(120)]
    checked(often + [chat(i, f"q{i}", t) for i, t in enumerate(sentences(100))])  # 55 % lost, most answers once
    with pytest.raises(GateRefused):
        checked([chat(i, f"q{i}", "yes") for i in range(50)])
    with pytest.raises(GateRefused):
        checked(often * 3 + [chat(i, f"q{i}", t) for i, t in enumerate(sentences(30))])
