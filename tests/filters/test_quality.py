"""Each rule with answers it drops, and with good answers that look alike and are kept."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.records import Example, Message
from finetune.filters import quality

PROSE = (
    "The river rises in the hills above the town and runs east for forty miles before it meets the sea. In spring the "
    "snow melts and the water stands high; by August one can cross it on foot. Two bridges carry the road, and a third "
    "one, older, is kept for walkers. Along the banks grow willows and alders, and herons fish where it is slow."
)
CODE = """def is_prime(n):
    if n < 2:
        return False
    if n % 2 == 0:
        return False
    for i in range(3, int(n ** 0.5) + 1, 2):
        if n % i == 0:
            return False
    return True
"""


def answer(text: str, question: str = "Tell me.") -> Example:
    return Example("s:1", "s", (Message("user", question), Message("assistant", text)))


def conversation(*roles: str) -> Example:
    return Example("s:1", "s", tuple(Message(role, "x") for role in roles))


def test_turns():
    pair = conversation("system", "user", "assistant")
    assert quality.turns(pair, 1, 2) is None
    assert quality.turns(Example("s:1", "s", text="raw"), 5, 6) is None
    short, long = quality.turns(pair, 3, None), quality.turns(conversation(*["user", "assistant"] * 3), 1, 5)
    assert short and (short.reason, short.detail, short.value, short.limit) == ("turns", "2 turns, at least 3", 2, 3)
    assert long and (long.detail, long.value, long.limit) == ("6 turns, at most 5", 6, 5)


def repetition(text: str):
    return quality.repetition(answer(text), 0.3, 0.5, 50)


@pytest.mark.parametrize(
    "text",
    [PROSE, CODE, "go! " * 40, "\n".join(f"- {part}" for part in PROSE.split(",")), f"{PROSE} {PROSE[:60]}"],
    ids=["prose", "code", "too short", "list", "one sentence twice"],
)
def test_answers_that_do_not_go_round_are_kept(text):
    assert repetition(text) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("I really love you very much. " * 30, "lines and sentences repeat"),
        (f"{PROSE}\n" + "The same line of text comes again\n" * 20, "lines and sentences repeat"),
        ("very good " * 60, "'very good' repeated"),
        ("我喜欢吃苹果" * 20, "repeated"),
        ("one two three " * 40, "'one two three' repeated"),
    ],
    ids=["sentence", "line", "pair", "no spaces", "three words"],
)
def test_loops_are_dropped(text, says):
    found = repetition(text)
    assert found and found.reason == "repetition" and says in found.detail
    assert found.value > found.limit


def test_only_the_answers_are_looked_at():
    assert quality.repetition(answer(PROSE, "very good " * 60), 0.3, 0.5, 50) is None
    assert quality.repetition(Example("s:1", "s", text="very good " * 60), 0.3, 0.5, 50) is not None


@given(st.lists(st.sampled_from(["a", "bb", "ccc"]), min_size=1, max_size=40))
def test_the_quick_bound_is_one(words):
    share, ngram = quality.top_ngram(words)
    assert 0 <= share <= quality._most_repeated(words) + 1e-9 and share <= 1
    assert not ngram or " ".join(ngram) in " ".join(words)


@given(st.text(max_size=200))
def test_no_text_is_too_odd_for_any_rule(text):
    row = answer(text, text)
    quality.repetition(row, 0.3, 0.5, 1)
    quality.symbols(row, 0.6, 0.6, 1)
    quality.links(row, 0.5)
    assert (quality.echo(row) is not None) == bool(text.strip())
    assert len(quality.without_code(text)) <= len(text) + 2 * text.count("\n") + 2


def test_symbols_and_digits():
    for good in (PROSE, CODE, "| Name | Age |\n|------|-----|\n| Ann | 30 |\n" * 3, "नमस्ते दुनिया, यह हिन्दी है। " * 6):
        assert quality.symbols(answer(good), 0.6, 0.6, 100) is None
    table = "+" + "-" * 70 + "+\n| Ann and Bob are thirty years old | yes |\n"
    assert quality.symbols(answer(table * 9), 0.6, 0.6, 100) is None
    noise = quality.symbols(answer("#$%&*@! " * 30), 0.6, 0.6, 100)
    digits = quality.symbols(answer("31415926535 " * 20), 0.6, 0.6, 100)
    assert noise and noise.value == 1 and noise.limit == 0.6 and "neither letters nor digits" in noise.detail
    assert digits and "digits" in digits.detail
    assert quality.symbols(answer("#$%"), 0.6, 0.6, 100) is None


def test_links():
    cited = f"{PROSE} See https://example.com/a/b?c=d (or ask me@example.com)."
    assert quality.links(answer(cited), 0.6) is None
    assert quality.links(answer("3 @ 4, and www. is short for it"), 0.1) is None
    found = quality.links(answer("https://example.com/a/b, http://b.example.org/c www.example.net me@example.com"), 0.6)
    assert found and found.reason == "links" and found.value > 0.9


@pytest.mark.parametrize("text", ["a" * 200_000, "a@" * 50_000, "www." * 50_000, "a.a" * 70_000 + "@"])
def test_no_text_makes_links_slow(text):
    quality.links(answer(text + " @ :// www."), 0.5)  # quadratic work would take minutes


def test_echo():
    assert quality.echo(answer("Berlin", "What is the capital?")) is None
    assert quality.echo(Example("s:1", "s", text="x")) is None
    found = quality.echo(answer("  what is\nTHE capital? ", "What is the capital?"))
    assert found and found.reason == "echo" and "turn 2 repeats" in found.detail
    later = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "c"))
    assert "turn 4" in quality.echo(Example("s:1", "s", later)).detail


FENCED = [
    ("a\n```\nx\n```\nb", [(2, 11)]),
    ("```python\nx", [(0, None)]),
    ("````\n```\n````", [(0, 13)]),
    ("~~~\n```\n~~~", [(0, 11)]),
    ("say ```x``` now", []),
    ("```x``` at the start of a line", []),
    ("```\nx\n    ```", [(0, 13)]),
    ("Heading\n~~~~~~~\n\nText", []),
    ("~~~~~~~", [(0, None)]),
    ("Text:\n\n~~~\nx", [(7, None)]),
    ("Text:\n~~~ python\nx\n~~~", [(6, 22)]),
    ("```\n```py\n```", [(0, 13)]),
]


@pytest.mark.parametrize(("text", "spans"), FENCED, ids=range(len(FENCED)))
def test_fences(text, spans):
    assert list(quality.fences(text)) == spans


def test_language_by_a_detector_that_is_told():
    def detect(text):
        assert "http" not in text and "import" not in text
        return ("de", 0.95)

    row = answer(f"{PROSE} https://example.com\n```\nimport x\n```")
    found = quality.language(row, ["en", "fr"], 0.9, 60, detect)
    assert found and (found.value, found.limit) == (0.95, 0.9) and "de (0.95), allowed is en, fr" in found.detail
    assert quality.language(row, ["de"], 0.9, 60, detect) is None
    assert quality.language(row, ["en"], 0.96, 60, detect) is None
    assert quality.language(answer("Ja."), ["en"], 0.9, 60, detect) is None
