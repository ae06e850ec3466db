"""Turn pydantic's errors into messages: place, value found, values allowed."""

from __future__ import annotations

import math
import re
import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from finetune.recipe import Recipe
from finetune.recipe.data import PATTERN_WORDS
from finetune.recipe.filters import RULES
from finetune.utils.format import did_you_mean, nearest

Location = tuple[str | int, ...]
Where = dict[Location, str]  # a field's path → "file:line" or the --set option that wrote it
WORDS = {  # error type → what is allowed, replacing pydantic's message
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list, as in [a, b]",
    "dict_type": "names and values, as in {a: b}",
    "finite_number": "a finite number",
}
OFF = ("none", "off", "false")  # often written instead of null
QUOTES = "; put it in quotes, as"
TRUTHS = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}  # YAML 1.1 booleans


def explain(errors: Iterable[ErrorDetails], where: Mapping[Location, str], path: str) -> list[str]:
    """Return one line per field, in the order of the file. The errors of a union's members are joined."""
    merged: dict[tuple[Location, str], list[str]] = {}
    for error in errors:
        at, model = _real_location(error["loc"], where)
        name = ".".join(map(str, at)) or "recipe"
        merged.setdefault((at, f"{line_of(at, where, path)}: {name}"), []).append(_sentence(error, at, model))
    lines = []
    for (_, start), sentences in merged.items():
        if len(set(sentences)) > 1:  # a union gives "found X; allowed: A", "found X; allowed: B": print X once
            sentences = [s.partition(QUOTES)[0] for s in sentences]
        first, *others = dict.fromkeys(sentences)
        lines.append(f"{start}: {' or '.join([first, *(o.partition('allowed: ')[2] or o for o in others)])}")
    return in_file_order(lines)


def in_file_order(lines: Iterable[str]) -> list[str]:
    """Sort messages that begin with `file:line: ` by line."""
    return sorted(lines, key=_line_number)


def line_of(at: Location, where: Mapping[Location, str], path: str) -> str:
    """Return `file:line` of a field, or of the nearest enclosing section in the file."""
    return next((where[at[:n]] for n in range(len(at), -1, -1) if at[:n] in where), path)


