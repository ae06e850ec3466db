"""Pre-training text of `builtin:tiny-mistral`: reference entries of the third-party packages this program needs.

The fine-tuning rows of the `pydoc` source come from the standard library. Every paragraph that shares a run of words
with its documentation is left out here, so that no held-out answer was ever seen in pre-training.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import platform
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import FinetuneError

if TYPE_CHECKING:
    import numpy as np

# Package → characters of text to take. All are dependencies of this program, so they are always installed.
PACKAGES = {
    "numpy": 350_000,
    "scipy": 350_000,
    "pandas": 300_000,
    "sklearn": 300_000,
    "networkx": 250_000,
    "torch": 400_000,
    "transformers": 200_000,
}
DISTRIBUTIONS = {"sklearn": "scikit-learn"}
PAGE_ENTRIES = 3
ENTRY_CHARACTERS = 250  # the rest of an entry is mostly parameter tables and printed arrays
SHINGLE_WORDS = 8


def sources() -> dict[str, str]:
    """Return the versions of Python and of the packages read, on which the text depends."""
    versions = {name: importlib.metadata.version(DISTRIBUTIONS.get(name, name)) for name in PACKAGES}
    return {"python": platform.python_version(), **versions}


def words(text: str) -> list[str]:
    """Return the lower-case words of `text` without punctuation: re-wrapped or re-quoted text compares equal."""
    return re.findall(r"[a-z0-9_]+", text.lower())


class Shingles:
    """All runs of `length` words of a text that must not be learnt, as a sorted array of 64-bit hashes."""

    def __init__(self, texts: Iterable[str], length: int = SHINGLE_WORDS) -> None:
        import numpy as np

        self.length = length
        self._ids: dict[str, int] = {}
        unique = dict.fromkeys(texts)  # inherited documentation repeats often
        parts = [self._hashes([self._ids.setdefault(w, len(self._ids) + 1) for w in words(t)]) for t in unique]
        self._sorted = np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.uint64)

    def _hashes(self, ids: Sequence[int]) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """Return polynomial hashes, (max(0, words − length + 1),) uint64, of every run of `length` ids."""
        import numpy as np

        values = np.asarray(ids, np.uint64)
        count = max(0, len(values) - self.length + 1)
        total = np.zeros(count, np.uint64)
        for offset in range(self.length):
            total = total * np.uint64(0x9E3779B97F4A7C15) + values[offset : offset + count]
        return total

    def meets(self, text: str) -> bool:
        """Return whether any run of `length` words of `text` is known (hash collisions also give True; harmless)."""
        import numpy as np

        hashes = self._hashes([self._ids.get(w, 0) for w in words(text)])
        at = np.searchsorted(self._sorted, hashes)
        inside = at < len(self._sorted)
        return bool(np.any(self._sorted[at[inside]] == hashes[inside]))


def package_files(package: str) -> list[tuple[str, Path]]:
    """Return (path inside site-packages, file) of a package's modules without tests, in a shuffled but fixed order."""
    spec = importlib.util.find_spec(package)  # finds a top-level package without importing it
    if spec is None or spec.origin is None:
        raise FinetuneError(f"package {package!r} is not installed; install this program's dependencies again")
    root = Path(spec.origin).parent
    files = [(path.relative_to(root.parent).as_posix(), path) for path in root.rglob("*.py")]
    kept = [f for f in files if not any(p.startswith(("test", "_test", "conftest")) for p in f[0].split("/"))]
    return sorted(kept, key=lambda f: hashlib.sha256(f[0].encode()).digest())


@dataclass(frozen=True)
class Entry:
    """One documented object; `body` holds the paragraphs kept of its docstring."""

    name: str
    kind: str
    owner: str
    call: str
    body: str

    def summary(self) -> str:
        """Return the first sentence of the body, on one line, at most 120 characters."""
        flat = " ".join(self.body.split("\n\n")[0].split())
        end = flat.find(". ")
        return (flat[: end + 1] if end > 0 else flat)[:120]

    def text(self) -> str:
        """Return the entry formatted as in a reference."""
        return f"{self.name} -- {self.kind} of {self.owner}\n\n{self.call}\n\n{self.body}"


def documented(source: str, module: str) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield (name, kind, owner, call, docstring) of every documented function, class and method in `source`."""

    def visit(body: Sequence[ast.stmt], owner: str, kind: str) -> Iterator[tuple[str, str, str, str, str]]:
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            text = ast.get_docstring(node)
            is_class = isinstance(node, ast.ClassDef)
            if text and len(text) > 60:
                arguments = "" if isinstance(node, ast.ClassDef) else ast.unparse(node.args)
                call = f"{owner}.{node.name}({arguments if len(arguments) < 100 else '...'})"
                yield node.name, "class" if is_class else kind, owner, call, text
            if isinstance(node, ast.ClassDef):
                yield from visit(node.body, f"{owner}.{node.name}", "method")

    yield from visit(ast.parse(source).body, module, "function")


def module_name(path: str) -> str:
    """Return the public dotted name for `path`: numpy/linalg/_linalg.py → numpy.linalg."""
    return ".".join(part for part in path.removesuffix(".py").split("/") if not part.startswith("_"))


def corpus(known: Shingles, share: float = 1.0) -> list[str]:
    """Return reference pages in a fixed order; no paragraph shares `known.length` consecutive words with `known`."""
    pages: list[str] = []
    seen: set[str] = set()
    for package, budget in PACKAGES.items():
        taken = 0
        for path, file in package_files(package):
            source, module = file.read_text(encoding="utf-8", errors="replace"), module_name(path)
            texts = []
            for name, kind, owner, call, text in documented(source, module):
                body = "\n\n".join(_paragraphs(text, known, seen))
                if len(body) > 40:
                    texts.append(Entry(name, kind, owner, call, body))
            for start in range(0, len(texts), PAGE_ENTRIES):
                pages.append(page(module, texts[start : start + PAGE_ENTRIES]))
                taken += len(pages[-1])
            if taken >= budget * share:
                break
    return pages


def page(module: str, entries: Sequence[Entry]) -> str:
    """Return a table of contents, followed by the entries.

    Names and first sentences appear twice, some dozens of tokens apart: from this a model learns within a few hundred
    steps to copy from its context.
    """
    contents = "\n".join(f"{e.name}: {e.summary()}" for e in entries)
    return "\n\n".join([f"In {module}:\n{contents}", *(e.text() for e in entries)])


def _paragraphs(text: str, known: Shingles, seen: set[str]) -> Iterator[str]:
    """Yield the paragraphs to train on: new, mostly letters, and not from the standard library."""
    size = 0
    for paragraph in re.split(r"\n\s*\n", text):
        letters = sum(c.isalpha() or c.isspace() for c in paragraph)
        key = " ".join(words(paragraph))
        if letters < 0.7 * len(paragraph) or (len(key) > 40 and key in seen) or known.meets(paragraph):
            continue
        if size and size + len(paragraph) > ENTRY_CHARACTERS:
            return
        seen.add(key)
        yield paragraph
        size += len(paragraph)
