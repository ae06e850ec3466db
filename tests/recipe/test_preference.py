"""The section preference: what it refuses, and that its losses are TRL's."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest

from finetune.errors import InputError
from finetune.recipe.load import parse_recipe
from finetune.recipe.preference import LOSSES, SMOOTHED

HEAD = "schema: 1\nname: a\nmodel: builtin:tiny-mistral\ndata:\n  - source: pydoc\n"
PAIRS = "preference:\n  data:\n    - {source: pydoc, format: preference}\n"


def recipe(text):
    return parse_recipe(HEAD + text, Path("a.yaml"))


def said(text):
    with pytest.raises(InputError) as error:
        recipe(text)
    return str(error.value)


def test_without_the_section_there_is_none_and_with_it_the_defaults_are_dpos():
    assert recipe("").preference is None
    found = recipe(PAIRS).preference
    assert (found.method, found.loss_type, found.beta, found.batch_pairs) == ("dpo", "sigmoid", 0.1, 16)
    assert recipe(PAIRS + "  method: kto\n").preference.loss_type == "kto"


def test_the_losses_are_those_of_the_installed_trl():
    from trl import DPOConfig, KTOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    branches = set(re.findall(r'loss_type == "(\w+)"', inspect.getsource(DPOTrainer)))
    assert set(LOSSES["dpo"]) == branches
    kto = next(f for f in dataclasses.fields(KTOConfig) if f.name == "loss_type")
    assert list(LOSSES["kto"]) == kto.metadata["choices"]
    assert "Robust DPO and EXO" in DPOConfig.__doc__ and SMOOTHED == ("robust", "exo_pair")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("  loss: ap_zero\n", "a.yaml:9: preference.loss: found 'ap_zero'"),
        ("  loss: ap_zero\n", "did you mean apo_zero?"),
        ("  loss: kto\n", "kto is a loss of method kto; method dpo has sigmoid"),
        ("  method: kto\n  loss: ipo\n", "a.yaml:10: preference.loss: ipo is a loss of method dpo"),
        ("  loss: ipo\n  label_smoothing: 0.1\n", "preference.label_smoothing: only robust and exo_pair read it"),
        ("  loss: exo_pair\n", "preference.label_smoothing: the loss exo_pair needs one above 0"),
        ("  method: kto\n  max_length_bias: 0.6\n", "preference.max_length_bias: method kto has single answers"),
        ("  desirable_weight: 2\n", "a.yaml:9: preference.desirable_weight: only method kto has one"),
        (
            "  eval_data:\n    - {source: pydoc, format: preference}\n  eval_fraction: 0.1\n",
            "preference.eval_fraction: with eval_data nothing else is held out",
        ),
        ("  beta: 0\n", "preference.beta: found 0"),
    ],
)
def test_what_contradicts_is_refused_with_its_line(lines, words):
    assert words in said(PAIRS + lines)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{source: pydoc}", "preference.data.0.format: found messages; allowed here: preference"),
        ("{source: pydoc, format: kto}", "single answers with a label need method: kto"),
        ("{source: hub, id: a/b, format: alpaca}", "preference.data.0.format: found alpaca"),
        ("{source: hub, id: a/b, weight: 2}", "preference.data.0.weight: pairs are used once each"),
    ],
)
def test_sources_of_another_kind_are_refused(source, words):
    assert words in said(f"preference:\n  data:\n    - {source}\n")


@pytest.mark.parametrize("section", ["eval_data:\n  - ", "decontaminate:\n  against:\n    - "])
def test_pairs_are_no_rows_for_sft(section):
    assert "rows of format kto belong under preference.data" in said(section + "{source: hub, id: a/b, format: kto}\n")


def test_new_tokens_and_preferences_exclude_each_other():
    assert "preference: new tokens (tokens.add) cannot be trained on preferences" in said(
        PAIRS + "tokens: {add: ['<tool>']}\n"
    )
