"""Stage generate against a loopback OpenAI-compatible server, asked by the real client."""

from __future__ import annotations

import json
import threading

import pytest

from finetune.data.records import read_rows
from finetune.errors import FinetuneError, GateRefused, InputError
from finetune.pipeline import runner
from finetune.pipeline.runs import Run
from finetune.pipeline.store import Store
from finetune.stages import generate, ingest
from finetune.synth.forecast import check_endpoint
from finetune.synth.self_instruct import read_tasks
from tests.helpers.generation import TASKS, model_that_can
from tests.helpers.generation import quick as quick
from tests.helpers.generation import server as server
from tests.helpers.generation import work as work

pytest.importorskip("openai")


def test_answers_become_rows_with_their_lineage_and_are_asked_once(work, server):
    metrics = work.run(server.url)
    rows = work.rows()
    assert metrics["rows_out"] == metrics["requests"] == len(server.requests) == len(TASKS)
    assert [r.messages[0].content for r in rows] == TASKS and all(r.messages[1].content for r in rows)
    assert next((r.column("parent"), r.column("operation"), r.column("round")) for r in rows) == (
        "seeds.jsonl:1", "answer", 1,
    )  # fmt: skip
    first = (work.out / "rows.parquet").read_bytes()
    again = work.run(server.url)
    assert len(server.requests) == len(TASKS) and again == metrics
    assert (work.out / "rows.parquet").read_bytes() == first
    assert any("responses were kept" in line for line in work.lines)


def test_only_what_decides_a_response_is_asked_again(work, server):
    work.run(server.url)
    work.run(server.url, "method: answer\nmax_requests: 50", model=", concurrency: 2, timeout_seconds: 9")
    assert len(server.requests) == len(TASKS)
    work.run(server.url, "method: answer\ntemperature: 0.5")
    assert len(server.requests) == 2 * len(TASKS)


@pytest.mark.parametrize("fault", [429, 500, 503, "cut", "garbled", "other"])
def test_a_fault_that_passes_costs_nothing(work, server, fault):
    server.faults = [fault, fault]
    assert work.run(server.url)["rows_out"] == len(TASKS)
    assert len(server.requests) == len(TASKS) + 2


def test_a_slow_answer_is_asked_again(work, server):
    server.faults, server.slow = ["slow"], 1.5
    assert work.run(server.url, model=", timeout_seconds: 0.5")["rows_out"] == len(TASKS)
    assert len(server.requests) == len(TASKS) + 1


@pytest.mark.parametrize(
    ("fault", "words"),
    [(500, "failed"), ("cut", "cannot be reached"), ("garbled", "than JSON"), ("other", "than a chat")],
)
def test_a_fault_that_stays_is_one_sentence_and_what_came_before_is_kept(work, server, monkeypatch, fault, words):
    monkeypatch.setattr("finetune.synth.asking.RETRIES", 1)
    server.faults = [None] * 5 + [fault] * 100
    with pytest.raises(FinetuneError, match=words) as caught:
        work.run(server.url, model=", concurrency: 1")
    assert "\n" not in str(caught.value)
    server.faults, before = [], len(server.requests)
    assert work.run(server.url)["rows_out"] == len(TASKS)
    assert len(server.requests) - before == len(TASKS) - 5


def test_a_response_that_came_is_kept_although_one_before_it_has_not(work, server):
    first = threading.Event()
    server.answer = lambda body: (first.wait(10) and "a") if body["messages"][0]["content"] == TASKS[0] else "a b"
    done = threading.Thread(target=work.run, args=(server.url,))
    done.start()
    folder = work.folder / "scratch" / "responses"
    for _ in range(1000):
        if len(list(folder.glob("*/*.json"))) == len(TASKS) - 1:
            break
        done.join(0.01)
    kept = len(list(folder.glob("*/*.json")))
    first.set()
    done.join()
    assert kept == len(TASKS) - 1


def test_no_more_requests_than_allowed_are_in_flight(work, server):
    server.faults, server.slow = ["slow"] * len(TASKS), 0.05
    work.run(server.url, model=", concurrency: 3")
    assert 2 <= server.most_at_once <= 3


