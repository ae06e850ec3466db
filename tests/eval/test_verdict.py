"""The verdict: every line is good, unsure and bad for the figures that make it so."""

import math

import pytest

from finetune.eval.copies import Copies, count_copies
from finetune.eval.verdict import BAD, GOOD, UNSURE, few_steps, verdict

TRAIN = {"steps": 150, "loss": 3.0}
CERTIFY = {"agreement": 0.998, "mean_kl": 7e-6, "tokens": 8000}


def evaluate(ratio=0.35, low=0.33, high=0.37, base=74.0, stop=1.0, rows=256):
    return {
        "perplexity_base": base, "perplexity_adapter": base * ratio, "perplexity_ratio": ratio,
        "perplexity_ratio_interval": [low, high], "stop_rate": stop, "stop_rate_base": 0.5, "generations": 32,
        "rows": rows, "tokens": rows * 80,
    }  # fmt: skip


def judged(train=None, measured=None, certify=None, **more):
    found = verdict(
        TRAIN if train is None else train, evaluate() if measured is None else measured,
        CERTIFY if certify is None else certify, **{"merged": True, **more},
    )  # fmt: skip
    assert found is not None and len(found.lines) == 5
    return found


def test_a_good_run_is_good_in_all_five_lines():
    found = judged()
    assert [line.level for line in found.lines] == [GOOD] * 5 and found.level == GOOD and found.refusal == ""
    assert "74 → 25.9" in str(found.lines[0]) and "Fit to publish" in str(found.lines[4])


def test_no_training_no_verdict():
    assert verdict({}, {}, {}, merged=False) is None


@pytest.mark.parametrize(
    ("number", "changes", "level", "words"),
    [
        (0, {"measured": evaluate(0.99, 0.95, 1.03)}, BAD, "NO DIFFERENCE"),
        (0, {"measured": evaluate(1.2, 1.1, 1.3)}, BAD, "WORSE"),
        (0, {"measured": evaluate(0.993, 0.992, 0.994)}, UNSURE, "BARELY"),
        (0, {"measured": {}}, UNSURE, "not measured"),
        (0, {"train": {"steps": 2, "loss": 3.0}}, UNSURE, "ONLY 2 OPTIMISER STEPS"),
        (1, {"train": {"steps": 150, "loss": 0.1}}, BAD, "Memorised? YES"),
        (1, {"train": {"steps": 150, "loss": 2.5}, "copies": Copies(30, 20, 4)}, BAD, "20 of 30 sampled answers"),
        (1, {"copies": Copies(30, 20, 4), "train": {"steps": 150}}, BAD, "20 of 30 sampled answers"),
        (1, {"train": {"steps": 150, "loss": 3.1}, "copies": Copies(30, 20, 4)}, GOOD, "20 of 30 sampled answers"),
        (1, {"copies": Copies(30, 20, 18)}, GOOD, "20 of 30 sampled answers"),
        (1, {"measured": {}}, UNSURE, "not measured"),
        (2, {"measured": evaluate(stop=0.0)}, BAD, "NO: 0 of 32"),
        (2, {"measured": evaluate(stop=0.5)}, UNSURE, "NOT ALWAYS: 16 of 32"),
        (3, {"measured": evaluate(rows=8)}, UNSURE, "NO: 8 rows"),
        (3, {"measured": evaluate(0.9, 0.7, 1.2)}, UNSURE, "raise split.eval_fraction"),
        (3, {"measured": evaluate(0.118, 0.0587, 0.235)}, UNSURE, "FOR THE DIRECTION: 256 rows"),
        (3, {"measured": evaluate(1.0, 0.99, 1.01)}, GOOD, "yes: 256 rows"),
        (4, {"parameters": 1_311_872}, UNSURE, "for practice"),
        (4, {"parameters": 134_515_008}, GOOD, "Fit to publish"),
        (4, {"certify": {**CERTIFY, "agreement": 0.879}}, GOOD, "the adapter: the merged model gives 87.9%"),
        (4, {"measured": evaluate(0.99, 0.95, 1.03)}, BAD, "DO NOT PUBLISH"),
        (4, {"certify": {}, "merged": False}, GOOD, "the adapter: there is no merged model"),
    ],
)
def test_each_line_changes_with_its_figures(number, changes, level, words):
    line = judged(**changes).lines[number]
    assert line.level == level and words in str(line)


def test_publishing_is_refused_where_the_interval_says_so_and_for_memorised_rows():
    assert judged(measured=evaluate(0.99, 0.95, 1.03)).refusal and judged(measured=evaluate(1.2, 1.1, 1.3)).refusal
    assert not judged(train={"steps": 2, "loss": 3.0}).refusal and not judged(measured={}).refusal
    learned_by_heart = judged(train={"steps": 150, "loss": 0.1})
    assert "repeats its training rows (loss 0.10" in learned_by_heart.refusal
    assert "DO NOT PUBLISH" in str(learned_by_heart.lines[4])


def test_few_steps_have_a_limit_and_an_advice():
    assert few_steps(30) == "" and "1 OPTIMISER STEP " in few_steps(1) and "set x" in few_steps(29, "set x")


def test_a_low_loss_on_easy_rows_is_not_memorising():
    easy = evaluate(base=2.0)
    easy["perplexity_adapter"] = math.exp(0.3)
    assert judged(train={"steps": 150, "loss": 0.12}, measured=easy).lines[1].level == GOOD


WORDS = [f"word{i}" for i in range(200)]


def answer(start, count=40):
    return " ".join(WORDS[start : start + count])


def test_copies_are_counted_beside_those_of_the_references():
    def sample(text, reference):
        return {"adapter": {"text": text}, "reference": reference}

    train = [answer(0), answer(50)]
    samples = [
        sample(answer(0), answer(100)),  # learned by heart
        sample(answer(120), answer(50)),  # the reference is in the training rows, the answer is its own
        sample("Short.", answer(0)),  # too short to tell
        sample(answer(20, 20) + " " + answer(50, 20), answer(150)),  # of two rows: repeats neither
    ]
    assert count_copies(samples, train) == Copies(3, 1, 1)
    assert count_copies([], train) == Copies(0, 0, 0)
