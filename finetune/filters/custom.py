"""User-defined filter rules: find and load the module that a recipe names."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.data.records import Example
from finetune.errors import InputError
from finetune.recipe.filters import Own
from finetune.utils.files import hash_file
from finetune.utils.format import did_you_mean


def module_file(rule: Own) -> Path:
    """Return the file of the rule's module: next to the recipe, else where Python finds it. The module is not run.

    Raises InputError if there is none, or if the file does not define the name at its top level.
    """
    module, _, function = rule.function.partition(":")
    path = _beside(rule.folder, module) or _installed(module)
    if path is None:
        beside = f"next to the recipe ({rule.folder}) or " if rule.folder else ""
        raise InputError(f"filter rule {rule.function}: no module {module} {beside}installed")
    try:
        names = set(_bound(ast.parse(path.read_bytes())))
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"filter rule {rule.function}: {path} cannot be read as Python: {error}") from None
    if function not in names and "*" not in names:
        hint = did_you_mean(function, names)
        raise InputError(f"filter rule {rule.function}: {path} does not define {function} at its top level{hint}")
    return path


def digest(rule: Own) -> str:
    """Return the xxh3-128 of the module's file; modules that it imports are not included."""
    return hash_file(module_file(rule))


def load(rule: Own) -> Callable[[Example], object]:
    """Import and return the function. Raises InputError if the import fails or it is not a function."""
    module, _, name = rule.function.partition(":")
    path = module_file(rule)
    try:
        with _importable(rule.folder):
            if _beside(rule.folder, module) is None:
                loaded = importlib.import_module(module)
            else:  # under a unique name: another recipe's folder may have a module of the same name
                unique = f"_finetune_rule_{digest(rule)}"
                spec = importlib.util.spec_from_file_location(unique, path)
                if spec is None or spec.loader is None:
                    raise ImportError(f"{path} is not a Python file")
                loaded = importlib.util.module_from_spec(spec)
                sys.modules[unique] = loaded  # dataclasses look up their module there
                spec.loader.exec_module(loaded)
    except Exception as error:  # a module may raise anything when it is imported
        raise InputError(
            f"filter rule {rule.function}: {path} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    function = vars(loaded).get(name)
    if not callable(function):
        raise InputError(f"filter rule {rule.function}: {name} in {path} must be a function, found {function!r:.60}")
    return function


def _beside(folder: Path | None, module: str) -> Path | None:
    if folder is None:
        return None
    base = folder.joinpath(*module.split("."))
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


def _installed(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)  # imports the packages around the module, but not the module
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.has_location and spec.origin else None


def _bound(tree: ast.Module) -> Iterator[str]:
    """Yield the names bound at a module's top level, also inside `if` and `try`; `*` for a star import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


@contextmanager
def _importable(folder: Path | None) -> Iterator[None]:
    """Put the recipe's folder first on the path, so that the module can import its neighbours."""
    if folder is None:
        yield
        return
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