def test_a_wrong_key_is_never_printed(work, server, monkeypatch):
    server.wanted_key = "right"
    monkeypatch.setenv("FINETUNE_API_KEY", "a-wrong-secret")
    with pytest.raises(InputError, match="refused the key; set FINETUNE_API_KEY") as caught:
        work.run(server.url)
    monkeypatch.setattr("finetune.synth.asking.RETRIES", 0)
    server.wanted_key, server.faults = None, [400] * 99  # this server repeats the key in its words
    with pytest.raises(InputError, match="refused the request") as other:
        work.run(server.url)
    assert "a-wrong-secret" not in f"{caught.value}{other.value}{work.lines}"


def test_the_key_of_an_openai_account_goes_to_no_other_host(work, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-account")
    work.run(server.url)
    assert set(server.keys) == {"none"}


def test_an_unknown_model_and_an_absent_server_are_one_sentence(work, server, monkeypatch):
    server.models = ["other"]
    with pytest.raises(InputError, match=r"has no model m.*does not exist"):
        work.run(server.url)
    monkeypatch.setattr("finetune.synth.asking.RETRIES", 0)
    with pytest.raises(FinetuneError, match="cannot be reached"):
        work.run("http://127.0.0.1:9/v1")


def test_a_server_that_answers_with_another_model_is_reported(work, server):
    server.named = "small-model"
    assert work.run(server.url)["answered_by"] == {"small-model": len(TASKS)}
    assert any("m was asked, and the server names small-model" in line for line in work.lines)


def test_nothing_usable_stops_early_and_shows_the_first_responses(work, server):
    work.seeds([{"instruction": f"{task} {n}"} for task in TASKS for n in range(20)])
    server.answer = lambda body: " "
    with pytest.raises(GateRefused, match=r"none of the first 32 candidates can be used \(32 empty\)"):
        work.run(server.url)
    assert len(server.requests) == 32
    server.answer, server.finish = (lambda body: "and then the story"), "length"
    with pytest.raises(GateRefused, match="'and then the story'"):
        work.run(server.url, "method: answer\ntemperature: 0.1")


@pytest.mark.parametrize(
    ("finish", "text", "reason"),
    [
        ("content_filter", "I must", "not_finished"),
        ("tool_calls", "a b", "not_finished"),
        ("stop", "a \ud800", "surrogate"),
    ],
)
def test_a_response_that_was_not_finished_or_is_no_text_is_left_out(work, server, finish, text, reason):
    server.finish, server.answer = finish, lambda body: text
    with pytest.raises(GateRefused, match=rf"(?s)12 {reason}.*{finish if finish != 'stop' else 'lone surrogate'}"):
        work.run(server.url)


@pytest.mark.parametrize("number", ["not_finished", "surrogate"])
def test_new_tasks_are_checked_as_answers_are(work, server, number):
    def answer(body):
        asks_tasks = "Continue it with" in body["messages"][-1]["content"]
        server.finish = "content_filter" if asks_tasks and number == "not_finished" else "stop"
        last = "Draw a \ud800 menu" if number == "surrogate" else "Draw a menu"
        return f"9. Compare two rivers of Asia\n10. {last}\n" if asks_tasks else model_that_can(body)

    server.answer = answer
    work.run(server.url, "method: self_instruct\nrows: 2\nrounds: 1", model=", concurrency: 1")
    assert len(work.rows()) == 1 and [r["reason"] for r in work.rejects()] == [number]


def test_a_kept_response_without_token_counts_is_used(work, server):
    work.run(server.url)
    for path in (work.folder / "scratch" / "responses").glob("*/*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "tokens": None, "prompt_tokens": None}))
    assert work.run(server.url)["rows_out"] == len(TASKS) == len(server.requests)


def test_a_budget_used_up_keeps_the_rows_and_goes_on_when_it_is_raised(work, server):
    with pytest.raises(GateRefused, match=r"generate.max_requests 5 is used up after 5 requests") as caught:
        work.run(server.url, "method: answer\nmax_requests: 5")
    lines = [json.loads(line) for line in (work.out / "rows-so-far.jsonl").read_text().splitlines()]
    assert [line["messages"][0]["content"] for line in lines] == TASKS[:5] and str(work.out) in str(caught.value)
    with pytest.raises(GateRefused):  # what is kept counts: the limit is one of the stage, not of one process
        work.run(server.url, "method: answer\nmax_requests: 5")
    assert len(server.requests) == 5
    assert work.run(server.url, "method: answer\nmax_requests: 12")["rows_out"] == len(TASKS)
    assert len(server.requests) == len(TASKS)


def test_a_budget_of_tokens_stops(work, server):
    with pytest.raises(GateRefused, match=r"generate.max_tokens 40 is used up after 2 requests"):
        work.run(server.url, "method: answer\nmax_tokens: 40", model=", concurrency: 1")
    assert work.run(server.url, "method: answer\nmax_tokens: 4000")["rows_out"] == len(TASKS)


def test_tokens_that_a_server_does_not_count_are_estimated(work, server):
    server.usage = False
    with pytest.raises(GateRefused, match=r"max_tokens 60 is used up after [345] requests"):
        work.run(server.url, "method: answer\nmax_tokens: 60", model=", concurrency: 1")


def test_the_endpoint_is_looked_at_before_anything_is_built(work, server, monkeypatch):
    model = work.recipe(server.url).generate.model
    assert check_endpoint(model, "f") == "" and not server.requests
    server.models = ["a", "b"]
    assert check_endpoint(model, "f") == f"f.name: {server.url} does not list m; it lists a, b"
    server.wanted_key = "right"
    with pytest.raises(InputError, match="refused the key"):
        check_endpoint(model, "f")
    with pytest.raises(FinetuneError, match="cannot be reached"):
        check_endpoint(model.model_copy(update={"endpoint": "http://127.0.0.1:9/v1"}), "f")


def test_new_tasks_differ_from_every_kept_one(work, server):
    from rouge_score.rouge_scorer import RougeScorer

    metrics = work.run(server.url, "method: self_instruct\nrows: 12\nrounds: 3")
    rows, score = work.rows(), RougeScorer(["rougeL"])
    tasks = [*TASKS, *(r.messages[0].content.split("\n\n")[0] for r in rows)]
    assert metrics["rows_out"] == len(rows) > 4
    for i, task in enumerate(tasks[len(TASKS) :], len(TASKS)):
        assert all(score.score(other, task)["rougeL"].fmeasure < 0.7 for other in tasks[:i])
    assert all(r["reason"] == "similar" for r in work.rejects())
    labels = [r for r in rows if "Is there" in r.messages[0].content]
    assert labels and all(r.messages[1].content == "old" and "of 1850" in r.messages[0].content for r in labels)
    assert all(r.messages[1].content.startswith("First") for r in rows if r not in labels)
    assert max(p.count("\n8.") for p in server.prompts) == 1  # eight tasks are shown


def test_only_the_last_task_of_a_response_that_was_cut_is_left_out(work, server):
    def answer(body):
        asks_tasks = "Continue it with" in body["messages"][-1]["content"]
        server.finish = "length" if asks_tasks else "stop"
        return "9. Compare two rivers of Asia\n10. Draw up a menu for\n" if asks_tasks else model_that_can(body)

    server.answer = answer
    work.run(server.url, "method: self_instruct\nrows: 2\nrounds: 1", model=", concurrency: 1")
    assert [r.messages[0].content for r in work.rows()] == ["Compare two rivers of Asia"]
    assert [(r["reason"], r["text"]) for r in work.rejects()] == [("cut_off", "Draw up a menu for")]


@pytest.mark.parametrize(("best", "more"), [("agreement", 0), ("judge", 4)])
def test_the_best_of_several_answers_is_kept(work, server, best, more):
    work.seeds([{"prompt": "How far is it?"}])
    given = ["It is nine miles.", "Blue, perhaps, or some other colour.", "It is nine miles long."]

    def answer(body):
        text = body["messages"][-1]["content"]
        return model_that_can(body) if "Two assistants" in text else given[body["seed"] % 3]

    server.answer = answer
    seeds = iter(range(99))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune.synth.answers.stream", lambda *parts: next(seeds))
        work.run(server.url, f"method: answer\nsamples: 3\nbest: {best}")
    (row,) = work.rows()
    assert row.messages[1].content == (given[0] if best == "agreement" else given[1])
    assert len(server.requests) == 3 + more


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"text": "only a text"}], "a raw text has no prompt"),
        ([{"messages": [{"role": "user", "content": t} for t in "ab"]}], "one user turn"),
        ([{"messages": [{"role": "assistant", "content": "a"}]}], "no user turn"),
        ([{"number": 5}], "no format fits"),
    ],
)
def test_seeds_that_do_not_fit_are_one_message(work, server, rows, words):
    work.seeds(rows)
    with pytest.raises(InputError, match=words):
        work.run(server.url, "method: evol_instruct")
    assert not server.requests


