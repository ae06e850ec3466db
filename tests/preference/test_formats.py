"""Every notation of preference data gives the same pair, and what is no pair says why."""

from __future__ import annotations

import json

import pytest

from finetune.data.formats import FormatError
from finetune.data.records import Message
from finetune.data.values import RowError
from finetune.preference.formats import decide_pairs, to_pairs

USER = {"role": "user", "content": "What is it?"}
GOOD, BAD = "It is blue.", "No idea."


def said(text, role="assistant"):
    return {"role": role, "content": text}


def read(row, method="dpo", columns=(), ignored=(), asked="auto"):
    layout = decide_pairs(asked, dict(columns), [row], ignored, method)
    return to_pairs(row, layout, "r:1", "r", method)


def shown(pair):
    return [(m.role, m.content) for m in pair.prompt], [[(m.role, m.content) for m in a] for a in pair.answers]


def called(arguments):
    return {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


PLAIN = ([("user", "What is it?")], [[("assistant", GOOD)], [("assistant", BAD)]])
HH = "\n\nHuman: What is it?\n\nAssistant: "
SAME = {
    "texts": {"prompt": "What is it?", "chosen": GOOD, "rejected": BAD},
    "another name of the prompt": {"question": "What is it?", "chosen": GOOD, "rejected": BAD},
    "Alpaca's input": {"instruction": "What", "input": "is it?", "chosen": GOOD, "rejected": BAD},
    "messages": {"prompt": [USER], "chosen": [said(GOOD)], "rejected": [said(BAD)]},
    "messages as JSON text": {"chosen": json.dumps([USER, said(GOOD)]), "rejected": json.dumps([USER, said(BAD)])},
    "a text and messages": {"prompt": "What is it?", "chosen": [said(GOOD)], "rejected": [said(BAD)]},
    "whole conversations": {"chosen": [USER, said(GOOD)], "rejected": [USER, said(BAD)]},
    "UltraFeedback": {
        "prompt": "What is it?", "prompt_id": "7", "chosen": [USER, said(GOOD)], "rejected": [USER, said(BAD)],
        "messages": [USER, said(GOOD)], "score_chosen": 8.5, "score_rejected": 3.0,
    },
    "scores as text": {
        "prompt": "What is it?", "chosen": GOOD, "rejected": BAD, "chosen_score": "8", "rejected_score": "3",
    },
    "LLaMA-Factory": {
        "conversations": [{"from": "human", "value": "What is it?"}],
        "chosen": {"from": "gpt", "value": GOOD}, "rejected": {"from": "gpt", "value": BAD},
    },
    "HH": {"chosen": HH + GOOD, "rejected": HH + BAD},
    "HH with a prompt of its own": {"prompt": HH.rstrip(), "chosen": GOOD, "rejected": BAD},
    "texts that a template wrote": {
        "chosen": f"<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n{GOOD}<|im_end|>\n",
        "rejected": f"<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n{BAD}<|im_end|>\n",
    },
    "lists of one text": {"prompt": "What is it?", "chosen": [GOOD], "rejected": [BAD]},
}  # fmt: skip
ALPACA = ([("user", "What\n\nis it?")], PLAIN[1])


@pytest.mark.parametrize("name", SAME)
def test_every_notation_gives_the_same_pair(name):
    (pair,) = read(SAME[name])
    assert shown(pair) == (ALPACA if name == "Alpaca's input" else PLAIN)


def test_the_prompt_is_the_longest_common_beginning_of_whole_turns():
    first, again = said("Hello."), said("And then?", "user")
    chosen, rejected = [USER, first, again, said(GOOD)], [USER, first, again, said(BAD)]
    (pair,) = read({"chosen": chosen, "rejected": rejected})
    assert shown(pair)[0] == [("user", "What is it?"), ("assistant", "Hello."), ("user", "And then?")]
    (pair,) = read({"chosen": [USER, first, again, said(GOOD)], "rejected": [USER, said("Hi."), again, said(GOOD)]})
    assert shown(pair)[0] == [("user", "What is it?")] and len(pair.answers[0]) == len(pair.answers[1]) == 3
    row = pair.example(0)
    assert [m.learn for m in row.messages] == [True] * 4 and row.id == "r:1 (chosen)"
    (pair,) = read({"chosen": chosen, "rejected": rejected})
    assert [m.learn for m in pair.example(1).messages] == [True, False, True, True]


def test_systems_and_tools_stand_before_the_prompt():
    tools = [{"name": "look", "parameters": {}}]
    row = {"system": "Be kind.", "tools": tools, **SAME["texts"]}
    (pair,) = read(row)
    assert pair.prompt == (Message("system", "Be kind."), Message("user", "What is it?"))
    assert json.loads(pair.tools)[0]["function"]["name"] == "look"
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "look", "arguments": {"at": "sea"}}]}
    (pair,) = read({"prompt": [USER], "chosen": [call], "rejected": [said(BAD)], "functions": json.dumps(tools)})
    assert "sea" in pair.answers[0][0].extra and pair.tools


def test_other_columns_are_kept_for_rules():
    (pair,) = read({**SAME["texts"], "margin": 3})
    assert pair.extra == '{"margin":3}'


KTO = {
    "texts": {"prompt": "What is it?", "completion": GOOD, "label": True},
    "messages": {"prompt": [USER], "completion": [said(GOOD)], "label": 1},
    "a whole conversation": {"messages": [USER, said(GOOD)], "kto_tag": True},
    "text labels": {"question": "What is it?", "answer": GOOD, "label": "true"},
}


@pytest.mark.parametrize("name", KTO)
def test_kto_rows_in_every_notation(name):
    (pair,) = read(KTO[name], "kto")
    assert shown(pair) == (PLAIN[0], PLAIN[1][:1]) and pair.label is True


