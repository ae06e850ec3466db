"""Print the documentation of the standard library as JSON lines: a script for a child process, run by `pydoc_rows`.

Importing every module of the standard library has side effects (one opens a browser, another prints a poem, some start
a display), so it never happens in the process that trains. Run as `python -I -S -B pydoc_reader.py`: isolated, without
site-packages. It imports nothing but the standard library, and of this package nothing at all.

One line an entry: the fields of `Entry`.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import ModuleType

# Opens a browser, prints, needs a display, is a test suite, is another system's, or is a demo.
SKIPPED = {
    "antigravity", "this", "idlelib", "tkinter", "turtle", "turtledemo", "test", "lib2to3", "distutils", "msilib",
    "msvcrt", "nt", "winreg", "winsound", "ntpath", "nturl2path", "posix", "pip", "xxsubtype",
}  # fmt: skip
# A codec's module says the same few things as the next hundred.
SKIPPED_PACKAGES = {"encodings", "ensurepip"}
# What differs between two runs or two machines: an address, an absolute path that a default was computed to.
ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]+|0x[0-9a-fA-F]{9,}")
COMPUTED_PATH = re.compile(r"""['"](?:/|[A-Za-z]:\\)""")
PUBLIC_MEMBERS = 12  # names listed of a module


@dataclass(frozen=True, slots=True)
class Entry:
    """One documented thing of the standard library.

    `kind` is topic, module, function, class, method or property; `owner` is the class of a method or property.
    `signature` is the call with its brackets, or empty if it has none that is the same in every run.
    """

    kind: str
    module: str
    owner: str
    name: str
    doc: str
    signature: str = ""
    bases: tuple[str, ...] = ()
    members: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """The name as one writes it in code."""
        if self.kind in ("topic", "module"):
            return self.name
        return ".".join(part for part in (self.module, self.owner, self.name) if part)


def main() -> int:
    """Write every entry to the real standard output; whatever a module prints on import goes to standard error."""
    sys.stdout.flush()
    private = os.dup(1)
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    with os.fdopen(private, "w", encoding="ascii", newline="\n") as out:
        for entry in entries():
            out.write(json.dumps(asdict(entry), sort_keys=True) + "\n")
    return 0


def entries() -> Iterator[Entry]:
    """Every topic, module, public function, class and method, in the order of their names."""
    yield from topic_entries()
    for name in sorted(sys.stdlib_module_names):
        if not name.startswith("_") or name == "__future__":
            for module in tree(name):
                yield from module_entries(module)


def topic_entries() -> Iterator[Entry]:
    """The language reference that `help()` shows."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        yield Entry("topic", "", "", name, topics[name])


def tree(name: str) -> Iterator[ModuleType]:
    """The module called `name` and the modules in it; one that this system cannot import is left out."""
    if name.split(".")[0] in SKIPPED:
        return
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit):  # a module of another system, or built without its library
        return
    yield module
    if name in SKIPPED_PACKAGES or "__path__" not in vars(module):
        return
    for inner in sorted(info.name for info in pkgutil.iter_modules(module.__path__)):
        if not inner.startswith("_") and inner not in ("test", "tests"):
            yield from tree(f"{name}.{inner}")


def module_entries(module: ModuleType) -> Iterator[Entry]:
    """A module, then what it makes public, re-exports too."""
    space = vars(module)
    names = public_names(module)
    callables = tuple(n for n in names if callable(space[n]))
    yield Entry("module", module.__name__, "", module.__name__, document(module), members=callables[:PUBLIC_MEMBERS])
    for name in names:
        value = space[name]
        if inspect.isclass(value):
            bases = tuple(b.__qualname__ for b in value.__bases__)
            yield Entry("class", module.__name__, "", name, document(value), signature(value), bases)
            yield from member_entries(module.__name__, name, value)
        elif inspect.isroutine(value):
            yield Entry("function", module.__name__, "", name, document(value), signature(value))


def member_entries(module: str, owner: str, cls: type) -> Iterator[Entry]:
    """The public methods and properties of a class, inherited ones with the text they inherit."""
    for name in sorted(dir(cls)):
        if name.startswith("_"):
            continue
        value = inspect.getattr_static(cls, name)
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        if isinstance(value, property):
            yield Entry("property", module, owner, name, document(value))
        elif inspect.isroutine(value):
            yield Entry("method", module, owner, name, document(value) or inherited(cls, name), signature(value))


def public_names(module: ModuleType) -> list[str]:
    """Return the names in `__all__`; without it, the names that the module itself defines."""
    space = vars(module)
    listed = space.get("__all__")
    if listed is not None:
        return sorted({n for n in listed if n in space and not n.startswith("_")})
    home = module.__name__.split(".")[0]
    return sorted(
        n
        for n, v in space.items()
        if not n.startswith("_")
        and (inspect.isclass(v) or inspect.isroutine(v))
        and str(v.__module__ or home).lstrip("_").split(".")[0] == home
    )


def document(value: object) -> str:
    """Return the cleaned docstring; "" if it contains a memory address, or if reading it raises."""
    try:
        text = inspect.getdoc(value) or ""
    except Exception:  # a descriptor may raise whatever it likes
        return ""
    return "" if ADDRESS.search(text) else text


def inherited(cls: type, name: str) -> str:
    """The docstring that a base class has for a method of the same name."""
    texts = (document(vars(base)[name]) for base in cls.__mro__[1:] if name in vars(base))
    return next((text for text in texts if text), "")


def signature(value: object) -> str:
    """Return the call as text; "" if a default has no plain form (an address, a local path, a set's changing order)."""
    try:
        text = str(inspect.signature(value))  # type: ignore[arg-type]
    except Exception:  # no signature, or an annotation that cannot be shown
        return ""
    return "" if "<" in text or "{" in text or COMPUTED_PATH.search(text) else text


if __name__ == "__main__":
    sys.exit(main())