def test_some_seeds_that_do_not_fit_are_left_out_by_name(work, server):
    work.seeds([{"instruction": t} for t in TASKS] + [{"instruction": " "}])
    with pytest.raises(InputError, match=r"seeds.jsonl:13"):
        work.run(server.url)
    metrics = work.run(server.url, "method: answer\nmax_refused_fraction: 0.1")
    assert metrics["seeds_refused"] == 1 and [r["id"] for r in work.rejects()] == ["seeds.jsonl:13"]


def test_a_reply_that_continues_the_number_of_the_prompt_keeps_its_first_task():
    prompt = "1. Sing\n\n8. Count\n9."
    assert read_tasks("Write a poem\nin verse\n10. Draw\n11. Paint", prompt) == [
        "Write a poem\nin verse",
        "Draw",
        "Paint",
    ]
    for text, shown in (("Here are two:\n9. Draw\n10. Paint", prompt), ("Here are two:\n10. Draw\n11. Paint", "")):
        assert read_tasks(text, shown) == ["Draw", "Paint"]
    assert read_tasks("Draw\nPaint", prompt) == ["Draw", "Paint"]


def test_limits_and_speed_are_no_part_of_the_key(work, server):
    def key(section, model=""):
        spec = generate.spec(work.recipe(server.url, section, model))
        return spec.model_dump(), generate.fingerprint(spec)

    plain = key("method: answer")
    assert key("method: answer\nmax_requests: 99\nmax_tokens: 9999", ", concurrency: 2, license: mit") == plain
    assert key("method: answer\nsamples: 2") != plain


