"""What is written about the recipe, made from its models: recipes/schema.json for editors, docs/recipe-reference.md.

`python -m finetune.recipe.reference` (or `make docs`) writes both; a test fails where they are stale.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from finetune.recipe import BUILTIN_MODELS, Recipe
from finetune.recipe.data import HUB_NAME, OWN, PATTERN_WORDS
from finetune.recipe.filters import RULES
from finetune.recipe.messages import written_fields

MODULES = ("data.py", "filters.py", "lora.py", "training.py", "preference.py", "schema.py")
# A name for the Hub, a folder, or a builtin: what Model's own validator accepts as an id
MODEL_ID = [
    {"enum": list(BUILTIN_MODELS)},
    {"pattern": HUB_NAME},
    {"pattern": r"^(/|\./|~)"},
    {"pattern": r"^(?!builtin:).*(\\|/.*/)"},
]
FURTHER_SOURCES = ("decontaminate", "preference")  # sections whose sources are those of data
OWN_TEXT = {"type": "string", "pattern": OWN}
OWN_RULE = {"type": "object", "properties": {"rule": OWN_TEXT}, "required": ["rule"], "additionalProperties": False}
HEAD = """\
# Recipe reference

Made from the models by `make docs`; change the sentence below the field, not this page. A section that is left out has
its defaults; `null` turns off a section that says so. Any field can be set for one run: `--set train.epochs=2`.

YAML is read by version 1.2: `2e-4` is a number, `yes` and `no` are text, and `1_000` is no number. Aliases (`*name`),
tags (`!name`) and merge keys (`<<`) are refused. Editors that know JSON Schema complete and check a recipe that begins
with `# yaml-language-server: $schema=./schema.json`.
"""


def schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe file, each field with its sentence and default as a description.

    What a schema cannot say (fields that contradict each other, files that are not there) only `validate` finds.
    """
    made = Recipe.model_json_schema(by_alias=True)
    models = {m.__name__: m for m in _models(Recipe)}
    for name, definition in [*made["$defs"].items(), ("Recipe", made)]:
        sentences = sentences_of(models[name])
        for field, value in definition["properties"].items():
            _polish(value)
            default = "" if "default" not in value else f" Default: {_yaml(value['default'])}."
            value["description"] = sentences[field] + default
    made["$defs"]["Model"]["properties"]["id"]["anyOf"] = MODEL_ID
    rules = made["$defs"]["Filter"]["properties"]["rules"]["items"]
    bare = [r for r in RULES if r not in ("language", "own")]  # a name alone has its defaults, and these have none
    rules["anyOf"] = [{"enum": bare}, OWN_TEXT, OWN_RULE, *rules.pop("oneOf")]
    short = {"type": "string", "minLength": 1, "maxLength": 400, "anyOf": MODEL_ID}
    made["properties"]["model"] = {
        "anyOf": [short, {"$ref": "#/$defs/Model"}],
        "description": made["properties"]["model"]["description"],
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}


