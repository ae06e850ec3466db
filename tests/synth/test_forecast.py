"""What plan says of generation, limits that the rows exceed, and the recipe's own checks."""

import json

import pytest

from finetune.errors import InputError
from finetune.recipe.load import parse_recipe
from finetune.synth.forecast import generation, generation_in_words

MODEL = "{endpoint: 'http://127.0.0.1:9/v1', name: m}"


def recipe(tmp_path, section, seeds=40, model=MODEL, head=""):
    rows = [{"instruction": f"Question {n} about the sea"} for n in range(seeds)]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = f"schema: 1\nname: a\nmodel: builtin:tiny-mistral\n{head}generate:\n  model: {model}\n"
    text += "  seeds: [{source: local, path: s.jsonl}]\n" + "".join(f"  {line}\n" for line in section.split("\n"))
    return parse_recipe(text, tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("section", "rows", "requests"),
    [
        ("method: answer", 40, 40),
        ("method: answer\nrows: 10\nsamples: 4", 10, 40),
        ("method: answer\nrows: 10\nsamples: 4\nbest: judge", 10, 100),
        ("method: answer\nrows: 1000", 40, 40),
        ("method: evol_instruct\nrounds: 3", 120, 360),
        ("method: evol_instruct\nrows: 50\nsamples: 2", 50, 200),
        ("method: self_instruct\nrows: 30", 30, 68),
    ],
)
def test_the_plan_counts_what_the_rows_take_at_least(tmp_path, section, rows, requests):
    found = generation(recipe(tmp_path, section), None)
    assert (found["rows"], found["requests"]) == (rows, requests)
    assert f"{requests:,} requests" in generation_in_words(found) and "no limit" in generation_in_words(found)
    generation(recipe(tmp_path, f"{section}\nmax_requests: {requests}"), None)
    with pytest.raises(InputError, match=r"max_requests.* is less than the"):
        generation(recipe(tmp_path, f"{section}\nmax_requests: {requests - 1}"), None)


def test_seeds_that_do_not_fit_are_refused_in_plan(tmp_path):
    made = recipe(tmp_path, "method: answer")
    (tmp_path / "s.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(InputError, match=r"generate\.seeds"):
        generation(made, None)


@pytest.mark.parametrize(
    ("section", "model", "words"),
    [
        ("method: answer", "{name: m}", "endpoint (with name) or local says where the model is; neither is there"),
        ("method: answer", "{endpoint: 'http://a/v1'}", "missing; the endpoint needs the model's name"),
        ("method: answer", "{endpoint: '127.0.0.1:80', name: m}", "an address as http://127.0.0.1:8000/v1"),
        ("method: answer", "{endpoint: 'http://u:p@a/v1', name: m}", "without a password"),
        ("method: answer", "{local: 'builtin:other'}", "no builtin model"),
        ("method: answer", "{local: 'builtin:tiny-mistral', name: m}", "only an endpoint has names"),
        ("method: self_instruct", MODEL, "self_instruct needs the number of rows"),
        ("method: answer\nsamples: 3\ntemperature: 0", MODEL, "all 3 answers are the same"),
        ("method: evolve", MODEL, "evol_instruct"),
    ],
)
def test_a_section_that_does_not_fit_is_one_message(tmp_path, section, model, words):
    with pytest.raises(InputError) as caught:
        recipe(tmp_path, section, model=model)
    assert words in str(caught.value) and str(caught.value).count("\n") == 0


def test_the_built_in_model_writes_only_for_itself(tmp_path):
    made = recipe(tmp_path, "method: answer", model="{local: 'builtin:tiny-mistral'}")
    assert made.generate.model.label == "builtin:tiny-mistral" and made.has_rows and not made.data
    text = (
        "schema: 1\nname: a\nmodel: mistralai/Mistral-7B-v0.1\ndata: [{source: pydoc}]\n"
        "evaluate: {judge: {model: {local: 'builtin:tiny-mistral'}}}\n"
    )
    with pytest.raises(InputError, match="is trained by the base stage only"):
        parse_recipe(text, tmp_path / "recipe.yaml")