def test_a_pair_is_two_answers_for_kto():
    good, bad = read(SAME["HH"], "kto")
    assert (good.id, good.label, bad.id, bad.label) == ("r:1+", True, "r:1-", False)
    assert shown(bad) == (PLAIN[0], PLAIN[1][1:])


WRONG = {
    "no difference": ({**SAME["texts"], "rejected": GOOD}, "no_difference"),
    "no difference in conversations": ({"chosen": [USER, said(GOOD)], "rejected": [USER, said(GOOD)]}, "no_difference"),
    "a blank side": ({**SAME["texts"], "rejected": "  "}, "missing_side"),
    "a null side": ({**SAME["texts"], "chosen": None}, "missing_side"),
    "a blank answer in messages": ({"prompt": [USER], "chosen": [said("")], "rejected": [said(BAD)]}, "missing_side"),
    "a side that ends early": ({"chosen": [USER, said(GOOD)], "rejected": [USER]}, "missing_side"),
    "a user last": (
        {"chosen": [USER, said(GOOD), USER], "rejected": [USER, said(BAD)]},
        "missing_side",
    ),
    "other prompts": ({"chosen": HH + GOOD, "rejected": HH.replace("it", "that") + BAD}, "prompts_differ"),
    "a prompt column of another prompt": (
        {"prompt": "Why?", "chosen": [USER, said(GOOD)], "rejected": [USER, said(BAD)]},
        "prompts_differ",
    ),
    "another system": (
        {"chosen": [said("A", "system"), USER, said(GOOD)], "rejected": [said("B", "system"), USER, said(BAD)]},
        "prompts_differ",
    ),
    "no prompt": ({"chosen": GOOD, "rejected": BAD}, "no_prompt"),
    "tied scores": ({**SAME["UltraFeedback"], "score_rejected": 8.5}, "tied_scores"),
    "scores the other way round": ({**SAME["UltraFeedback"], "score_rejected": 9}, "scores_reversed"),
    "a score that is none": ({**SAME["UltraFeedback"], "score_rejected": "good"}, "score"),
    "a score that is missing, as pandas writes it": (
        {**SAME["UltraFeedback"], "score_rejected": float("nan")},
        "score",
    ),
    "a score beyond floats": ({**SAME["UltraFeedback"], "score_rejected": 10**400}, "score"),
    "answers of other white space": ({**SAME["texts"], "rejected": f"\n{GOOD} "}, "no_difference"),
    "answers in two Unicode forms": (
        {**SAME["texts"], "chosen": "caf\u00e9", "rejected": "cafe\u0301"},
        "no_difference",
    ),
    "calls of other order": (
        {"prompt": [USER], "chosen": [called({"a": 1, "b": 2})], "rejected": [called({"b": 2, "a": 1})]},
        "no_difference",
    ),
    "a prompt that ends with an answer": ({**SAME["texts"], "prompt": [USER, said(GOOD)]}, "no_prompt"),
    "a prompt without a user": ({**SAME["texts"], "prompt": [said("Be brief.", "system")]}, "no_prompt"),
    "a prompt column that is a part of a word": (
        {"prompt": "hat", "chosen": [USER, said(GOOD)], "rejected": [USER, said(BAD)]},
        "prompts_differ",
    ),
    "a column that is not read": ({**SAME["texts"], "context": "The sea."}, "unused_column"),
    "a picture": ({**SAME["texts"], "images": ["a.png"]}, "unused_column"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_pair_says_why(name):
    row, reason = WRONG[name]
    with pytest.raises(RowError) as error:
        read(row)
    assert error.value.reason == reason and "found" in str(error.value)


def test_answers_that_differ_in_case_or_inner_white_space_are_a_pair():
    for other in (GOOD.upper(), GOOD.replace(" ", "  ")):
        assert read({**SAME["texts"], "rejected": other})
    assert read({"prompt": [USER], "chosen": [called({"a": 1})], "rejected": [called({"a": 2})]})


@pytest.mark.parametrize("label", [2, "yes", None, 0.5, [1], "", float("nan")])
def test_labels_are_0_or_1(label):
    with pytest.raises(RowError, match="allowed is 0 or 1"):
        read({"prompt": "a", "completion": "b", "label": label}, "kto")


def test_ignored_columns_are_not_missed():
    (pair,) = read({**SAME["texts"], "context": "The sea."}, ignored=("context",))
    assert shown(pair) == PLAIN


@pytest.mark.parametrize(
    ("row", "more", "words"),
    [
        ({"a": 1}, {}, "needs the columns chosen and rejected .preference. or label .kto."),
        ({"a": 1}, {"asked": "preference"}, "Say which"),
        ({"prompt": "a", "completion": "b", "label": 1}, {}, "set method: kto"),
        (SAME["texts"], {"columns": {"promt": "prompt"}}, "did you mean prompt"),
        (SAME["texts"], {"columns": {"chosen": "chose"}}, "did you mean chosen"),
    ],
)
def test_columns_that_no_format_fits(row, more, words):
    with pytest.raises(FormatError, match=words):
        read(row, **more)


def test_columns_of_other_names_are_mapped():
    row = {"ask": "What is it?", "win": GOOD, "lose": BAD}
    (pair,) = read(row, columns={"prompt": "ask", "chosen": "win", "rejected": "lose"})
    assert shown(pair) == PLAIN


def test_a_prompt_in_a_script_without_spaces_is_found_in_the_turn_that_wraps_it():
    from finetune.preference.formats import _holds

    assert _holds("请回答你好吗？谢谢", "你好吗") and _holds("Please: what is it? Thanks", "what is it?")
    assert not _holds("Quite another", "a") and not _holds("a1", "a")