def schema_text() -> str:
    """The bytes of recipes/schema.json."""
    return json.dumps(schema(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def reference_text() -> str:
    """The text of docs/recipe-reference.md: one table a section, in the order of the recipe."""
    found = schema()
    definitions = found["$defs"]
    parts = [HEAD, *_table("The whole", Recipe, "", found)]
    for name, field in written_fields(Recipe).items():
        for model in _models(field.annotation):
            if model.__name__ in definitions and not (name in FURTHER_SOURCES and model.__name__.endswith("Source")):
                kind = written_fields(model).get("source") or written_fields(model).get("rule")
                label = f"{name}: {get_args(kind.annotation)[0]}" if kind else name
                parts += _table(f"`{label}`", model, str(model.__doc__), definitions[model.__name__])
    return "\n".join(parts)


@cache
def sentences_of(model: type[BaseModel]) -> Mapping[str, str]:
    """A model's fields, by their names in the file, each with the sentence that stands below it in the source."""
    every: dict[str, str] = {}
    for parent in reversed(model.__mro__):
        every |= _documented().get(parent.__name__, {})
    return {written: every[name] for written, name in _names(model).items()}


def write(root: Path) -> list[Path]:
    """Write both files below a checkout."""
    texts = {
        root / "recipes" / "schema.json": schema_text(),
        root / "docs" / "recipe-reference.md": reference_text(),
    }
    for path, text in texts.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(texts)


@cache
def _documented() -> dict[str, dict[str, str]]:
    """Class → field → the string that stands alone below it."""
    found: dict[str, dict[str, str]] = {}
    for module in MODULES:
        for item in ast.parse((Path(__file__).parent / module).read_text(encoding="utf-8")).body:
            if isinstance(item, ast.ClassDef):
                found[item.name] = dict(_pairs(item.body))
    return found


def _pairs(body: Sequence[ast.stmt]) -> Iterator[tuple[str, str]]:
    for field, below in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            if isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
                yield field.target.id, below.value.value


def _names(model: type[BaseModel]) -> dict[str, str]:
    """A field's name in the file → its name in the model."""
    written = written_fields(model)
    return {f.alias or n: n for n, f in model.model_fields.items() if (f.alias or n) in written}


def _models(annotation: Any) -> list[type[BaseModel]]:  # noqa: ANN401 - a type expression
    """Every model in a type expression, and in the fields of those, each once."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        inner = [m for f in annotation.model_fields.values() for m in _models(f.annotation)]
        return list(dict.fromkeys([annotation, *inner]))
    return list(dict.fromkeys(m for a in get_args(annotation) for m in _models(a)))


def _polish(value: dict[str, Any]) -> None:
    """Leave out what says nothing to a person or an editor."""
    for name in ("title", "format", "discriminator"):
        value.pop(name, None)
    if isinstance(value.get("default"), dict) and value["default"]:  # a section's defaults are its fields'
        del value["default"]
    for inner in (value.get("items"), *value.get("anyOf", ()), *value.get("oneOf", ())):
        if isinstance(inner, dict):
            _polish(inner)


def _table(title: str, model: type[BaseModel], text: str, definition: Mapping[str, Any]) -> list[str]:
    lines = [f"## {title}\n", *([f"{text}\n"] if text else []), "| field | allowed | default | meaning |"]
    lines.append("|---|---|---|---|")
    sentences, required = sentences_of(model), definition.get("required", ())
    for field, value in sorted(definition["properties"].items(), key=lambda item: item[0] not in required):
        default = "required" if field in required else "on, as below"
        if "default" in value:
            default = f"`{_yaml(value['default'])}`"
        cells = (f"`{field}`", _words(value), default, sentences[field])
        lines.append(f"| {' | '.join(c.replace('|', chr(92) + '|') for c in cells)} |")
    return [*lines, ""]


def _words(value: Mapping[str, Any]) -> str:
    """What a schema allows, for a person."""
    if "const" in value or "enum" in value:
        return ", ".join(f"`{v}`" for v in value.get("enum", [value.get("const")]))
    if inner := value.get("oneOf") or value.get("anyOf"):
        # a text that is one of several kinds of name is one text
        return "text" if value.get("type") == "string" else " or ".join(dict.fromkeys(_words(v) for v in inner))
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        return f"a {name.removesuffix('Source').lower()} source" if name.endswith("Source") else "a section"
    kind = value.get("type", "")
    if kind == "array":
        return f"a list of: {_words(value['items'])}" + (", not empty" if value.get("minItems") else "")
    if kind == "object" and not value["additionalProperties"]:
        return "a section"
    if kind == "object":
        return f"names with {_words(value['additionalProperties'])}"
    if kind == "string":
        return PATTERN_WORDS.get(value.get("pattern", ""), "text")
    plain = {"integer": "a whole number", "number": "a number", "boolean": "`true`, `false`", "null": "`null`"}
    return plain[kind] + _range(value)


def _range(value: Mapping[str, Any]) -> str:
    limits = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
    said = [f"{sign} {value[name]:,}" for name, sign in limits if name in value]
    return f" {', '.join(said)}" if said else ""


def _yaml(value: object) -> str:
    """A default as one would write it."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return f"[{', '.join(_yaml(v) for v in value)}]"
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    for written in write(Path(__file__).parents[2]):
        sys.stdout.write(f"wrote {written}\n")
