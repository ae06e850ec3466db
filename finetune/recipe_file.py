"""From a YAML file to a Recipe: every error at once, with file, line, field, found and allowed."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from finetune.errors import InputError
from finetune.recipe import Recipe

MAX_RECIPE_BYTES = 1_000_000
Location = tuple[str | int, ...]
Where = dict[Location, str]  # a field's path → "file:line" or the --set option that wrote it


@dataclass(frozen=True)
class LoadedRecipe:
    """A validated recipe, beside the text it was read from."""

    recipe: Recipe
    path: Path
    text: str
    sets: tuple[str, ...] = ()


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


def recipe_folders() -> list[Path]:
    """Where a recipe's name is looked up: the working directory's recipes/, the checkout's, the installed package's."""
    package = Path(__file__).parent
    return [Path("recipes"), package.parent / "recipes", package / "_recipes"]


def resource(*parts: str) -> Path | None:
    """A file or folder shipped in recipes/ (templates, shapes), or None."""
    return next((f.joinpath(*parts) for f in recipe_folders()[1:] if f.joinpath(*parts).exists()), None)


def find_recipe(name: str) -> Path:
    """The file that `name` (a path, or the name of a file in recipes/) means; InputError with the nearest name."""
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if path.is_file():
            return path
        raise InputError(f"{name}: no such recipe file{', it is a folder' if path.is_dir() else ''}")
    known: dict[str, Path] = {}
    for folder in recipe_folders():
        for found in sorted(folder.glob("*.yaml")):
            known.setdefault(found.stem, found)
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise InputError(f"no recipe named {name!r}{hint} (there is {', '.join(sorted(known))}; or give a path to a .yaml)")


def load_recipe(name: str, sets: Sequence[str] = ()) -> LoadedRecipe:
    """Read, edit (`--set a.b=value`) and validate a recipe; InputError carries every error of the file."""
    path = find_recipe(name)
    text = _read_text(path)
    return LoadedRecipe(parse_recipe(text, path, sets), path, text, tuple(sets))


def parse_recipe(text: str, path: Path, sets: Sequence[str] = ()) -> Recipe:
    """Validate the recipe in `text`; `path` is named in errors, and its folder is where local files are looked for."""
    problems: list[str] = []
    where: Where = {}
    raw = _parse_yaml(text, str(path), where, problems)
    if not problems and not isinstance(raw, dict):
        found = "nothing" if raw is None else f"a {type(raw).__name__}"
        problems.append(f"{path}:1: a recipe is a mapping of sections (name:, model:, data: …); found {found}")
    if not problems:
        for option in sets:
            problem = _apply_set(raw, option, where)
            problems += [problem] if problem else []
    if problems:
        raise InputError("\n".join(problems))
    context = {"folder": str(path.parent), "working_folder": "."}
    try:
        return Recipe.model_validate(raw, context=context)
    except ValidationError as error:
        raise InputError("\n".join(_explain(error.errors(), where, str(path)))) from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply to be a recipe") from None


def _read_text(path: Path) -> str:
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= MAX_RECIPE_BYTES else b""
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if size > MAX_RECIPE_BYTES:
        raise InputError(f"{path}: {size:,} bytes; a recipe is at most {MAX_RECIPE_BYTES:,} (is this a data file?)")
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(f"{path}: encoded as UTF-16; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: not UTF-8 text (byte 0x{content[error.start]:02x})") from None


def _parse_yaml(text: str, name: str, where: Where, problems: list[str]) -> Any:  # noqa: ANN401 - YAML
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        tab = " (YAML is indented with spaces, never tabs)" if mark and "\t" in str(error.problem) else ""
        problems.append(f"{name}:{line}: not YAML: {error.problem or error.context}{tab}")
        return None
    except yaml.YAMLError as error:
        problems.append(f"{name}:1: not YAML: {' '.join(str(error).split())}")
        return None
    except RecursionError:
        problems.append(f"{name}: nested too deeply to be a recipe")
        return None
    return None if node is None else _value(node, (), name, where, problems)


def _value(node: yaml.Node, at: Location, name: str, where: Where, problems: list[str]) -> Any:  # noqa: ANN401 - YAML
    line = f"{name}:{node.start_mark.line + 1}"
    where.setdefault(at, line)
    kind = node.tag.rpartition(":")[2]
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, key_line = str(key_node.value), f"{name}:{key_node.start_mark.line + 1}"
            if key in result:
                problems.append(f"{key_line}: {'.'.join(map(str, (*at, key)))}: written twice; keep one")
                continue
            where[(*at, key)] = key_line
            result[key] = _value(value_node, (*at, key), name, where, problems)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*at, i), name, where, problems) for i, item in enumerate(node.value)]
    if kind not in ("str", "null", "bool", "int", "float"):
        problems.append(f"{line}: {'.'.join(map(str, at))}: the tag {node.tag} is not allowed; write a plain value")
        return None
    text = str(node.value)
    if kind == "int" and len(text) > 300:
        problems.append(f"{line}: {'.'.join(map(str, at))}: a number of {len(text)} digits")
        return None
    if kind == "float":
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))
    if kind == "int":
        return int(text)
    return {"null": None, "bool": text.lower() == "true"}.get(kind, text)


def _apply_set(raw: dict[str, Any], option: str, where: Where) -> str | None:
    """Write `a.b.0=value` into the raw recipe; returns a sentence if it cannot be."""
    path, equals, text = option.partition("=")
    steps = path.strip().split(".")
    if not equals or not all(steps):
        return f"--set {option}: write SECTION.FIELD=VALUE, as in train.learning_rate=1e-4"
    problems: list[str] = []
    scratch: Where = {}
    value = _parse_yaml(text, f"--set {path}", scratch, problems)
    if problems:
        return problems[0]
    at: Any = raw
    trail: Location = ()
    for i, step in enumerate(steps):
        last = i == len(steps) - 1
        if isinstance(at, list):
            if not step.isdigit() or int(step) >= len(at):
                here = ".".join(map(str, trail))
                return f"--set {option}: {here} has {len(at)} items; {step!r} is none of 0…{len(at) - 1}"
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
                    return f"--set {option}: {'.'.join(map(str, (*trail, key)))} is {at[key]!r}, not a section"
        trail = (*trail, key)
        if last:
            at[key] = value
            where[trail] = f"--set {option}"
        else:
            at = at[key]
    return None


def _explain(errors: Iterable[ErrorDetails], where: Where, path: str) -> list[str]:
    """One line a field. A union reports one error per member; those are joined."""
    merged: dict[tuple[Location, str], list[str]] = {}
    for error in errors:
        at, model = _real_location(error["loc"], where)
        field = ".".join(map(str, at)) or "recipe"
        line = next((where[at[:n]] for n in range(len(at), -1, -1) if at[:n] in where), path)
        merged.setdefault((at, f"{line}: {field}"), []).append(_sentence(error, at, model))
    lines = []
    for (_, start), sentences in merged.items():
        first, *others = dict.fromkeys(
            sentences
        )  # a union says "found X; allowed: A", "found X; allowed: B": say X once
        lines.append(f"{start}: {' or '.join([first, *(o.partition('allowed: ')[2] or o for o in others)])}")
    return sorted(lines, key=_line_number)


def _line_number(line: str) -> int:
    match = re.match(r".*?:(\d+): ", line)
    return int(match[1]) if match else 0


def _sentence(error: ErrorDetails, at: Location, model: type[BaseModel] | None) -> str:
    kind, found = error["type"], _short(error["input"])
    if kind == "extra_forbidden":
        names = sorted(f.alias or n for n, f in model.model_fields.items()) if model else []
        near = difflib.get_close_matches(str(at[-1]), names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"unknown field; {hint}allowed: {', '.join(names)}"
    if kind == "missing":
        return "this field is required"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        tag = cast("Mapping[str, Any]", error["input"]).get("source") if isinstance(error["input"], dict) else None
        near = difflib.get_close_matches(str(tag), ("hub", "local", "pydoc"), n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"found source {tag!r}; allowed: source: hub, local or pydoc{hint}"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if kind == "value_error":
        return (
            message
            if str(error["input"])[:20] in message or isinstance(error["input"], dict)
            else f"found {found}; {message}"
        )
    if kind == "literal_error":
        options = [o.strip("'") for o in re.findall(r"'[^']*'|\d+", message)]
        near = difflib.get_close_matches(str(error["input"]), options, n=1, cutoff=0.5)
        return f"found {found}; allowed: {message}" + (f"; did you mean {near[0]}?" if near else "")
    return f"found {found}; allowed: {message}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _real_location(loc: Location, where: Where) -> tuple[Location, type[BaseModel] | None]:
    """Drop the union tags that pydantic puts into a location; also the model that holds its last field."""
    annotation: Any = Recipe
    at: Location = ()
    holder: type[BaseModel] | None = None
    for step in loc:
        members = [m for m in _members(annotation) if isinstance(m, type) and issubclass(m, BaseModel)]
        if isinstance(step, int):
            annotation = next((get_args(m)[0] for m in _members(annotation) if get_origin(m) is list), Any)
            at = (*at, step)
            continue
        tagged = [m for m in members if len(members) > 1 and step in _tags(m)]
        if tagged:  # the tag of a discriminated union is no field of the file
            annotation = tagged[0]
            continue
        if len(members) == 1:
            holder = members[0]
            fields = {f.alias or n: f.annotation for n, f in holder.model_fields.items()}
            annotation = fields.get(step, Any)
            at = (*at, step)
            continue
        dicts = [m for m in _members(annotation) if get_origin(m) is dict]
        if dicts and step != "[key]" and (*at, step) in where:
            annotation, at = get_args(dicts[0])[1], (*at, step)
        # anything else is the name of a union member ("list[str]", "function-before[…]"): not in the file
    return at, holder


def _members(annotation: Any) -> list[Any]:  # noqa: ANN401 - a type expression
    """The members of a (possibly annotated) union."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [m for a in get_args(annotation) for m in _members(a)]
    return [annotation]


def _tags(model: type[BaseModel]) -> tuple[str, ...]:
    field = model.model_fields.get("source")
    return get_args(field.annotation) if field and get_origin(field.annotation) is Literal else ()
