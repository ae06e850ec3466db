"""Tool definitions and tool calls in the one form that chat templates read, from the forms that data sets use.

The form is that of transformers' `apply_chat_template(tools=…)`: a definition is
`{"type": "function", "function": {"name", "description", "parameters"}}`, a call is
`{"type": "function", "function": {"name", "arguments"}}` with `arguments` an object.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from finetune.data.values import RowError, is_blank, kind, listed, parsed, plain_json, without_nulls

CALL = '{"name": …, "arguments": {…}}'
DEFINITION = "a list of tool definitions with names"
NOT_AN_OBJECT = "tool calls whose arguments are no JSON object are kept as text"
NULLS = (
    "tool calls or definitions had null fields, which were removed (Arrow fills rows up with them; write arguments as "
    "JSON text to keep a null)"
)

CALLS_AS_TEXT = (
    "answers are the JSON of tool calls and are learned as this text; to have the chat template write calls in its own "
    "form, make them turns with tool_calls (format: messages)"
)


def writes_call(text: str) -> bool:
    """Whether an answer is the JSON text of tool calls."""
    if not text.lstrip().startswith(("[", "{")):
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    calls = value if isinstance(value, list) else [value]
    return bool(calls) and all(isinstance(c, Mapping) and {"name", "arguments"} <= c.keys() for c in calls)


def tools_of(where: str, value: object, notes: Counter[str]) -> str | None:
    """The tool definitions of a row, a list or its JSON text, as canonical JSON; None if there are none.

    A bare definition (`{"name": …}`, as in `functions` columns) is put into the form above. Raises RowError.
    """
    if is_blank(value):
        return None
    listed_tools = parsed(where, value, DEFINITION, "tools")
    if isinstance(listed_tools, Mapping):
        listed_tools = [listed_tools]
    if not isinstance(listed_tools, list):
        raise RowError("tools", where, kind(listed_tools), DEFINITION)
    tools = [_definition(f"{where}[{i}]", tool, notes) for i, tool in enumerate(listed_tools) if tool is not None]
    return plain_json(where, tools) if tools else None


def _definition(where: str, value: object, notes: Counter[str]) -> dict[str, Any]:
    tool = parsed(where, value, "a tool definition", "tools")
    if not isinstance(tool, Mapping):
        raise RowError("tools", where, kind(tool), DEFINITION)
    tool = _pruned(tool, notes)
    inner = tool.get("function", tool)
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        keys = listed(inner) if isinstance(inner, Mapping) else kind(inner)
        raise RowError("tools", where, f"the keys {keys}", "a definition with a name")
    if inner is tool:
        return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
    return {"type": "function", **tool}


def calls_of(where: str, value: object, notes: Counter[str]) -> list[dict[str, Any]]:
    """Tool calls (a list, one call, or their JSON text), each in the form above. Raises RowError."""
    listed_calls = parsed(where, value, f"a tool call {CALL}", "tool_call")
    if isinstance(listed_calls, Mapping):
        listed_calls = [listed_calls]
    if not isinstance(listed_calls, list):
        raise RowError("tool_call", where, kind(listed_calls), f"a tool call {CALL}, or a list of them")
    return [_call(f"{where}[{i}]", call, notes) for i, call in enumerate(listed_calls)]


def _call(where: str, value: object, notes: Counter[str]) -> dict[str, Any]:
    call = parsed(where, value, f"a tool call {CALL}", "tool_call")
    if not isinstance(call, Mapping):
        raise RowError("tool_call", where, kind(call), f"a tool call {CALL}")
    call = _pruned(call, notes)
    function = call.get("function")
    if isinstance(function, Mapping):
        outer = {k: v for k, v in call.items() if k != "function"}
    else:  # a bare call; `function` may then be the name itself
        outer = {k: call[k] for k in ("id", "type") if k in call}
        function = {k: v for k, v in call.items() if k not in ("id", "type", "function")} | (
            {"name": function} if isinstance(function, str) else {}
        )
    if not isinstance(function.get("name"), str):
        raise RowError("tool_call", where, f"the keys {listed(function)}", f"a tool call {CALL}")
    key = "parameters" if "arguments" not in function and "parameters" in function else "arguments"
    rest = {k: v for k, v in function.items() if k not in ("name", key)}
    arguments = _arguments(function.get(key, {}), notes)
    function = {"name": function["name"], "arguments": arguments, **rest}
    return {**({"id": outer.pop("id")} if "id" in outer else {}), "type": "function", **outer, "function": function}


def _arguments(value: object, notes: Counter[str]) -> object:
    """Arguments as an object if they are one or its JSON text; any other text is kept as it is."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return {}
    try:
        loaded = json.loads(value)
    except (ValueError, RecursionError):
        loaded = None
    if isinstance(loaded, dict):
        return loaded
    notes[NOT_AN_OBJECT] += 1
    return value


def _pruned(value: Mapping[str, Any], notes: Counter[str]) -> dict[str, Any]:
    pruned = {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    if pruned != value:
        notes[NULLS] += 1
    return pruned
