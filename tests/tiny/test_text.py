"""What the built-in base reads: reference entries, and nothing that a pydoc row could ask for."""

from __future__ import annotations

import ast
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data import pydoc_rows
from finetune.tiny import text as tiny_text
from finetune.tiny.text import PACKAGES, SHINGLE_WORDS, Entry, Shingles, corpus, page, words

WORD = st.sampled_from(["norm", "the", "of", "a", "x", "returns", "matrix", "1"])


@pytest.fixture(scope="module")
def known() -> Shingles:
    return Shingles(entry.doc for entry in pydoc_rows.documentation())


@pytest.fixture(scope="module")
def pages(known: Shingles) -> list[str]:
    return corpus(known, 0.3)


def test_no_run_of_words_of_any_pydoc_answer_is_read(pages: list[str]) -> None:
    """Counted without hashes or ids: the words themselves, of every answer a row can have."""
    read = set()
    for text in pages:
        for paragraph in text.split("\n\n"):
            found = words(paragraph)
            read.update(" ".join(found[i : i + SHINGLE_WORDS]) for i in range(len(found) - SHINGLE_WORDS + 1))
    assert len(read) > 20_000
    leaked = set()
    for row in pydoc_rows.rows():
        found = words(row["messages"][1]["content"])
        leaked |= read & {" ".join(found[i : i + SHINGLE_WORDS]) for i in range(len(found) - SHINGLE_WORDS + 1)}
    assert leaked == set()


def test_without_the_rule_some_would_be_read(known: Shingles) -> None:
    """The gate has something to do: these packages quote the standard library."""
    assert any(known.meets(paragraph) for text in corpus(Shingles([]), 0.1) for paragraph in text.split("\n\n"))


def test_every_package_is_read_in_a_fixed_order(known: Shingles, pages: list[str]) -> None:
    for package in PACKAGES:
        assert any(p.startswith(f"In {package}") for p in pages), package
    assert corpus(known, 0.05) == corpus(known, 0.05)


def test_no_package_is_imported_to_be_read(pages: list[str]) -> None:
    code = (
        "import sys; from finetune.tiny.text import *; corpus(Shingles([]), 0.01); "
        "print(*({'torch', 'transformers', 'pandas', 'sklearn', 'scipy', 'networkx'} & set(sys.modules)))"
    )
    import subprocess

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []


@given(st.lists(WORD, min_size=0, max_size=40), st.lists(WORD, min_size=0, max_size=20))
def test_shingles_find_every_shared_run(text: list[str], probe: list[str]) -> None:
    known = Shingles([" ".join(text)], length=3)
    runs = {tuple(text[i : i + 3]) for i in range(len(text) - 2)}
    expected = any(tuple(probe[i : i + 3]) in runs for i in range(len(probe) - 2))
    assert known.meets(", ".join(probe).upper()) == expected


def test_unknown_words_meet_nothing() -> None:
    known = Shingles(["one two three"], length=2)
    assert not known.meets("four five six seven")
    assert known.meets("zero, One\n  two")


def test_entries_name_their_owner() -> None:
    source = f'''
class Thing:
    """{"A thing. " * 10}"""
    def act(self, force=1, *rest):
        """{"Act upon it. " * 8}"""
def short():
    """Too short."""
async def later(x: int = 2):
    """{"Do it later. " * 8}"""
'''
    found = [d[:4] for d in tiny_text.documented(source, "pkg.mod")]
    assert found == [
        ("Thing", "class", "pkg.mod", "pkg.mod.Thing()"),
        ("act", "method", "pkg.mod.Thing", "pkg.mod.Thing.act(self, force=1, *rest)"),
        ("later", "function", "pkg.mod", "pkg.mod.later(x: int=2)"),
    ]
    ast.parse(source)


def test_private_files_have_their_public_name() -> None:
    assert tiny_text.module_name("numpy/linalg/_linalg.py") == "numpy.linalg"
    assert tiny_text.module_name("torch/nn/__init__.py") == "torch.nn"


def test_a_page_says_each_summary_twice() -> None:
    entries = [Entry(n, "function", "pkg", f"pkg.{n}(x)", f"Does {n} well. And more.\n\nElse.") for n in ("one", "two")]
    assert page("pkg", entries) == (
        "In pkg:\none: Does one well.\ntwo: Does two well.\n\n"
        "one -- function of pkg\n\npkg.one(x)\n\nDoes one well. And more.\n\nElse.\n\n"
        "two -- function of pkg\n\npkg.two(x)\n\nDoes two well. And more.\n\nElse."
    )


def test_the_fingerprint_names_every_version() -> None:
    assert set(tiny_text.sources()) == {"python", *PACKAGES}
    assert all(tiny_text.sources().values())
