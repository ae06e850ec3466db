"""The prompts: ours render with what they are given, and a replacement is checked before anything is asked."""

import re

import pytest

from finetune.errors import InputError
from finetune.synth.evolve import IN_DEPTH, MARKS
from finetune.synth.prompts import Prompts, files, problem

VALUES = {
    "evol_depth": {"operation": "deepen", "instruction": "{{ a }} <b>"},
    "evol_breadth": {"instruction": "{{ a }} <b>"},
    "evol_equal": {"first": "{{ a }} <b>", "second": "c"},
    "self_tasks": {"tasks": ["{{ a }} <b>"], "count": 2},
    "self_kind": {"instruction": "{{ a }} <b>"},
    "self_input_first": {"instruction": "{{ a }} <b>"},
    "self_output_first": {"instruction": "{{ a }} <b>"},
    "judge": {"question": "q", "first": "{{ a }} <b>", "second": "d"},
}


@pytest.mark.parametrize("name", sorted(files(None)))
def test_each_prompt_shows_what_it_is_given_as_it_is(name):
    text = Prompts().render(name, VALUES[name])
    assert "{{ a }} <b>" in text and text == text.strip() and "\n\n\n" not in text


def test_every_operation_has_a_prompt_of_its_own_and_its_marks_are_known():
    made = {Prompts().render("evol_depth", {"operation": op, "instruction": "i"}) for op in IN_DEPTH}
    assert len(made) == len(IN_DEPTH) and all("How: " in text for text in made)
    headings = {h for text in made for h in re.findall("#[^#]+#", text)}
    assert headings and all(MARKS.search(h) for h in headings)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("juge.jinja", "a", "did you mean judge.jinja"),
        ("judge.jinja", "{% if %}", "judge.jinja: Expected an expression"),
        ("judge.jinja", b"\xff", "cannot be read as UTF-8"),
        ("judge.txt", "a", "holds no .jinja file"),
    ],
)
def test_a_replacement_that_cannot_be_used_is_refused(tmp_path, name, text, words):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert words in problem(tmp_path)
    assert problem(None) == "" and "no such folder" in problem(tmp_path / "none")


@pytest.mark.parametrize(
    "text", ["{{ first.__class__.__mro__ }}", "{{ nobody }}", "{{ 1 / 0 }}", "{% include 'a' %}", "  "]
)
def test_a_prompt_that_fails_names_its_file(tmp_path, text):
    (tmp_path / "judge.jinja").write_text(text)
    with pytest.raises(InputError, match=r"judge\.jinja"):
        Prompts(tmp_path).render("judge", VALUES["judge"])
