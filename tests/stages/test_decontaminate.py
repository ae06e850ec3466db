import json

import pyarrow.parquet as pq
import pytest

from finetune.errors import GateRefused, InputError
from finetune.records import Example
from finetune.stages import decontaminate
from tests.stages.rows import chat, context, folder, ids, recipe, sentences

QUESTION = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many?"
TEXTS = sentences(6)


def built(tmp_path, rows, evaluation, **section):
    path = tmp_path / "evaluation.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in evaluation))
    spec = decontaminate.spec(recipe(decontaminate={"against": [{"source": "local", "path": str(path)}], **section}))
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    kept = folder(tmp_path / "dedup", rows)
    metrics = decontaminate.run(spec, {"dedup": kept}, out, context(tmp_path))
    return out, metrics, pq.read_table(out / "pairs.parquet").to_pylist()


def test_a_row_with_a_run_of_evaluation_words_goes_and_says_which(tmp_path):
    rows = [chat(i, "q", t) for i, t in enumerate(TEXTS, 1)]
    rows.insert(2, chat(50, "Solve: " + QUESTION.upper().replace(",", ";"), "72"))
    rows.append(Example("a:60", "a", text="prefix " + QUESTION))
    out, metrics, pairs = built(
        tmp_path, rows, [{"instruction": "other", "output": "5"}, {"instruction": QUESTION, "output": "72"}]
    )
    assert metrics == {"rows_in": 8, "rows_out": 6, "dropped": 2, "evaluation_rows": 2}
    assert ids(out / "rows.parquet") == [f"a:{i}" for i in range(1, 7)]
    assert [(p["dropped_id"], p["evaluation_id"], p["text"]) for p in pairs] == [
        ("a:50", "evaluation.jsonl:2", QUESTION),
        ("a:60", "evaluation.jsonl:2", QUESTION),
    ]
    assert pairs[0]["words"] == "natalia sold clips to 48 of her friends in april and then she"


def test_twelve_words_of_thirteen_are_not_enough_and_ngram_is_heeded(tmp_path):
    words = QUESTION.split()
    rows = [chat(1, " ".join(words[:12]) + " other ends", "x"), chat(2, "q", TEXTS[0])]
    evaluation = [{"instruction": QUESTION, "output": "72"}]
    assert built(tmp_path, rows, evaluation)[1]["dropped"] == 0
    assert built(tmp_path, rows, evaluation, ngram=12)[1]["dropped"] == 1


def test_a_short_question_matches_as_a_whole_and_a_short_answer_never(tmp_path):
    evaluation = [{"instruction": "Capital of France?", "output": "Paris"}]
    rows = [chat(1, "capital of  FRANCE", "x"), chat(2, "Is it the capital of France?", "Paris"), chat(3, "Paris", "y")]
    _, metrics, pairs = built(tmp_path, rows, evaluation)
    assert [p["dropped_id"] for p in pairs] == ["a:1"] and metrics["rows_out"] == 2


def test_nothing_in_common_is_silent(tmp_path):
    _, metrics, pairs = built(tmp_path, [chat(1, "q", TEXTS[0])], [{"instruction": QUESTION, "output": "72"}])
    assert metrics["dropped"] == 0 and pairs == []


def test_dropping_every_row_is_refused(tmp_path):
    with pytest.raises(GateRefused, match="every one of 1 rows"):
        built(tmp_path, [chat(1, QUESTION, "x")], [{"instruction": QUESTION, "output": "72"}])


def test_an_evaluation_row_that_cannot_be_read_is_not_left_out(tmp_path):
    with pytest.raises(InputError, match=r"evaluation\.jsonl:2"):
        built(
            tmp_path,
            [chat(1, "q", "x")],
            [{"instruction": QUESTION, "output": "72"}, {"instruction": 3, "output": "b"}],
        )


def test_the_key_follows_the_evaluation_files_content(tmp_path):
    path = tmp_path / "e.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n')
    spec = decontaminate.spec(recipe(decontaminate={"against": [{"source": "local", "path": str(path)}]}))
    before = decontaminate.fingerprint(spec)
    assert str(tmp_path) not in spec.model_dump_json() + json.dumps(before)
    path.write_text('{"instruction": "a", "output": "c"}\n')
    assert decontaminate.fingerprint(spec) != before
    assert decontaminate.spec(recipe()) is None
