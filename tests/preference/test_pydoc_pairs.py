"""The built-in pairs: of two kinds, always with a difference, the same each time."""

from __future__ import annotations

from finetune.preference.pydoc_pairs import edited, pydoc_pairs


def rows(count=60):
    return [
        {"messages": [{"content": f"What is `m.f{i}`?"}, {"content": f"`m.f{i}` returns the value number {i} of it."}]}
        for i in range(count)
    ]


def test_both_kinds_differ_from_the_right_answer():
    made = list(pydoc_pairs(rows=rows()))
    assert len(made) == 60 and made == list(pydoc_pairs(rows=rows()))
    answers = {r["messages"][1]["content"] for r in rows()}
    kinds = {"other": 0, "edit": 0}
    for pair in made:
        kinds[pair["kind"]] += 1
        assert pair["chosen"] != pair["rejected"] and pair["chosen"] in answers
        assert (pair["rejected"] in answers) == (pair["kind"] == "other")
    assert min(kinds.values()) > 15


def test_an_edit_is_small():
    for pair in pydoc_pairs(rows=rows()):
        if pair["kind"] == "edit":
            a, b = pair["chosen"].split(), pair["rejected"].split()
            assert len(a) == len(b) and sum(x != y for x, y in zip(a, b, strict=True)) in (1, 2)


def test_as_kto_each_pair_is_two_answers():
    made = list(pydoc_pairs("kto", rows()))
    assert len(made) == 120 and sum(r["label"] for r in made) == 60


def test_an_answer_that_cannot_be_edited_gives_none():
    assert edited("q", "one", []) is None and edited("q", "one one one", []) is None
    assert edited("q", "one two", []) == "two one"
