"""Load a Recipe from a YAML file; all errors are reported together, with file, line, field, found and allowed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from finetune.errors import InputError
from finetune.recipe import Recipe
from finetune.recipe.data import Contradiction, local_path
from finetune.recipe.messages import Location, Where, explain, in_file_order, line_of, shortened
from finetune.utils.format import clipped, did_you_mean
from finetune.utils.resources import known_recipes

MAX_RECIPE_BYTES = 100_000
MOST_SHOWN = 50  # mistakes of one file
MOST_CHARACTERS = 4000  # of one mistake
MOST_LEVELS = 20  # of a --set: a recipe has four
# (section, old field) → new field, or None for a field that is read and ignored
OLD_NAMES = {("dedup", "minhash"): "jaccard", ("runtime", "cache_dequantized"): None}
PLAIN_TAGS: dict[type[yaml.Node], tuple[str, ...]] = {
    yaml.MappingNode: ("map",),
    yaml.SequenceNode: ("seq",),
    yaml.ScalarNode: ("str", "null", "bool", "int", "float"),
}


@dataclass(frozen=True)
class LoadedRecipe:
    """A validated recipe and the text it was read from."""

    recipe: Recipe
    path: Path
    text: str
    sets: tuple[str, ...] = ()
    where: Mapping[Location, str] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()  # one line for each field under an old name

    def line_of(self, *at: str | int) -> str:
        """Return `file:line` (or the --set option) of this field, else of the section it is in."""
        return line_of(at, self.where, str(self.path))

    def located(self, problems: Iterable[Contradiction]) -> list[str]:
        """Return `file:line: field: sentence` for each problem, in the order of the file."""
        return in_file_order(f"{self.line_of(*at)}: {'.'.join(map(str, at))}: {why}" for at, why in problems)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core scalars: `2e-4` is a number, and `no`, `on` and dates are plain text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - as PyYAML declares it

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not used in recipes", problem_mark=event.start_mark)
        return super().compose_node(parent, index)


for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    (
        "float",
        r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.inf$|^\.nan$",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def find_recipe(name: str) -> Path:
    """Return the file of `name`, a path or the name of a file in recipes/. Raises InputError with the nearest name."""
    try:
        path = local_path(name)
    except ValueError as error:
        raise InputError(f"{shortened(name)}: {error}") from None
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if path.is_file():
            return path
        if path.name == name and (shipped := known_recipes().get(path.stem)) and shipped.name == name:
            return shipped  # `init` writes into recipes/ and the commands are typed above it
        raise InputError(f"{name}: {'a folder, not a recipe file' if path.is_dir() else 'no such recipe file'}")
    known = known_recipes()
    if name in known:
        return known[name]
    hint = did_you_mean(name, known)
    raise InputError(f"no recipe named {name!r}{hint} (known: {', '.join(sorted(known))}; or a path to a .yaml file)")


def load_recipe(name: str, sets: Sequence[str] = ()) -> LoadedRecipe:
    """Read, edit (`--set a.b=value`) and validate a recipe; InputError holds every error of the file."""
    path = find_recipe(name)
    text = _read_text(path)
    recipe, where, notes = _validated(text, path, sets)
    return LoadedRecipe(recipe, path, text, tuple(sets), where, notes)


def parse_recipe(text: str, path: Path, sets: Sequence[str] = ()) -> Recipe:
    """Validate the recipe in `text`; `path` is named in errors, and local files are searched in its folder."""
    return _validated(text, path, sets)[0]


def parse_value(text: str, name: str) -> object:
    """Return a YAML value as a recipe reads it (2e-4 is a number). Raises InputError, which begins with `name`."""
    reading = _Reading(name)
    value = reading.read(text)
    if reading.problems:
        raise InputError("\n".join(reading.problems))
    return value


def _validated(text: str, path: Path, sets: Sequence[str]) -> tuple[Recipe, Where, tuple[str, ...]]:
    reading = _Reading(str(path))
    raw = reading.read(text)
    where, problems = reading.where, reading.problems
    if not isinstance(raw, dict):
        actual = "nothing" if raw is None else shortened(raw)
        shape = f"{path}:1: a recipe is a mapping of sections (name:, model:, data: …); found {actual}"
        raise InputError("\n".join(problems or [shape]))
    for option in sets:
        problem = _apply_set(raw, option, where)
        problems += [problem] if problem else []
    notes = _use_new_names(raw, where, problems)
    context = {"folder": str(path.parent), "working_folder": "."}
    try:
        # strict: "16" and 16.0 are not integers and `yes` is not a boolean, as in the schema that editors use
        recipe = Recipe.model_validate(raw, context=context, strict=True)
    except ValidationError as error:
        reported = tuple(": ".join(p.split(": ")[:2]) + ": " for p in problems)  # one error per field
        problems += [line for line in explain(error.errors(), where, str(path)) if not line.startswith(reported)]
    except RecursionError:
        problems.append(f"{path}: nested too deeply to be a recipe")
    if problems:
        more = [f"{path}: and {len(problems) - MOST_SHOWN:,} more errors"] if len(problems) > MOST_SHOWN else []
        lines = [clipped(line, MOST_CHARACTERS) for line in in_file_order(problems)[:MOST_SHOWN]]
        raise InputError("\n".join([*lines, *more]))
    return recipe, where, notes


def _use_new_names(raw: dict[str, Any], where: Where, problems: list[str]) -> tuple[str, ...]:
    """Rename old fields of `raw` and `where` in place; return a note for each."""
    notes = []
    for (section, old), new in OLD_NAMES.items():
        fields = raw.get(section)
        if not isinstance(fields, dict) or old not in fields:
            continue
        line = where.get((section, old), where.get((section,), section))
        if new is None:
            del fields[old]
            notes.append(f"{line}: {section}.{old} is no longer offered and is ignored; remove it")
            continue
        if new in fields:
            problems.append(f"{line}: {section}.{old}: the old name of {section}.{new}, which is set too; remove {old}")
            del fields[old]
            continue
        fields[new] = fields.pop(old)
        for at in [at for at in where if at[:2] == (section, old)]:
            where[section, new, *at[2:]] = where.pop(at)
        notes.append(f"{line}: {section}.{old} is now called {section}.{new}; the old name is still read")
    return tuple(notes)


def _read_text(path: Path) -> str:
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= MAX_RECIPE_BYTES else b""
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if size > MAX_RECIPE_BYTES:
        raise InputError(f"{path}: {size:,} bytes; a recipe is at most {MAX_RECIPE_BYTES:,} (is this a data file?)")
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(f"{path}: encoded as UTF-16 or UTF-32; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: not UTF-8 text (byte 0x{content[error.start]:02x})") from None


@dataclass
class _Reading:
    """A YAML text while it is read: `where` gets the line of each field, `problems` the errors."""

    name: str  # of the file or option, in front of line numbers
    where: Where = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def read(self, text: str) -> object:
        """Return the value of a document of plain values; None, and an entry of `problems`, if it is not one."""
        try:
            loader = _Loader(text)
            node = loader.get_single_node()
        except yaml.MarkedYAMLError as error:
            self.problems.append(_not_yaml(error, self.name))
            return None
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            self.problems.append(
                f"{self.name}:{line}: the character U+{int(error.character):04X} is not allowed in YAML"
            )
            return None
        except RecursionError:
            self.problems.append(f"{self.name}: nested too deeply to be a recipe")
            return None
        return None if node is None else self._value(node, ())

    def _value(self, node: yaml.Node, at: Location) -> object:
        line = f"{self.name}:{node.start_mark.line + 1}"
        self.where.setdefault(at, line)
        kind = node.tag.rpartition(":")[2]
        here = f"{line}: {'.'.join(map(str, at))}".removesuffix(": ")
        if kind not in PLAIN_TAGS[type(node)]:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            self.problems.append(f"{here}: the tag {tag} is not allowed; write a plain value")
            return None
        if isinstance(node, yaml.MappingNode):
            result: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key_line = f"{self.name}:{key_node.start_mark.line + 1}"
                if (
                    not isinstance(key_node, yaml.ScalarNode)
                    or key_node.value in ("", "<<")
                    or not _is_text(key_node.value)
                ):
                    self.problems.append(f"{key_line}: a field's name must be a plain word; write NAME: VALUE")
                    continue
                key = str(key_node.value)
                if key in result:
                    self.problems.append(f"{key_line}: {'.'.join(map(str, (*at, key)))}: written twice; keep one")
                    continue
                self.where[(*at, key)] = key_line
                result[key] = self._value(value_node, (*at, key))
            return result
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, (*at, i)) for i, item in enumerate(node.value)]
        text = str(node.value)
        if not _is_text(text):
            self.problems.append(f"{here}: a lone surrogate (U+D800–U+DFFF) is not a character; remove it")
            return None
        if kind == "int" and len(text) > 300:
            self.problems.append(f"{here}: a number of {len(text)} digits")
            return None
        if kind == "float":
            return float(text.replace(".inf", "inf").replace(".nan", "nan"))
        if kind == "int":
            return int(text)
        return {"null": None, "bool": text.lower() == "true"}.get(kind, text)


def _not_yaml(error: yaml.MarkedYAMLError, name: str) -> str:
    """Return PyYAML's message with a hint at the usual cause."""
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    problem = str(error.problem or error.context).replace("but got '<stream end>'", "but the file ends")
    if "another document" in problem:
        return f"{name}:{line}: a second document begins here (---); a recipe is one document"
    if "'\\t'" in problem:
        problem += " (YAML is indented with spaces, never tabs)"
    elif "mapping values are not allowed" in problem:
        problem += " (quote a text that contains a colon, or check the indentation)"
    elif problem.endswith("but got ':'"):
        problem += " (close the bracket, or quote a text that contains a colon)"
    elif "cannot start any token" in problem or "alphabetic or numeric" in problem:
        problem += " (put the text in quotes)"
    if error.context and error.context_mark and error.context_mark.line + 1 != line:
        problem += f", {error.context} that begins in line {error.context_mark.line + 1}"
    return f"{name}:{line}: not YAML: {problem}"


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _apply_set(raw: dict[str, Any], option: str, where: Where) -> str | None:
    """Write `a.b.0=value` into the raw recipe; return an error message, or None."""
    path, equals, text = option.partition("=")
    label = option if option.isprintable() else shortened(option)
    steps = path.strip().split(".")
    if not equals or not all(steps):
        return f"--set {label}: write SECTION.FIELD=VALUE, as in train.learning_rate=1e-4"
    if len(steps) > MOST_LEVELS:
        return f"--set {clipped(label, 100)}: {len(steps):,} levels, a recipe has at most {MOST_LEVELS}"
    reading = _Reading(f"--set {path if path.isprintable() else shortened(path)}")
    value = reading.read(text)
    if reading.problems:
        return reading.problems[0]
    at: Any = raw
    trail: Location = ()
    for i, step in enumerate(steps):
        last = i == len(steps) - 1
        if isinstance(at, list):
            if not re.fullmatch("[0-9]{1,6}", step) or int(step) >= len(at):
                here = ".".join(map(str, trail))
                return f"--set {label}: {here} has {len(at)} items; found index {step!r}, allowed: 0…{len(at) - 1}"
            key: str | int = int(step)
        elif isinstance(at, dict):
            key = step
            if not last and not isinstance(at.get(key), (dict, list)):
                # `model: NAME` is short for `model: {id: NAME}`, so model.revision=… must find a mapping
                if (*trail, key) == ("model",) and isinstance(at.get(key), str):
                    at[key] = {"id": at[key]}
                elif at.get(key) is None:
                    at[key] = {}
                else:
                    return f"--set {label}: {'.'.join(map(str, (*trail, key)))} is {at[key]!r}, not a section"
        trail = (*trail, key)
        if last:
            at[key] = value
            where[trail] = f"--set {option}"
        else:
            at = at[key]
    return None
