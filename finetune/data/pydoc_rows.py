"""Instruction rows made from the documentation of the Python that runs this: a real data set that needs no download.

The rows are what real data is: the same answer under many questions (inherited docstrings, re-exports), texts that
differ by a word, long and short ones. Some answers follow from the question alone (where a name is defined, how it
is called), so a trained model can be shown to read its prompt. The same Python gives the same rows in the same order.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from finetune.data.pydoc_reader import Entry
from finetune.errors import FinetuneError, how_it_ended

MAX_ANSWER_CHARACTERS = 1200
MAX_TOPIC_CHARACTERS = 1800
MIN_DOC_CHARACTERS = 25  # "See base class." answers nothing
READER_TIMEOUT_SECONDS = 120


def fingerprint() -> dict[str, str]:
    """Return the version of the Python whose documentation is read, which determines the rows."""
    return {
        "implementation": sys.implementation.name,
        "version": platform.python_version(),
        "platform": sys.platform,
    }


def documentation(executable: str = sys.executable) -> Iterator[Entry]:
    """Every documented thing, read by a child process, since importing the whole library has side effects.

    Raises FinetuneError if the child fails or does not end.
    """
    # -I: no environment, no user folder; -S: no site-packages; -B: writes no .pyc files.
    command = [executable, "-I", "-S", "-B", str(Path(__file__).with_name("pydoc_reader.py"))]
    try:
        child = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=READER_TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise FinetuneError(
            f"reading the documentation of {executable} did not end within {READER_TIMEOUT_SECONDS} s; "
            "a module of the standard library waits for something when it is imported"
        ) from error
    except OSError as error:
        raise FinetuneError(f"cannot start {executable} to read its documentation: {error}") from error
    if child.returncode:
        last = child.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise FinetuneError(
            f"the process that reads the documentation of {executable} {how_it_ended(child.returncode)}: "
            f"{last[0] if last else 'no output'}"
        )
    for line in child.stdout.splitlines():
        raw = json.loads(line)
        yield Entry(**{**raw, "bases": tuple(raw["bases"]), "members": tuple(raw["members"])})


def rows(entries: Iterable[Entry] | None = None) -> Iterator[dict[str, object]]:
    """Chat rows `{"messages": [user, assistant], "form": name}`, one for each documented thing, several for a topic."""
    everything = [e for e in (documentation() if entries is None else entries) if len(e.doc) >= MIN_DOC_CHARACTERS]
    shared = Counter(e.doc for e in everything)
    for entry in everything:
        if entry.kind == "topic":
            yield from _topic_rows(entry)
        else:
            yield _row(entry, alone=shared[entry.doc] == 1)


def paragraphs_within(text: str, limit: int) -> list[str]:
    """`text` cut at blank lines into pieces of at most `limit` characters; a longer paragraph is cut at line ends."""
    pieces: list[str] = []
    current = ""
    for paragraph in text.strip().split("\n\n"):
        for part in _lines_within(paragraph.rstrip(), limit):
            joined = f"{current}\n\n{part}" if current else part
            if len(joined) > limit:
                pieces.append(current)
                joined = part
            current = joined
    return [*pieces, current] if current else pieces


def _lines_within(paragraph: str, limit: int) -> list[str]:
    if len(paragraph) <= limit:
        return [paragraph] if paragraph else []
    parts: list[str] = []
    current = ""
    lines = (line[i : i + limit] for line in paragraph.split("\n") for i in range(0, max(1, len(line)), limit))
    for line in lines:
        if current and len(current) + 1 + len(line) > limit:
            parts.append(current)
            current = line
        else:
            current = f"{current}\n{line}" if current else line
    return [*parts, current]


def first_sentence(doc: str) -> str:
    """The first sentence of the first paragraph that is prose, on one line."""
    paragraph = next((p for p in doc.split("\n\n") if " " in p.strip()), doc)
    flat = " ".join(paragraph.split())
    end = flat.find(". ")
    return flat[: end + 1] if end > 0 else flat[:MAX_ANSWER_CHARACTERS]


def _topic_rows(entry: Entry) -> Iterator[dict[str, object]]:
    parts = paragraphs_within(entry.doc, MAX_TOPIC_CHARACTERS)
    for number, part in enumerate(parts, start=1):
        ask = _choose(
            f"{entry.name} {number}",
            (
                "What does the language reference of Python say about `{0}`? Part {1} of {2}.",
                "Explain the Python topic `{0}`, part {1} of {2}.",
                "Python topic `{0}`: part {1} of {2}, please.",
            ),
        )
        yield _chat(ask.format(entry.name, number, len(parts)), part, "topic")


def _row(entry: Entry, alone: bool) -> dict[str, object]:
    """A text that several things share stays their answer as it is; others also get questions of other forms."""
    forms = ["doc"]
    if alone:
        forms += ["where", "summary", "call" if entry.signature else "summary"]
        if entry.kind == "class" and entry.bases and entry.bases != ("object",):
            forms += ["bases", "bases"]
        if entry.kind == "module":
            forms = ["doc", "members"] if len(entry.members) >= 2 else ["doc"]
    form = _choose(f"form {entry.path}", forms)
    ask = _choose(f"ask {entry.path}", QUESTIONS[form])
    inside = f" of the class `{entry.owner}`" if entry.owner else ""
    # The first sentence goes with each, or answers of one form would differ in nothing but names.
    gist = first_sentence(entry.doc)
    answers = {
        "doc": lambda: paragraphs_within(entry.doc, MAX_ANSWER_CHARACTERS)[0],
        "where": lambda: f"`{entry.name}` is a {entry.kind}{inside} in the module `{entry.module}`: {gist}",
        "summary": lambda: f"`{entry.path}`: {gist}",
        "call": lambda: f"```python\n{entry.path}{entry.signature}\n```\n{gist}",
        "bases": lambda: f"The class `{entry.path}` derives from {_listed(entry.bases)}. {gist}",
        "members": lambda: f"{gist}\nThe module `{entry.path}` offers {_listed(entry.members)}.",
    }
    name = f"{entry.owner}.{entry.name}" if entry.owner else entry.name
    question = ask.format(kind=entry.kind, path=entry.path, name=name)
    return _chat(question, answers[form](), form)


QUESTIONS: dict[str, tuple[str, ...]] = {
    "doc": (
        "What does the {kind} `{path}` do?",
        "Explain the {kind} `{path}` of Python.",
        "Document `{path}`.",
        "I met `{path}` in some Python code. What is it for?",
    ),
    "where": (
        "Which module of Python holds `{name}`?",
        "Where is `{name}` defined?",
        "In which module do I find the {kind} `{name}`?",
    ),
    "summary": (
        "Describe `{path}` in one sentence.",
        "Give the first sentence of the documentation of `{path}`.",
        "In short: `{path}`?",
    ),
    "call": (
        "How is `{path}` called?",
        "What is the signature of `{path}`?",
        "Which arguments does the {kind} `{path}` take?",
    ),
    "bases": ("What does the class `{path}` derive from?", "Which are the base classes of `{path}`?"),
    "members": ("What does the module `{path}` offer?", "Name some public names of the module `{path}`."),
}


def _chat(question: str, answer: str, form: str) -> dict[str, object]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "form": form}


def _choose(key: str, options: Sequence[str]) -> str:
    """One of `options` by a hash of `key`: spread like chance, the same in every run."""
    return options[int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "big") % len(options)]


def _listed(names: Sequence[str]) -> str:
    quoted = [f"`{n}`" for n in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"
