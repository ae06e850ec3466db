"""Rows made from the documentation of the Python that runs the tests."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data import pydoc_rows
from finetune.data.pydoc_rows import Entry, documentation, fingerprint, first_sentence, paragraphs_within, rows
from finetune.errors import FinetuneError


@pytest.fixture(scope="module")
def entries() -> list[Entry]:
    """All that the standard library documents."""
    return list(documentation())


@pytest.fixture(scope="module")
def chats(entries: list[Entry]) -> list[tuple[str, str, str]]:
    """Question, answer and form of every row."""
    return [(*(turn["content"] for turn in row["messages"]), row["form"]) for row in rows(entries)]  # type: ignore


def test_the_same_python_gives_the_same_rows(
    entries: list[Entry], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    monkeypatch.chdir(tmp_path)
    assert list(documentation()) == entries


def test_many_rows_share_their_answer(chats: list[tuple[str, str, str]]) -> None:
    answers = Counter(answer for _, answer, _ in chats)
    assert 9_000 < len(chats) < 14_000
    assert 4_000 < len(answers) < len(chats) / 2
    assert sum(times == 1 for times in answers.values()) < len(chats) / 2


def test_questions_and_answers_are_short_and_complete(chats: list[tuple[str, str, str]]) -> None:
    for question, answer, form in chats:
        assert question.strip()
        assert answer.strip()
        assert len(answer) <= 3000 if form != "doc" else len(answer) <= pydoc_rows.MAX_ANSWER_CHARACTERS
    forms = Counter(form for _, _, form in chats)
    assert set(forms) == {"doc", "topic", "where", "summary", "call", "bases", "members"}
    assert min(forms.values()) > 50


def test_nothing_of_this_machine_is_told(chats: list[tuple[str, str, str]]) -> None:
    text = "\n".join(answer for _, answer, _ in chats)
    for place in (sys.prefix, sys.base_prefix, str(Path.home()), " at 0x7"):
        if len(place) > len("/usr/local"):
            assert place not in text


def test_importing_this_package_does_not_import_the_library(entries: list[Entry]) -> None:
    assert "antigravity" not in sys.modules
    assert entries


def test_answers_follow_from_the_question() -> None:
    entry = Entry("method", "json.decoder", "JSONDecoder", "decode", "Return the value of a text. More.", "(self, s)")
    found = {}
    for number in range(40):
        same = Entry(entry.kind, f"m{number}", entry.owner, entry.name, f"{entry.doc} {number}", entry.signature)
        (row,) = rows([same])
        question, answer = (turn["content"] for turn in row["messages"])  # type: ignore[attr-defined]
        found[row["form"]] = (question, answer)
        assert "decode" in question
    assert found["where"][1].startswith("`decode` is a method of the class `JSONDecoder` in the module `m")
    assert "JSONDecoder.decode(self, s)" in found["call"][1]
    assert found["summary"][1].endswith("`: Return the value of a text.")


def test_an_answer_that_others_share_stays_as_it_is() -> None:
    doc = "Common base class of a great many things."
    made = list(rows(Entry("class", "m", "", f"C{i}", doc, "()", ("B",)) for i in range(30)))
    assert {row["form"] for row in made} == {"doc"}


def test_short_docstrings_are_left_out() -> None:
    assert not list(rows([Entry("function", "m", "", "f", "See g.", "()")]))


@given(st.text(alphabet="ab \n", max_size=400), st.integers(5, 60))
def test_pieces_are_within_the_limit_and_lose_no_word_character(text: str, limit: int) -> None:
    pieces = paragraphs_within(text, limit)
    assert all(0 < len(piece) <= limit for piece in pieces)
    kept = [c for piece in pieces for c in piece if not c.isspace()]
    assert kept == [c for c in text if not c.isspace()]


def test_first_sentence() -> None:
    assert first_sentence("Title\n\nOne two.  Three four.") == "One two."
    assert first_sentence("no end here") == "no end here"


def test_a_python_that_fails_is_named(tmp_path: Path) -> None:
    bad = tmp_path / "python"
    bad.write_text("#!/bin/sh\necho it broke >&2\nexit 3\n")
    bad.chmod(0o755)
    with pytest.raises(FinetuneError, match="status 3: it broke"):
        list(documentation(str(bad)))
    bad.write_text("#!/bin/sh\nkill -9 $$\n")
    with pytest.raises(FinetuneError, match=r"killed by SIGKILL \(out of memory\?\): no output"):
        list(documentation(str(bad)))
    with pytest.raises(FinetuneError, match="cannot start"):
        list(documentation(str(tmp_path / "absent")))


def test_a_python_that_never_ends_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = tmp_path / "python"
    bad.write_text("#!/bin/sh\nexec sleep 60\n")
    bad.chmod(0o755)
    monkeypatch.setattr(pydoc_rows, "READER_TIMEOUT_SECONDS", 0.2)
    with pytest.raises(FinetuneError, match="did not end within"):
        list(documentation(str(bad)))


def test_fingerprint_names_the_python() -> None:
    assert fingerprint()["version"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
