"""The schema and the reference page: never stale, every field said, and what validate refuses the schema refuses."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from finetune.errors import InputError
from finetune.recipe import Recipe, reference
from finetune.recipe.load import _Loader, parse_recipe
from finetune.recipe.messages import written_fields

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
VALIDATOR = Draft202012Validator(reference.schema())
GOOD = {"schema": 1, "name": "good", "model": "builtin:tiny-mistral", "data": [{"source": "pydoc"}]}


def refused(tree):
    return [e.message for e in VALIDATOR.iter_errors(tree)]


@pytest.mark.parametrize(
    ("path", "text"),
    [("recipes/schema.json", reference.schema_text()), ("docs/recipe-reference.md", reference.reference_text())],
    ids=["schema", "reference"],
)
def test_what_is_made_of_the_models_is_not_stale(path, text):
    assert (ROOT / path).read_text(encoding="utf-8") == text, "run `make docs`"


def test_a_stale_file_is_written_anew_and_the_same_bytes_each_time(tmp_path):
    first = {p.name: p.read_bytes() for p in reference.write(tmp_path)}
    (tmp_path / "recipes" / "schema.json").write_text("{}")
    assert {p.name: p.read_bytes() for p in reference.write(tmp_path)} == first
    assert sorted(first) == ["recipe-reference.md", "schema.json"]


def test_the_schema_is_one():
    Draft202012Validator.check_schema(reference.schema())


def models():
    return [Recipe, *(m for m in reference._models(Recipe) if m is not Recipe)]


@pytest.mark.parametrize("model", models(), ids=lambda m: m.__name__)
def test_every_field_has_a_sentence(model):
    sentences = reference.sentences_of(model)
    assert set(sentences) == set(written_fields(model))
    for field, sentence in sentences.items():
        assert sentence.endswith(".") and len(sentence) <= 130, (field, sentence)


def test_what_a_person_cannot_write_is_in_neither():
    text = reference.schema_text() + reference.reference_text()
    assert "template_file" not in text and '"folder"' not in text and "`folder`" not in text


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_the_schema_accepts_every_recipe_and_each_names_it(path):
    assert refused(yaml.load(path.read_text(encoding="utf-8"), _Loader)) == []
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first == "# yaml-language-server: $schema=./schema.json"
    assert json.loads((path.parent / "schema.json").read_text(encoding="utf-8")) == reference.schema()


FINE = {
    "a model with a revision": {"model": {"id": "a/b", "revision": "main"}},
    "a model without an owner": {"model": "gpt2"},
    "a folder": {"model": "./base"},
    "a folder by its whole path": {"model": "/models/base"},
    "a folder in a folder": {"model": "models/a/b"},
    "sections that are off": {"filter": None, "dedup": None, "pack": None, "split": None, "export": None},
    "an expression": {"lora": {"targets": r".*\.(q|v)_proj"}},
    "a list of targets": {"lora": {"targets": ["q_proj"]}},
    "micro-batch by hand": {"runtime": {"micro_batch_rows": 2}},
    "micro-batch by itself": {"runtime": {"micro_batch_rows": "auto"}},
    "every kind of source": {
        "data": [{"source": "pydoc"}, {"source": "hub", "id": "a/b"}, {"source": "local", "path": "x"}]
    },
}


@pytest.mark.parametrize("change", FINE.values(), ids=FINE.keys())
def test_what_is_fine_is_fine_for_both(change):
    tree = {**GOOD, **change}
    assert refused(tree) == []
    parse_recipe(yaml.safe_dump(tree), Path("r.yaml"))


BAD = {
    "no name": {"name": None},
    "a name that is a path": {"name": "../evil"},
    "an unknown section": {"trian": {}},
    "an unknown field": {"train": {"learning_rte": 1}},
    "an unknown field of a source": {"data": [{"source": "pydoc", "formt": "auto"}]},
    "an internal field": {"render": {"template_file": "/etc/passwd"}},
    "an internal field of the model": {"model": {"id": "a/b", "folder": "/etc"}},
    "a word for a number": {"train": {"learning_rate": "high"}},
    "a number in quotes": {"train": {"epochs": "1"}},
    "a truth of YAML 1.1": {"dedup": {"exact": "no"}},
    "a truth for a number": {"lora": {"r": True}},
    "a rate of zero": {"train": {"learning_rate": 0}},
    "half a batch": {"train": {"batch_rows": 1.5}},
    "a section that cannot be off": {"lora": None},
    "a list for a section": {"train": [1]},
    "no data": {"data": []},
    "data that is no list": {"data": {"source": "pydoc"}},
    "an unknown source": {"data": [{"source": "locl", "path": "x"}]},
    "a source without its path": {"data": [{"source": "local"}]},
    "an unknown format": {"data": [{"source": "local", "path": "x", "format": "alpacca"}]},
    "an unknown builtin": {"model": "builtin:huge"},
    "a model that is no name": {"model": "a b"},
    "a model that is a number": {"model": 5},
    "an unknown export": {"export": {"gguf": ["q9"]}},
    "an export of nothing": {"export": {"gguf": []}},
    "an export of an unknown folder": {"export": {"hf": ["int3"]}},
    "a repository without an owner": {"publish": {"repo": "me"}},
    "a threshold above one": {"dedup": {"threshold": 1.5}},
    "an unknown keep": {"dedup": {"keep": "shortest"}},
    "a newer schema": {"schema": 2},
    "a seed that is too large": {"seed": 2**32},
    "a rank of zero for a pattern": {"lora": {"rank_pattern": {"q_proj": 0}}},
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD.keys())
def test_what_is_refused_is_refused_by_both(change):
    tree = {**GOOD, **change}
    assert refused(tree)
    with pytest.raises(InputError):
        parse_recipe(yaml.safe_dump(tree), Path("r.yaml"))


SCALARS = st.sampled_from([None, True, False, 0, 1, -1, 3, 0.5, 1e-4, 2.0**40, "", "auto", "a/b", "no", "16", "x y"])
FIELDS = [
    (name, field)
    for name, section in written_fields(Recipe).items()
    for model in reference._models(section.annotation)
    if name not in ("data", "decontaminate")
    for field in written_fields(model)
]


@given(st.sampled_from(FIELDS), SCALARS | st.lists(SCALARS, max_size=2))
def test_the_schema_never_refuses_what_validate_takes(place, value):
    section, field = place
    base = {**GOOD, **({"model": {"id": "a/b"}} if section == "model" else {"export": {"gguf": ["f16"]}})}
    tree = {**base, section: {**(base[section] if isinstance(base.get(section), dict) else {}), field: value}}
    try:
        parse_recipe(yaml.safe_dump(tree), Path("r.yaml"))
    except InputError:
        return
    assert refused(tree) == []
