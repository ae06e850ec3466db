"""A filter rule of the user's own: finding the module that a recipe names, and loading it."""

from __future__ import annotations

import ast
import difflib
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


def module_file(rule: Own) -> Path:
    """The file of the rule's module: beside the recipe, else where Python finds it. Its own code is not run.

    Raises InputError where there is none, or where the file binds no such name at its top level.
    """
    module, _, function = rule.function.partition(":")
    path = _beside(rule.folder, module) or _installed(module)
    if path is None:
        beside = f"beside the recipe ({rule.folder}) nor " if rule.folder else ""
        raise InputError(f"filter rule {rule.function}: there is no module {module}, neither {beside}installed")
    try:
        names = set(_bound(ast.parse(path.read_bytes())))
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"filter rule {rule.function}: {path} cannot be read as Python: {error}") from None
    if function not in names and "*" not in names:
        near = difflib.get_close_matches(function, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"filter rule {rule.function}: {path} has no {function} at its top level{hint}")
    return path


def digest(rule: Own) -> str:
    """The xxh3-128 of the module's file; what that file imports is not seen."""
    return hash_file(module_file(rule))


def load(rule: Own) -> Callable[[Example], object]:
    """The function itself. Raises InputError where its module cannot be imported or it is no function."""
    module, _, name = rule.function.partition(":")
    path = module_file(rule)
    try:
        with _importable(rule.folder):
            if _beside(rule.folder, module) is None:
                loaded = importlib.import_module(module)
            else:  # under a name of its own: another recipe's folder may have a module of the same name
                unique = f"_finetune_rule_{digest(rule)}"
                spec = importlib.util.spec_from_file_location(unique, path)
                if spec is None or spec.loader is None:
                    raise ImportError(f"{path} is no Python file")
                loaded = importlib.util.module_from_spec(spec)
                sys.modules[unique] = loaded  # dataclasses look their module up there
                spec.loader.exec_module(loaded)
    except Exception as error:  # a module runs whatever it likes when it is imported
        raise InputError(
            f"filter rule {rule.function}: {path} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    function = vars(loaded).get(name)
    if not callable(function):
        raise InputError(f"filter rule {rule.function}: {name} in {path} is no function: found {function!r:.60}")
    return function


def _beside(folder: Path | None, module: str) -> Path | None:
    if folder is None:
        return None
    base = folder.joinpath(*module.split("."))
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


def _installed(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)  # which imports the packages around the module, and not the module
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.has_location and spec.origin else None


def _bound(tree: ast.Module) -> Iterator[str]:
    """The names that a module's top level binds, `*` for those of a star import; also inside `if` and `try`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


@contextmanager
def _importable(folder: Path | None) -> Iterator[None]:
    """The recipe's folder comes first on the path, so that the module can import its neighbours."""
    if folder is None:
        yield
        return
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
