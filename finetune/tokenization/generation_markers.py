"""Generation markers for a chat template that has none, and a template without its markers.

Both are source rewrites, so nothing here is trusted: `templates.py` renders the result beside the original and takes it
only where every byte agrees.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MARKER = re.compile(r"(\s*\{%-|(?:^[ \t]+|(?<=\n)[ \t]+)?\{%)\s*(?:end)?generation\s*(-%\}\s*|%\}\n?)")
CONTENT = re.compile(r"\b(\w+)\s*(?:\[\s*['\"]content['\"]\s*\]|\.content\b)")
LOOP = re.compile(r"\{%-?\s*for\s+(\w+)\s+in\b")


def has_markers(template: str) -> bool:
    """Whether the template says which text is the assistant's."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def strip_markers(template: str) -> str:
    """The template without generation markers, for software that knows only plain Jinja."""
    return MARKER.sub("", template) if "generation" in template else template


def with_markers(template: str, control: Sequence[str]) -> list[str]:
    """Rewritten templates in which assistant text might be marked rightly, the likeliest first; none if nothing fits.

    An output such as `{{ ' ' + message['content'] + eos_token }}` is cut at its `+` signs into what the generation
    prompt already holds, the answer with its terminator (eos_token, or a literal that holds one of `control`), and the
    rest. Where the prompt ends cannot be seen in the source; the candidates differ in how many terms before the content
    belong to the answer.
    """
    pieces = list(_pieces(template))
    splits = [_split(piece, control) if piece.tokens and piece.loop else None for piece in pieces]
    deepest = max((s.content for s in splits if s), default=-1)
    found = [
        "".join(s.source(inside) if s else p.text for p, s in zip(pieces, splits, strict=True))
        for inside in range(deepest + 1)
    ]
    return list(dict.fromkeys(found))


@dataclass(frozen=True, slots=True)
class _Piece:
    text: str  # source, as it stands
    loop: str  # the variable of the last `{% for %}` before it, or ""
    tokens: tuple[tuple[str, str], ...] = ()  # (type, value) of a whole `{{ … }}`; empty for anything else


@dataclass(frozen=True, slots=True)
class _Split:
    begin: str  # "{{" or "{{-"
    end: str
    variable: str  # the loop variable that is a message
    terms: tuple[str, ...]
    content: int  # which term holds the content
    last: int  # which term ends the answer
    rest: str  # a term for what that term's literal holds after the terminator, or ""

    def source(self, inside: int) -> str:
        """The output in three parts; `inside` terms before the content count as the assistant's."""
        start = max(0, self.content - inside)
        before = "+".join(self.terms[:start]) or "''"
        answer = "{{ " + "+".join(self.terms[start : self.last + 1]) + " }}"
        after = "+".join([self.rest] * bool(self.rest) + list(self.terms[self.last + 1 :])) or "''"
        return (
            f"{self.begin} {before} }}}}{{% if {self.variable}['role'] == 'assistant' %}}{{% generation %}}{answer}"
            f"{{% endgeneration %}}{{% else %}}{answer}{{% endif %}}{{{{ {after} {self.end}"
        )


def _pieces(template: str) -> Iterator[_Piece]:
    from jinja2 import Environment

    # the settings of transformers' environment: they decide how much white space a tag swallows
    lexer = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])  # noqa: S701
    output: list[tuple[str, str]] = []
    seen, loop = "", ""
    for _, kind, value in lexer.lex(template):
        if kind == "variable_begin" or output:
            output.append((kind, value))
        else:
            yield _Piece(value, loop)
            seen = value if kind == "block_begin" else seen + value
            loop = next(iter(LOOP.findall(seen)), loop)
        if kind == "variable_end":
            yield _Piece("".join(v for _, v in output), loop, tuple(output))
            output = []


def _split(piece: _Piece, control: Sequence[str]) -> _Split | None:
    terms = _terms(piece.tokens[1:-1])
    holding = [i for i, term in enumerate(terms) if re.search(r"\bcontent\b", term)]
    if len(holding) != 1:
        return None
    content = holding[0]
    named = CONTENT.search(terms[content])
    if not named and re.search(r"\]\s*[.\[]", terms[content]):
        return None  # messages[0]['content'] and the like: not this turn's
    for last in range(content + 1, len(terms)):
        term, rest = terms[last].strip(), ""
        if term != "eos_token":
            ends = [term.rfind(c) + len(c) for c in control if c in term]
            if not ends or term[0] not in "'\"":
                continue
            term, rest = term[: max(ends)] + term[0], term[0] + term[max(ends) :]
        begin, end = piece.tokens[0][1], piece.tokens[-1][1]
        kept = (*terms[:last], term, *terms[last + 1 :])
        return _Split(begin, end, named[1] if named else piece.loop, kept, content, last, rest)
    return None


def _terms(tokens: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """The operands of a chain of `+` and `~`, or nothing where another operator binds more loosely."""
    terms, depth = [""], 0
    for kind, value in tokens:
        depth += (value in "([{") - (value in ")]}") if kind == "operator" else 0
        loose = (kind == "name" and value in {"if", "else", "and", "or", "not", "in", "is"}) or (
            kind == "operator" and value in {"==", "!=", "<", ">", "<=", ">="}
        )
        if depth == 0 and loose:
            return ()
        if depth == 0 and kind == "operator" and value in "+~":
            terms.append("")
        else:
            terms[-1] += value
    return tuple(terms)