def test_generated_rows_are_one_more_source_of_ingest(work, server, tmp_path):
    work.seeds([{"instruction": t, "output": "It is."} for t in TASKS])
    more = "data: [{source: local, path: seeds.jsonl}]\n"
    recipe = work.recipe(server.url, more=more)
    store = Store(tmp_path / "artifacts", tmp_path / "scratch")
    ctx = work.context(artifacts=store.artifacts)
    record = Run(store.artifacts, "a", "", (), "0" * 8, write=False)
    steps = []
    for stage in runner.STAGES[1:3]:  # base is not needed by either
        outputs = {s.stage.name: runner.Output(s.folder, s.manifest.digest) for s in steps}
        steps.append(runner.build(runner.locate(stage, recipe, store, outputs), recipe, store, ctx))
    generated, read = steps
    assert (generated.stage.name, read.stage.name) == ("generate", "ingest") and record is not None
    rows = list(read_rows(read.folder / "rows.parquet"))
    assert [r.source for r in rows] == ["seeds.jsonl"] * 12 + ["generate"] * 12
    assert rows[-1].id == "generate:12" and rows[-1].column("parent") == "seeds.jsonl:12"
    assert read.manifest.metrics["sources"]["generate"] == {"rows": 12, "refused": 0}
    assert list((store.artifacts / "responses").glob("*/*.json"))
    alone = ingest.spec(work.recipe(server.url))
    assert alone.data == []
