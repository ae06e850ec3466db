"""An Ollama Modelfile that writes conversations as the model's own chat template does.

Ollama's templates are Go's text/template (https://docs.ollama.com/template). Ours is read off the Jinja template: it
is rendered for a few conversations, the text between the messages is taken, and the whole is tried on a longer one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from posixpath import commonprefix

Chat = list[dict[str, str]]
Render = Callable[[Chat, bool], str]  # (messages, add_generation_prompt) -> text; raises ValueError where it refuses
SYSTEM, USER, ANSWER = "Sys7text", "Ask7text", "Reply7text"


@dataclass(frozen=True, slots=True)
class Pieces:
    """The text around the messages."""

    opening: str  # before the first user message when there is no system message
    system: tuple[str, str] | None  # before the system message, and from it to the first user message
    between: str  # before each later user message
    prompt: str  # after a user message
    lead: str  # before an answer, which the model writes itself
    end: str  # after an answer
    system_last: bool = False  # the system message stands in the last user message, not before the first

    def text(self, chat: Chat) -> str:
        """Return Ollama's rendering of `chat`, whose last message is a user's."""
        system = next((m["content"] for m in chat if m["role"] == "system"), None)
        given = None if system is None or self.system is None else self.system
        text = self.opening if given is None or self.system_last else given[0] + str(system) + given[1]
        first = True
        for number, message in enumerate(chat):
            if message["role"] == "user":
                inside = given is not None and self.system_last and number == len(chat) - 1
                text += ("" if first else self.between) + (f"{system}{given[1]}" if inside and given else "")
                text += message["content"] + self.prompt
                first = False
            elif message["role"] == "assistant":
                text += self.lead + message["content"] + self.end
        return text


def read_pieces(render: Render) -> Pieces | None:
    """The pieces of a Jinja template; None if it is not a plain sequence of turns."""
    user, answer = {"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}
    system = {"role": "system", "content": SYSTEM}
    try:
        opening, prompt = render([user], True).split(USER)
        _, reply, after = render([user, answer, user], True).split(USER)
        lead, rest = reply.removeprefix(prompt).split(ANSWER)
        # some templates close the whole conversation too; what they write after every answer is what both share
        end = commonprefix([rest, render([user, answer], False).split(ANSWER)[1]])
        if not reply.startswith(prompt) or after != prompt:
            return None
    except ValueError:
        return None
    try:
        head, behind = render([system, user], True).split(SYSTEM)
        around = (head, behind.split(USER)[0])
    except ValueError:
        around = None
    first = Pieces(opening, around, rest.removeprefix(end), prompt, lead, end)
    turns = [{"role": r, "content": f"{r} {n}\nline"} for n in range(3) for r in ("user", "assistant")][:-1]
    chats: list[Chat] = [turns[:1], turns] if around is None else [turns[:1], turns, [system, *turns]]
    tried = [first] + ([replace(first, system_last=True)] if around and around[0] == opening else [])
    return next((p for p in tried if all(p.text(chat) == render(chat, True) for chat in chats)), None)


def modelfile(weights: str, pieces: Pieces | None, stops: Sequence[str], bos: str | None) -> str:
    """The Modelfile for the GGUF `weights` beside it.

    `bos` is the token that Ollama puts in front by itself (None if it does not). Without `pieces` the template is
    left to Ollama, which looks for one it knows in the GGUF.
    """
    lines = [f"FROM ./{weights}"]
    if pieces is None:
        lines.append("# the chat template in the GGUF has no plain form; Ollama takes the one it knows that is nearest")
    else:
        lines.append(f'TEMPLATE """{_go(pieces, bos or "")}"""')
    # Ollama's parser reads no escapes and drops what Go calls unprintable (parser/parser.go: unquote, IsPrint)
    lines += [f'PARAMETER stop """{stop}"""' if '"' in stop else f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join(lines) + "\n"


def _go(pieces: Pieces, bos: str) -> str:
    opening, inside = _literal(pieces.opening.removeprefix(bos)), ""
    if pieces.system is not None and pieces.system_last:
        after = _literal(pieces.system[1])
        inside = (
            f"{{{{ if and $.System (eq (len (slice $.Messages $index)) 1) }}}}{{{{ $.System }}}}{after}{{{{ end }}}}"
        )
    elif pieces.system is not None:
        before, after = pieces.system
        opening = (
            f"{{{{ if .System }}}}{_literal(before.removeprefix(bos))}{{{{ .System }}}}{_literal(after)}"
            f"{{{{ else }}}}{opening}{{{{ end }}}}"
        )
    return (
        f"{opening}{{{{ $first := true }}}}{{{{ range $index, $_ := .Messages }}}}"
        f'{{{{ if eq .Role "user" }}}}{{{{ if not $first }}}}{_literal(pieces.between)}{{{{ end }}}}'
        f"{inside}{{{{ .Content }}}}{_literal(pieces.prompt)}{{{{ $first = false }}}}"
        f'{{{{ else if eq .Role "assistant" }}}}{_literal(pieces.lead)}{{{{ .Content }}}}{_literal(pieces.end)}'
        "{{ end }}{{ end }}"
    )


def _literal(text: str) -> str:
    """`text` as a Go string in an action, so that no space or line end of it is lost.

    Quotes are escaped, since three in a row end the TEMPLATE; so are unprintable characters, which Ollama drops.
    """
    if not text:
        return ""
    inner = "".join(c if c.isprintable() and c not in '"\\' else _escaped(c) for c in text)
    return f'{{{{ "{inner}" }}}}'


def _escaped(character: str) -> str:
    code = ord(character)
    return {"\n": "\\n", "\t": "\\t"}.get(character, f"\\u{code:04x}" if code < 1 << 16 else f"\\U{code:08x}")
