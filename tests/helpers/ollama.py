"""What Ollama reads from a Modelfile: its parser's states and its template's actions, as far as ours uses them.

After https://github.com/ollama/ollama at fb30760996871fa9460115c753afd2c60d4ab0f7, parser/parser.go (ParseFile,
unquote) and template/template.go (Values, Execute).
"""

from __future__ import annotations

import re

COMMANDS = {
    "from", "license", "template", "system", "adapter", "draft", "renderer", "parser", "parameter", "message",
    "requires",
}  # fmt: skip


def parse(text: str) -> list[tuple[str, str]]:
    """The commands of a Modelfile, (name, arguments). Raises ValueError as ParseFile fails."""
    found, at = [], 0
    while at < len(text):
        if text[at] in " \t\r\n":
            at += 1
        elif text[at] == "#":
            at = (text + "\n").index("\n", at)
        else:
            name, at = _word(text, at, r"[A-Za-z]")
            if name.lower() not in COMMANDS:
                raise ValueError(f"command {name!r}")
            if name.lower() == "parameter":
                name, at = _word(text, at, r"[A-Za-z0-9_]")
            value, at = _value(text, at)
            found.append((name.lower(), value))
    if not any(name == "from" for name, _ in found):
        raise ValueError("no FROM line")
    return found


def _word(text: str, at: int, allowed: str) -> tuple[str, int]:
    end = at
    while end < len(text) and re.match(allowed, text[end]):
        end += 1
    if end == at or end == len(text) or text[end] not in " \t":
        raise ValueError(f"a word at {text[at : at + 20]!r}")
    return text[at:end], end + 1


def _value(text: str, at: int) -> tuple[str, int]:
    """A value ends at a line end at which its quotes are closed; Go's unprintable characters are dropped on the way."""
    kept = ""
    for i, c in enumerate(text[at:], at):
        if c in "\r\n" and (value := _unquoted(kept.strip())) is not None:
            return value, i + 1
        if c in "\r\n\t" or c.isprintable():
            kept += c
    value = _unquoted(kept.strip())
    if value is None:
        raise ValueError("unexpected end of file")
    return value, len(text)


def _unquoted(value: str) -> str | None:
    for quote in ('"""', '"'):
        if value.startswith(quote):
            return value[len(quote) : -len(quote)] if len(value) >= 2 * len(quote) and value.endswith(quote) else None
    return value


def execute(template: str, chat: list[dict[str, str]]) -> str:
    """Render a Go template for `chat`; a system message is also `.System`, as Ollama collates it."""
    nodes = iter(re.split(r"(\{\{.*?\}\})", template, flags=re.DOTALL))
    body, end = _block(nodes)
    assert end == ""
    system = "\n\n".join(m["content"] for m in chat if m["role"] == "system")
    scope = {"$.System": system, ".System": system, ".Messages": chat, "$.Messages": chat}
    return _run(body, scope)


def _block(nodes):
    body = []
    for node in nodes:
        if not node.startswith("{{"):
            body.append(("text", node))
            continue
        action = node[2:-2].strip()
        if action == "end" or action.startswith("else"):
            return body, action
        if action.startswith(("if ", "range ")):
            inner, end = _block(nodes)
            branches = [(action, inner)]
            while end.startswith("else"):
                condition = end.removeprefix("else").strip() or "if true"
                inner, end = _block(nodes)
                branches.append((condition, inner))
            assert end == "end"
            body.append(("branches", branches))
        else:
            body.append(("action", action))
    return body, ""


def _run(body, scope) -> str:
    text = ""
    for kind, content in body:
        if kind == "text":
            text += content
        elif kind == "action":
            assigned = re.fullmatch(r"(\$\w+) :?= (true|false)", content)
            if assigned:
                scope[assigned[1]] = assigned[2] == "true"
            else:
                text += _value_of(content, scope)
        elif content[0][0] == "range $index, $_ := .Messages":
            for index, message in enumerate(scope[".Messages"]):
                scope |= {"$index": index, ".Role": message["role"], ".Content": message["content"]}
                text += _run(content[0][1], scope)
        else:
            text += next((_run(inner, scope) for condition, inner in content if _holds(condition, scope)), "")
    return text


def _value_of(action: str, scope) -> str:
    if action.startswith('"'):
        assert action.endswith('"') and not re.search(r'(?<!\\)"', action[1:-1])
        return re.sub(r"\\(u[0-9a-f]{4}|U[0-9a-f]{8}|n|t)", _unescaped, action[1:-1])
    return scope[action]


def _unescaped(match) -> str:
    return {"n": "\n", "t": "\t"}.get(match[1]) or chr(int(match[1][1:], 16))


def _holds(condition: str, scope) -> bool:
    words = condition.removeprefix("if ")
    if role := re.fullmatch(r'eq \.Role "(\w+)"', words):
        return scope[".Role"] == role[1]
    if words == "and $.System (eq (len (slice $.Messages $index)) 1)":
        return bool(scope["$.System"]) and len(scope["$.Messages"][scope["$index"] :]) == 1
    if words.startswith("not "):
        return not scope[words.removeprefix("not ")]
    return words == "true" or bool(scope[words])
