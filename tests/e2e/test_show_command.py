"""`finetune show A B`: what two runs were asked and what came of it."""

import dataclasses
import json
import shutil

import pytest

from finetune.cli.show import figure_differences, recipe_differences
from finetune.recipe import Recipe


def recipe(**sections):
    return Recipe.model_validate(
        {"name": "a", "model": "builtin:tiny-mistral", "data": [{"source": "pydoc"}], **sections}
    )


def test_only_the_fields_that_differ_are_told_defaults_filled_in():
    first = recipe(train={"learning_rate": 2e-4}, sample={"top_k": 9}, lora={"targets": ["q_proj"]})
    second = recipe(
        train={"learning_rate": 1e-4, "epochs": 1}, data=[{"source": "pydoc"}, {"source": "hub", "id": "a/b"}]
    )
    told = {name: (a, b) for name, a, b in recipe_differences(first, second)}
    assert told["train.learning_rate"] == ("2e-4", "1e-4")
    assert told["lora.targets"] == ("[q_proj]", "all-linear")
    assert told["sample"][0].startswith("top_k: 9, ") and told["sample"][1] == "null"
    assert told["data[1].id"] == ("–", "a/b")
    assert {n.split(".")[0] for n in told} == {"train", "lora", "sample", "data[1]"}
    assert recipe_differences(first, first) == []


def test_a_local_file_is_told_though_it_is_in_no_key(tmp_path):
    first, second = (recipe(data=[{"source": "local", "path": str(tmp_path / n)}]) for n in ("a.jsonl", "b.jsonl"))
    assert recipe_differences(first, second) == [("data[0].path", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))]


def test_figures_have_a_ratio_where_there_is_one():
    from finetune.pipeline.stage_list import STAGE_NAMES

    def stages(**metrics):
        return {name: {"metrics": metrics if name == "evaluate" else {}} for name in STAGE_NAMES}

    first = stages(perplexity=4.0, ok=True, interval=[1.0, 2.0], tasks={"t": {"acc": 0.25}}, same=1, zero=0)
    second = stages(perplexity=3.0, ok=False, interval=[1.0, 2.5], tasks={"t": {"acc": 0.5}}, same=1, zero=2, new="x")
    assert figure_differences(first, second) == [
        ("evaluate.interval", "[1, 2]", "[1, 2.5]", ""),
        ("evaluate.new", "–", "x", ""),
        ("evaluate.ok", "True", "False", ""),
        ("evaluate.perplexity", "4", "3", "0.75"),
        ("evaluate.tasks.t.acc", "0.25", "0.5", "2"),
        ("evaluate.zero", "0", "2", ""),
    ]


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "work")
    return dataclasses.replace(finished, folder=tmp_path / "work")


@pytest.mark.slow
def test_two_real_runs(copy):
    first = copy.show()["run"]
    copy.run("run", "small.yaml", "--set", "evaluate.max_rows=6", "--set", "evaluate.generations=0")
    shown = copy.run("show", f"small@{first}", "small").stdout
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    assert ["evaluate.max_rows", "12", "6"] in lines and ["evaluate.generations", "2", "0"] in lines
    assert ["evaluate.rows", "12", "6", "0.5"] in lines
    assert not [line for line in lines if line[0].startswith(("train.", "certify."))]
    both = json.loads(copy.run("show", f"small@{first}", "small", "--json").stdout)
    assert [set(one) for one in both] == [{"recipe", "run", "stages"}] * 2
    alike = copy.run("show", "small", "small").stdout
    assert "the same recipe and the same figures" in alike
