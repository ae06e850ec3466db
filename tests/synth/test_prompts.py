"""The prompts: ours render with what they are given, and a replacement is checked before anything is asked."""

import re

import pytest

from finetune.errors import InputError
from finetune.stages import generate
from finetune.synth.evolve import IN_DEPTH, MARKS
from finetune.synth.prompts import Prompts, files, problem
from tests.helpers.generation import model_that_can
from tests.helpers.generation import quick as quick
from tests.helpers.generation import server as server
from tests.helpers.generation import work as work

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
        ("judge.jinja", "{{ first * 999999999 }}", "outgrows the memory"),
        ("judge.jinja", "{% include '/etc/passwd' %}", "loads another file"),
    ],
)
def test_a_replacement_that_cannot_be_used_is_refused(tmp_path, name, text, words):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert words in problem(tmp_path)
    assert problem(None) == "" and "no such folder" in problem(tmp_path / "none")


@pytest.mark.parametrize(
    "text",
    ["{{ first.__class__.__mro__ }}", "{{ nobody }}", "{{ 1 / 0 }}", "{% include 'a' %}", "  ", "{{ '\\ud800' }}"],
)
def test_a_prompt_that_fails_names_its_file(tmp_path, text):
    (tmp_path / "judge.jinja").write_text(text)
    with pytest.raises(InputError, match=r"judge\.jinja"):
        Prompts(tmp_path).render("judge", VALUES["judge"])


def test_own_prompts_replace_ours_and_enter_the_key(work, server):
    own = work.folder / "mine"
    own.mkdir()
    (own / "evol_equal.jinja").write_text(
        "ask for the same? instruction:\n{{ first }}\n\ninstruction:\n{{ second }}\n\n."
    )
    before = generate.fingerprint(generate.spec(work.recipe(server.url)))
    section = "method: evol_instruct\nrounds: 1\nrows: 2\nprompts: mine"
    assert generate.fingerprint(generate.spec(work.recipe(server.url, section))) != before
    work.run(server.url, section)
    assert sum(p.startswith("ask for the same?") for p in server.prompts) == 2
    (own / "evol_equal.jinja").write_text("{{ nobody }}")
    with pytest.raises(InputError, match=r"evol_equal.jinja: 'nobody' is undefined; it is given first, second"):
        work.run(server.url, section)


@pytest.mark.parametrize(
    ("section", "used"),
    [
        ("method: answer", []),
        ("method: answer\nsamples: 2\nbest: judge", ["judge"]),
        (
            "method: evol_instruct\nsamples: 2\nbest: judge\nrounds: 3",
            ["evol_breadth", "evol_depth", "evol_equal", "judge"],
        ),
        ("method: evol_instruct\nrounds: 3\nbest: judge", ["evol_breadth", "evol_depth", "evol_equal"]),
        ("method: self_instruct\nrows: 16", ["self_input_first", "self_kind", "self_output_first", "self_tasks"]),
    ],
)
def test_only_the_prompts_that_are_used_enter_the_key(work, server, monkeypatch, section, used):
    rendered, render = set(), Prompts.render

    def answer(body):
        text = model_that_can(body)
        return f"{text} {body['seed']}" if text.startswith("Because") else text

    server.answer = answer
    monkeypatch.setattr(Prompts, "render", lambda self, name, values: rendered.add(name) or render(self, name, values))
    work.run(server.url, section)
    assert sorted(generate.fingerprint(generate.spec(work.recipe(server.url, section)))["prompts"]) == used
    assert sorted(rendered) == used


def test_a_folder_of_prompts_may_be_renamed(work, server):
    for name in ("one", "two"):
        (work.folder / name).mkdir()
        (work.folder / name / "judge.jinja").write_text("{{ question }}{{ first }}{{ second }}")

    def key(name):
        spec = generate.spec(work.recipe(server.url, f"method: answer\nsamples: 2\nbest: judge\nprompts: {name}"))
        return spec.model_dump(), generate.fingerprint(spec)

    assert key("one") == key("two")
    (work.folder / "two" / "judge.jinja").write_text("{{ question }}")
    assert key("one") != key("two")
