"""Measures of answers: known values, bounds, other implementations, and base beside adapter."""

import importlib.util
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.eval import answer_metrics as measures

NAMES = ["exact_match", "f1", "rouge_l", "bleu", "chrf", "json_valid", "tool_call_match"]
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1, "b": "x"}}\n</tool_call>'


def one(name, answer, reference):
    found, rows = measures.compare([name], [reference], [answer], [answer], 0)
    assert found[name]["base"] == found[name]["adapter"] and found[name]["better"] == found[name]["worse"] == 0
    return rows[0][name][0]


@pytest.mark.parametrize(
    ("name", "answer", "reference", "value"),
    [
        ("exact_match", " A  b\n", "A b", 1),
        ("exact_match", "a b", "A b", 0),
        ("exact_match", "e\u0301", "é", 1),
        ("f1", "the tall cat sat", "a tall CAT", 4 / 7),
        ("f1", "", "", 1),
        ("f1", "", "a", 0),
        ("f1", "猫は好き", "犬は好き", 0.75),
        ("rouge_l", "the cat sat", "the cat ran", 2 / 3),
        ("rouge_l", "кот сидит", "кот сидит", 1),  # rouge-score's own tokenizer would see no word
        ("bleu", "the cat sat on the mat", "the cat sat on the mat", 1),
        ("chrf", "the cat", "the cat", 1),
        ("chrf", "xyz", "the cat", 0),
        ("json_valid", '{"a": [1]}', '{"b": 2}', 1),
        ("json_valid", '{"a": [1', "[]", 0),
        ("json_valid", "3", "[]", 0),
        ("json_valid", "{}", "plain text", None),
        ("tool_call_match", '{"name": "f", "arguments": {"b": "x", "a": 1}}', CALL, 1),
        ("tool_call_match", '{"name": "f", "parameters": {"b": "x", "a": 1}}', CALL, 1),
        ("tool_call_match", json.dumps({"name": "f", "arguments": json.dumps({"a": 1, "b": "x"})}), CALL, 1),
        ("tool_call_match", '{"name": "f", "arguments": {"a": 2, "b": "x"}}', CALL, 0),
        ("tool_call_match", CALL + CALL, CALL, 0),
        ("tool_call_match", CALL.replace('"f"', '"g"') + CALL, CALL + CALL.replace('"f"', '"g"'), 1),
        ("tool_call_match", '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1, "b": "x"}}]', CALL, 1),
        ("tool_call_match", "{broken", CALL, 0),
        ("tool_call_match", CALL, 'no call, but {"name": "f"}', None),
    ],
)
def test_known_values(name, answer, reference, value):
    assert one(name, answer, reference) == pytest.approx(value)


@given(st.text(max_size=40), st.text(max_size=40))
@settings(max_examples=40, deadline=None)
def test_every_measure_is_within_its_bounds_and_whole_for_the_reference_itself(answer, reference):
    for name in NAMES:
        value = one(name, answer, reference)
        assert value is None or -1e-9 <= value <= 1 + 1e-9
    assert one("exact_match", reference, reference) == one("f1", reference, reference) == 1


def sentences(count, seed):
    chance = random.Random(seed)
    return [" ".join(chance.choices("a cat sat on the mat and ran to it again".split(), k=12)) for _ in range(count)]


def test_bleu_is_sacrebleus_own_of_the_corpus():
    from sacrebleu.metrics.bleu import BLEU

    references, answers = sentences(20, 0), sentences(20, 1)
    found, _ = measures.compare(["bleu"], references, references, answers, 0)
    assert found["bleu"]["adapter"] == pytest.approx(BLEU().corpus_score(answers, [references]).score / 100)
    assert found["bleu"]["base"] == pytest.approx(1)


@pytest.mark.parametrize("name", ["f1", "rouge_l", "bleu", "chrf", "exact_match"])
def test_what_is_better_is_told_from_chance_and_what_is_alike_is_not(name):
    references = sentences(40, 0)
    random_ones, others = sentences(40, 1), sentences(40, 2)
    better, rows = measures.compare([name], references, random_ones, references, 0)
    assert measures.verdict(better[name]) == "better" and better[name]["better"] == 40 == len(rows)
    assert better[name]["difference"] == pytest.approx(better[name]["adapter"] - better[name]["base"])
    low, high = better[name]["interval"]
    assert low <= better[name]["difference"] <= high
    worse, _ = measures.compare([name], references, references, random_ones, 0)
    assert measures.verdict(worse[name]) == "worse" and worse[name]["worse"] == 40
    assert worse[name]["interval"] == pytest.approx([-high, -low], abs=0.05)
    # Each row once with the answers of the one and once with those of the other: no difference, whatever was drawn.
    alike, _ = measures.compare([name], references * 2, random_ones + others, others + random_ones, 0)
    assert measures.verdict(alike[name]) == "no clear difference"


def test_a_measure_that_applies_to_no_row_says_so():
    found, rows = measures.compare(["json_valid"], ["a", "b"], ["{}", "{}"], ["{}", "{}"], 0)
    assert found["json_valid"]["rows"] == 0 and measures.verdict(found["json_valid"]) == "no row"
    assert rows == [{"json_valid": (None, None)}] * 2
    assert measures.words_of("json_valid", found["json_valid"]).endswith("it applies to no reference")
    one_row, _ = measures.compare(["f1"], ["a"], ["a"], ["b"], 0)
    assert one_row["f1"]["interval"] is None and measures.verdict(one_row["f1"]) == "no clear difference"
    assert np.isfinite(one_row["f1"]["difference"])


def test_a_package_that_is_not_there_is_named_once(monkeypatch):
    assert measures.missing(NAMES) == []
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in ("sacrebleu", "rouge_score") else find(n))
    assert measures.missing(["exact_match", "f1"]) == []
    told = measures.missing(NAMES)
    assert len(told) == 2 and "rouge_l needs rouge-score" in told[0] and "bleu, chrf needs sacrebleu" in told[1]
    assert all("pip install '.[metrics]'" in why for why in told)
