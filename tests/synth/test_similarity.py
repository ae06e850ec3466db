"""ROUGE-L against rouge-score, and the search for the nearest text."""

import random

import pytest

from finetune.synth.similarity import lcs_length, nearest, rouge_l


def texts(seed, count=300):
    draw = random.Random(seed)
    return [[draw.choice("abcdefg") * 2 for _ in range(draw.randrange(0, 90))] for _ in range(count)]


def test_rouge_l_is_that_of_rouge_score():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    found = texts(1)
    for one, other in zip(found, reversed(found), strict=True):
        if one and other:
            wanted = scorer.score(" ".join(one), " ".join(other))["rougeL"].fmeasure
            assert rouge_l(one, other) == pytest.approx(wanted)
            assert lcs_length(one, other) == lcs_length(other, one)


@pytest.mark.parametrize("threshold", [0.3, 0.7, 1.0])
def test_the_nearest_is_the_one_that_a_full_search_finds(threshold):
    others = texts(2, 60)
    for one in texts(3, 40) + others[:5]:
        scores = [rouge_l(one, other) for other in others]
        best, at = nearest(one, others, threshold)
        assert (best, at) == ((max(scores), scores.index(max(scores))) if max(scores) >= threshold else (0.0, -1))
