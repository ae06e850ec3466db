"""The report's section on generated rows, and the card's line on the model that wrote them."""

import json

from finetune.pipeline.stage_list import headline_of
from finetune.publish.card_sections import sources, without_folders
from finetune.publish.facts import Facts
from finetune.publish.private_rows import samples_shown
from finetune.recipe import Recipe
from finetune.report.page import write_report
from tests.report.made_run import MadeRun

METRICS = {
    "model": "my<model>", "method": "evol_instruct", "seeds": 9, "seeds_refused": 1, "candidates": 30, "rows_out": 20,
    "answered_by": {"other-7b": 20}, "rejected": {"no_gain": 7, "cut_off": 3},
    "rounds": [
        {"round": n, "tried": 15, "rows": 10, "instruction_words": 9.5 + n, "answer_words": 30.0, "distinct_2": 0.5}
        for n in (1, 2)
    ],
    "operations": {"deepen": 20}, "requests": 80, "prompt_tokens": 900, "tokens": 1234,
}  # fmt: skip
LINE = [
    {"id": "s:1", "operation": "seed", "round": 0, "text": "Explain <b>snow</b>", "answer": ""},
    {"id": "generate:4", "operation": "add_constraints", "round": 1, "text": "Explain wet snow", "answer": "It is"},
]


def recipe(model, **more):
    section = {"method": "answer", "seeds": [{"source": "local", "path": "/data/s.jsonl"}], "model": model}
    return Recipe.model_validate({"name": "a", "model": "o/n", "generate": section, **more})


def test_the_page_shows_funnel_rounds_and_lines_of_descent(tmp_path):
    run = MadeRun(tmp_path)
    (run.folder("generate") / "lineage.json").write_text(json.dumps([LINE]))
    run.done("generate", **METRICS)
    run.save()
    page = write_report(run.store, "made").read_text()
    for words in (
        "Generated rows",
        "my&lt;model&gt;",
        "no gain",
        "Lines of descent",
        "add constraints",
        "&lt;b&gt;snow",
    ):
        assert words in page
    headline = headline_of("generate", METRICS)
    assert headline.rows == "30 → 20" and "80 requests" in headline.figure


def test_the_page_of_a_run_without_generation_does_not_mention_it(tmp_path):
    run = MadeRun(tmp_path)
    run.note("generate", "off")
    run.save()
    assert "Generated rows" not in write_report(run.store, "made").read_text()


def test_the_card_names_the_writing_model_and_its_licence():
    facts = {"recipe_text": "", "metrics": {"generate": METRICS}, "base": {"kind": "hub", "id": "o/n"}}
    asked = recipe({"endpoint": "http://a/v1", "name": "my-model", "license": "apache-2.0"})
    (line,) = sources(Facts(recipe=asked, **facts))
    for words in ("20 rows", "`my-model`", "`other-7b`", "apache-2.0"):
        assert words in line
    local = recipe({"local": "HuggingFaceTB/SmolLM2-135M-Instruct"})
    known = {"model HuggingFaceTB/SmolLM2-135M-Instruct": "mit"}
    assert "of that model: mit" in sources(Facts(recipe=local, licences=known, **facts))[0]
    assert "of that model: unknown" in sources(Facts(recipe=local, **facts))[0]


def test_local_seeds_and_folders_stay_private():
    asked = recipe({"local": "/models/mine"})
    text = without_folders("seeds: /data/s.jsonl, local: /models/mine", asked)
    assert text == "seeds: …/s.jsonl, local: …/mine"
    assert samples_shown(asked) == 0
