"""Rules as people write them in YAML: every form, every mistake with its line, and the same in the schema."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from finetune.errors import InputError
from finetune.pipeline import recipe_checks
from finetune.recipe import reference
from finetune.recipe.filters import RULES, Filter, Own, Repetition
from finetune.recipe.load import load_recipe, parse_recipe

HEAD = "schema: 1\nname: t\nmodel: builtin:tiny-mistral\ndata: [{source: pydoc}]\n"
SCHEMA = Draft202012Validator(reference.schema())


def read(rules: str, path: Path = Path("r.yaml")) -> Filter:
    section = parse_recipe(f"{HEAD}filter:\n  rules: {rules}\n", path).filter
    assert section is not None
    return section


def schema_takes(rules: str) -> bool:
    return SCHEMA.is_valid(yaml.safe_load(f"{HEAD}filter:\n  rules: {rules}\n"))


GOOD = [
    "[]",
    "[refusals, truncated, echo, links, turns, symbols, repetition]",
    "[{rule: repetition, max_duplicate_lines: 0.2}, refusals]",
    "[{rule: language, languages: [en, de]}]",
    "[my_rules:short, 'a.b.c:d']",
    "[{rule: 'my_rules:short'}]",
    "[{rule: own, function: 'my_rules:short'}]",
]


@pytest.mark.parametrize("rules", GOOD, ids=range(len(GOOD)))
def test_every_form_is_taken_by_both(rules):
    assert len(read(rules).rules) == len(yaml.safe_load(rules))
    assert schema_takes(rules)


def test_a_bare_name_is_its_defaults_and_the_folder_stays_out_of_the_key(tmp_path):
    assert read("[repetition]").rules == [Repetition(rule="repetition")] == read("[{rule: repetition}]").rules
    (own,) = read("['m:f']", tmp_path / "r.yaml").rules
    assert isinstance(own, Own) and own.folder == tmp_path
    assert own.model_dump() == {"rule": "own", "function": "m:f"}


BAD = [
    ("[refusal]", "r.yaml:6: filter.rules.0: found 'refusal'; allowed: .*did you mean refusals"),
    ("[{rule: refusal}]", "filter.rules.0: found 'refusal'"),
    ("[{max_share: 0.1}]", "the field `rule` is missing"),
    ("[5]", "filter.rules.0: found 5; allowed: turns"),
    ("[null]", "filter.rules.0: found null; allowed: turns"),
    ("[language]", "filter.rules.0.languages: this field is required"),
    ("[own]", "filter.rules.0.function: this field is required"),
    ("[{rule: language, languages: []}]", "filter.rules.0.languages"),
    ("[{rule: links, max_shar: 0.1}]", "max_shar: unknown field; did you mean max_share"),
    ("[{rule: links, max_share: 2}]", "found 2; allowed: less than or equal to 1"),
    ("['a b:c']", "allowed: MODULE:FUNCTION"),
    ("[{rule: own, function: os.system}]", "allowed: MODULE:FUNCTION"),
    ("[{rule: 'm:f', folder: /tmp}]", "folder: unknown field"),
    ("refusals", "found 'refusals'; allowed: a list"),
]


@pytest.mark.parametrize(("rules", "says"), BAD, ids=range(len(BAD)))
def test_every_mistake_is_refused_by_both(rules, says):
    with pytest.raises(InputError, match=says):
        read(rules)
    assert not schema_takes(rules)


def test_what_contradicts_itself_is_refused():
    with pytest.raises(InputError, match=r"filter\.rules\.2: links is listed twice"):
        read("[links, echo, {rule: links, max_share: 0.1}]")
    with pytest.raises(InputError, match="1 is under min_turns 2: no row would be kept"):
        read("[{rule: turns, min_turns: 2, max_turns: 1}]")
    with pytest.raises(InputError, match="max_length_tokens: 5 is under min_length_tokens 6"):
        parse_recipe(f"{HEAD}filter: {{min_length_tokens: 6, max_length_tokens: 5}}\n", Path("r.yaml"))


def test_every_rule_has_its_table_and_its_name():
    page = reference.reference_text()
    assert all(f"## `filter: {name}`" in page for name in RULES)


def test_validation_looks_for_the_function(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(f"{HEAD}filter:\n  rules:\n    - echo\n    - mine:f\n")
    (said,) = recipe_checks.absent(load_recipe(str(path), []))
    assert said.startswith(f"{path}:8: filter.rules.1: filter rule mine:f: no module mine")
    (tmp_path / "mine.py").write_text("def f(row): ...\n")
    assert recipe_checks.absent(load_recipe(str(path), [])) == []
