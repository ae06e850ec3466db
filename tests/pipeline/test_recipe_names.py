"""A recipe that has run is found by its name, wherever its file was; a file of that name comes first."""

import json

import pytest

from finetune.errors import InputError
from finetune.pipeline.recipe_names import load_recipe

RECIPE = "schema: 1\nname: made-by-a-test\nmodel: builtin:tiny-mistral\ndata:\n  - {source: pydoc}\n"


@pytest.fixture
def artifacts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "artifacts" / "runs" / "made-by-a-test" / "20260102T030405Z-01234567"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "run.json").write_text(
        json.dumps({"recipe": "made-by-a-test", "run": folder.name, "sets": ["seed=7"], "stages": {}})
    )
    (folder.parent / "latest").write_text(folder.name + "\n")
    return tmp_path / "artifacts"


def test_a_run_gives_the_recipe_it_read_with_its_changes(artifacts):
    for name in ("made-by-a-test", "made-by-a-test@20260102T030405Z-01234567"):
        loaded = load_recipe(name, ["train.epochs=2"], artifacts)
        assert (loaded.recipe.name, loaded.recipe.seed, loaded.recipe.training.epochs) == ("made-by-a-test", 7, 2)


def test_a_file_comes_before_a_run_and_recipes_before_both(artifacts):
    (artifacts.parent / "made-by-a-test.yaml").write_text(RECIPE.replace("pydoc}", "pydoc, take: 5}"))
    assert load_recipe("made-by-a-test", [], artifacts).recipe.data[0].take == 5
    assert load_recipe("tiny-pydoc", [], artifacts).recipe.name == "tiny-pydoc"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("gone", "no recipe named 'gone'"),
        ("gone.yaml", "no such recipe file"),
        ("made-by-a-test@gone", "no run 'gone'"),
        ("a/gone", "no recipe named"),
    ],
)
def test_what_is_neither_is_refused(name, sentence, artifacts):
    with pytest.raises(InputError, match=sentence):
        load_recipe(name, [], artifacts)
