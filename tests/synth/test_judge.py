"""Pairwise verdicts: how a reply is read, what both orders give, and the figures."""

import pytest

from finetune.context import Context
from finetune.recipe import LanguageModel, Runtime, Tracking
from finetune.synth.asking import Budget, open_asker
from finetune.synth.judge import Pair, Verdict, compare, figures, read_verdict, words_of
from finetune.synth.prompts import Prompts
from tests.helpers.chat_server import chat_server

pytest.importorskip("openai")


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("The first is right. Verdict: 1", 0.0),
        ("**Verdict:** 2.", 1.0),
        ("Not `Verdict: 1`, no.\nVerdict: 2", 1.0),
        ("VERDICT - Tie", 0.5),
        (" 2\n", 1.0),
        ("Verdict: 12", None),
        ("The verdict: 2-1 for answer 1. Verdict: Answer 1", 0.0),
        ("**Verdict**: `2`\nThat is my verdict.", 1.0),
        ("## Verdict\n\n__Tie__\n", 0.5),
        ("Verdict: [[2]]\n", 1.0),
        ("Verdict: 1/2", None),
        ("Verdict: 1 or 2? tie", None),
        ("Verdict: 2-1 for answer 1", None),
        ("Verdict: 1\nVerdict: neither", None),
        ("Verdict: 1.5", None),
        ("Answer 1 is better", None),
        ("", None),
    ],
)
def test_the_last_verdict_of_a_reply_counts(reply, score):
    assert read_verdict(reply) == score


def judged(tmp_path, pairs, judge):
    with chat_server(judge) as server:
        model = LanguageModel(endpoint=server.url, name="m")
        ctx = Context(tmp_path, Runtime(), Tracking())
        with open_asker(model, tmp_path, Budget(), ctx, "f") as asker:
            found = compare(asker, Prompts(), pairs, 64, "v")
        with open_asker(model, tmp_path, Budget(), ctx, "f") as asker:
            assert compare(asker, Prompts(), pairs, 64, "v") == found
        return found, server


def longest(body):
    text = body["messages"][-1]["content"]
    one, two = (text.split(f"[Answer {n}]\n")[1].split("\n[End")[0] for n in (1, 2))
    return f"Verdict: {1 if len(one) > len(two) else 2}"


def test_each_pair_is_asked_in_both_orders_and_verdicts_are_kept(tmp_path):
    pairs = [Pair("q", "long answer", "short"), Pair("q", "a", "bb"), Pair("q", "same", "same ")]
    found, server = judged(tmp_path, pairs, longest)
    assert found == [Verdict(0, 0), Verdict(1, 1), Verdict(0.5, 0.5)]
    assert len(server.requests) == 4 and all(body["temperature"] == 0 for body in server.requests)


def test_a_judge_that_prefers_a_place_gives_ties_and_no_agreement(tmp_path):
    found, _ = judged(tmp_path, [Pair("q", f"a{n}", f"b{n}") for n in range(9)], lambda body: "Verdict: 1")
    values = figures(found, 0)
    assert (values["win_rate"], values["ties"], values["order_agreement"], values["first_shown"]) == (0.5, 9, 0, 1)


def test_figures_of_swapped_answers_mirror_each_other():
    verdicts = [Verdict(a, b) for a in (0, 0.5, 1) for b in (0, 0.5, 1)] + [Verdict(1, 1)] * 5 + [Verdict(None, 1)]
    mirrored = [Verdict(None if v.forward is None else 1 - v.forward, 1 - v.backward) for v in verdicts]
    one, other = figures(verdicts, 0), figures(mirrored, 0)
    assert one["win_rate"] + other["win_rate"] == pytest.approx(1)
    assert (one["wins"], one["ties"], one["losses"]) == (other["losses"], other["ties"], other["wins"])
    assert one["wins"] + one["ties"] + one["losses"] == one["rows"] == 14 and one["unreadable"] == 1
    low, high = one["win_rate_interval"]
    assert low < one["win_rate"] < high and one["order_agreement"] == other["order_agreement"] == 8 / 14


def test_the_sentence_says_whether_the_two_are_told_apart():
    won = words_of({"model": "m", **figures([Verdict(1, 1)] * 20, 0)})
    assert "wins 100.0%" in won and "does not distinguish" not in won
    assert "does not distinguish" in words_of({"model": "m", **figures([Verdict(1, 1), Verdict(0, 0)] * 10, 0)})
    assert "none of its 2 replies" in words_of({"model": "m", **figures([Verdict(None, 1)] * 2, 0)})