def written_fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields allowed in a file, by their names in the file."""
    fields = model.model_fields.items()
    return {f.alias or n: f for n, f in fields if not f.exclude or f.is_required()}


def _line_number(line: str) -> int:
    match = re.match(r".*?:(\d+): ", line)
    return int(match[1]) if match else 0


def _sentence(error: ErrorDetails, at: Location, model: type[BaseModel] | None) -> str:
    kind, value, actual = error["type"], error["input"], shortened(error["input"])
    if kind == "extra_forbidden":
        return _unknown(str(at[-1]), model)
    if kind == "missing":
        return "this field is required"
    if at[:2] == ("filter", "rules") and kind in ("union_tag_not_found", "union_tag_invalid", "model_attributes_type"):
        return _no_rule(value)
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        return _no_source(value)
    if kind == "contradiction":
        return error["msg"]
    if kind == "value_error":
        message = error["msg"].removeprefix("Value error, ")
        is_quoted = isinstance(value, dict) or str(value)[:20] in message
        return message if is_quoted else f"found {actual}; {message}"
    if kind in ("model_type", "model_attributes_type"):
        fields = list(written_fields(held)) if (held := _model_at(at)) else []
        if "source" in fields:
            return _no_source(value)
        off = "; leave the line out for the defaults" if value is None else _null_turns_off(at)
        return f"found {actual}; allowed: fields, as in {{{fields[0] if fields else '…'}: …}}{off}"
    if kind == "list_type" and at in (("data",), ("decontaminate", "against")):
        return f"found {actual}; allowed: a list, each source in a line that begins with -"
    off = _null_turns_off(at) or _null_turns_off(at[:-1]) if str(value).lower() in OFF else ""
    return f"found {actual}; allowed: {_allowed(error)}{off}"


def _null_turns_off(at: Location) -> str:
    """Return a hint for `pack: none` or `dedup: false`: null turns the section off."""
    if not at:
        return ""
    holder = _model_at(at[:-1]) if at[1:] else Recipe
    field = written_fields(holder).get(str(at[-1])) if holder else None
    return f"; {at[-1]}: null turns it off" if field and type(None) in _members(field.annotation) else ""


def _allowed(error: ErrorDetails) -> str:
    """Return the allowed values in words, with a suggestion."""
    kind, value = error["type"], error["input"]
    message = re.sub(r"^(Input|String|List|Dictionary) should (be|have) ", "", error["msg"])
    if kind == "literal_error":
        options = [o.strip("'") for o in re.findall(r"'[^']*'|\d+", message)]
        return message + did_you_mean(value, options)
    if kind == "string_pattern_mismatch":
        return PATTERN_WORDS.get(error.get("ctx", {}).get("pattern", ""), message)
    if isinstance(value, float) and math.isnan(value):
        return WORDS["finite_number"]
    words = WORDS.get(kind, message.partition(" after validation")[0])
    if kind == "bool_type" and str(value).lower() in TRUTHS:
        return f"{words}; write {TRUTHS[str(value).lower()]}"
    if kind in ("int_type", "float_type") and (meant := _as_number(value)) is not None:
        if kind == "float_type" or meant.is_integer():
            return f"{words}; write {meant:g}" if abs(meant) < 1e6 else words
    if kind == "string_type" and isinstance(value, (bool, int, float)):
        return f"{words}{QUOTES} it was written: '…'"
    return words


def _as_number(value: object) -> float | None:
    """Return the number meant by `1_000`, `"16"` or `1e3`, which are read as text or float."""
    try:
        return float(value) if isinstance(value, (str, float)) else None
    except ValueError:
        return None


def _unknown(name: str, model: type[BaseModel] | None) -> str:
    names = sorted(written_fields(model)) if model else []
    sections = [(n, m) for n, f in written_fields(Recipe).items() for m in _models(f.annotation)]
    homes = dict.fromkeys(n for n, m in sections if name in written_fields(m))
    near = nearest(name, names)
    hint = f"it belongs in {' or '.join(homes)}; " if homes else f"did you mean {near}? " if near else ""
    return f"unknown field; {hint}allowed: {', '.join(names)}"


def _no_source(value: object) -> str:
    if not isinstance(value, dict):
        return f"found {shortened(value)}; allowed: a source, as in {{source: local, path: rows.jsonl}}"
    tag = value.get("source")
    found = "the field `source` is missing" if tag is None else f"found source {tag!r}"
    return f"{found}; allowed: source: hub, local or pydoc{did_you_mean(tag, ['hub', 'local', 'pydoc'])}"


def _no_rule(value: object) -> str:
    tag = value.get("rule") if isinstance(value, dict) else value
    if isinstance(value, dict) and tag is None:
        return "the field `rule` is missing; write it as in {rule: repetition}"
    return f"found {shortened(tag)}; allowed: {', '.join(RULES)}, or module:function{did_you_mean(tag, RULES)}"


def shortened(value: object) -> str:
    """Return a value as written in YAML, at most 60 characters of it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _real_location(loc: Location, where: Mapping[Location, str]) -> tuple[Location, type[BaseModel] | None]:
    """Return a location without pydantic's union tags, and the model that holds its last field."""
    annotation: Any = Recipe
    at: Location = ()
    holder: type[BaseModel] | None = None
    for step in loc:
        members = _models(annotation)
        tagged = [m for m in members if len(members) > 1 and step in _tags(m)]
        if tagged:  # the tag of a discriminated union is not a field of the file
            annotation = tagged[0]
            continue
        inner, model = _step(annotation, step)
        dicts = [m for m in _members(annotation) if get_origin(m) is dict]
        if model or len(members) == 1:  # a contradiction's path has no tags
            holder = model or members[0]
        elif dicts and step != "[key]" and (*at, step) in where:
            inner = get_args(dicts[0])[1]
        elif isinstance(step, str):
            continue  # the name of a union's member ("list[str]", "function-before[…]"), not in the file
        annotation, at = inner, (*at, step)
    return at, holder


def _model_at(at: Location) -> type[BaseModel] | None:
    """Return the section expected at a location of the file."""
    annotation: Any = Recipe
    for step in at:
        annotation, _ = _step(annotation, step)
    return next(iter(_models(annotation)), None)


def _step(annotation: object, step: str | int) -> tuple[Any, type[BaseModel] | None]:
    """Return the annotation of a field or of a list's items, Any if there is none, and the section with the field."""
    if isinstance(step, int):
        return next((get_args(m)[0] for m in _members(annotation) if get_origin(m) is list), Any), None
    for model in _models(annotation):  # a union has several
        for name, field in model.model_fields.items():
            if step == (field.alias or name):
                return field.annotation, model
    return Any, None


def _models(annotation: object) -> list[type[BaseModel]]:
    return [m for m in _members(annotation) if isinstance(m, type) and issubclass(m, BaseModel)]


def _members(annotation: object) -> list[object]:
    """Return the members of a (possibly annotated) union."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [m for a in get_args(annotation) for m in _members(a)]
    return [annotation]


def _tags(model: type[BaseModel]) -> tuple[str, ...]:
    union = model.model_fields.get("source") or model.model_fields.get("rule")
    return get_args(union.annotation) if union and get_origin(union.annotation) is Literal else ()
