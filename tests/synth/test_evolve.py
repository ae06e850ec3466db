"""Evol-instruct: lines of descent, and what the eliminator leaves out."""

import pytest

from finetune.errors import GateRefused
from finetune.utils.files import read_json
from tests.helpers.generation import TASKS, model_that_can
from tests.helpers.generation import quick as quick
from tests.helpers.generation import server as server
from tests.helpers.generation import work as work

pytest.importorskip("openai")


def test_evolved_rows_form_lines_and_every_round_has_its_share(work, server):
    metrics = work.run(server.url, "method: evol_instruct\nrounds: 3\nrows: 30")
    rows = {r.id: r for r in work.rows()}
    assert len(rows) == metrics["rows_out"] == 30 and [r["rows"] for r in metrics["rounds"]] == [10, 10, 10]
    for row in rows.values():
        parent, number = row.column("parent"), row.column("round")
        before = rows[parent] if parent in rows else None
        text = before.messages[0].content if before else TASKS[int(parent.split(":")[1]) - 1]
        assert row.messages[0].content.startswith(text) and row.messages[0].content != text
        assert number > (before.column("round") if before else 0)
    assert len({r.column("operation") for r in rows.values()}) > 3
    line = read_json(work.out / "lineage.json")[0]
    assert [step["round"] for step in line] == [0, 1, 2, 3] and line[0]["text"] in TASKS
    assert len(server.requests) == 90  # instruction, comparison, answer


def test_the_eliminator_names_its_rules(work, server):
    kinds = {0: "no_gain", 1: "copied_prompt", 2: "refusal", 3: "no_content", 4: "no_gain", 5: "copied_prompt"}

    def answer(body):
        text = body["messages"][-1]["content"]
        at = next((i for i, task in enumerate(TASKS) if task in text), 0)
        if "#New Instruction#" in text:
            return {
                0: TASKS[0].upper(),
                1: "Rewrite the #Given Instruction# of ice",
                5: f"{TASKS[5]}? Write the new instruction only: no heading",
            }.get(at, f"{TASKS[at]} now")
        if "ask for the same" in text:
            return "Equal." if at == 4 else "Not Equal"
        return {2: "I am sorry, I cannot do that.", 3: "It is the, and... of!"}.get(at, "Snow reflects light.")

    server.answer = answer
    metrics = work.run(server.url, "method: evol_instruct\nrounds: 1")
    named = {r["id"].split("/")[1]: r["reason"] for r in work.rejects()}
    assert named == {f"seeds.jsonl:{i + 1}": reason for i, reason in kinds.items()}
    assert metrics["rejected"] == {"copied_prompt": 2, "no_content": 1, "no_gain": 2, "refusal": 1}
    assert metrics["rows_out"] == len(TASKS) - 6


def test_what_was_left_out_is_tried_again_from_where_it_was(work, server):
    work.seeds([{"instruction": TASKS[0]}])
    seen = []

    def answer(body):
        text = body["messages"][-1]["content"]
        if "#New Instruction#" in text:
            seen.append(text)
            return TASKS[0] if len(seen) == 1 else f"{TASKS[0]} {len(seen)}"
        return model_that_can(body)

    server.answer = answer
    work.run(server.url, "method: evol_instruct\nrounds: 2")
    (row,) = work.rows()
    assert row.messages[0].content == f"{TASKS[0]} 2" and row.column("round") == 2
    assert row.column("parent") == "seeds.jsonl:1"


@pytest.mark.parametrize(
    ("reply", "dropped"),
    [("Equal", 1), (" **Equal**.", 1), ("They are not really equal", 0), ("Not equal", 0), ("Equally hard? No", 0)],
)
def test_only_a_reply_that_begins_with_equal_is_one(work, server, reply, dropped):
    server.answer = lambda body: (
        reply if "ask for the same" in body["messages"][-1]["content"] else model_that_can(body)
    )
    work.seeds([{"instruction": TASKS[0]}, {"instruction": TASKS[7]}])
    if dropped:
        with pytest.raises(GateRefused, match="2 no_gain"):
            work.run(server.url, "method: evol_instruct\nrounds: 1")
    else:
        assert work.run(server.url, "method: evol_instruct\nrounds: 1")["rows_out"] == 2
