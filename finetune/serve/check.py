"""Compare a server's prompts and answers with the ones of this package.

The expected ids come from the renderer that training used, the expected answers from the model loaded here; neither
shares code with the engine.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.serve.client import Sampling, Server
from finetune.serve.engines import is_loopback
from finetune.serve.process import DIRECT

TOKENS = 48  # longest answer that is compared
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Return the weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
QUESTION = {"role": "user", "content": "What is the capital of France?"}
SYSTEM = {"role": "system", "content": "Answer in one sentence."}
CHATS: tuple[tuple[str, list[dict[str, Any]], list[Any] | None], ...] = (
    ("one turn", [QUESTION], None),
    ("system turn", [SYSTEM, QUESTION], None),
    (
        "three turns",
        [QUESTION, {"role": "assistant", "content": "Paris."}, {"role": "user", "content": "And of Italy?\n"}],
        None,
    ),
    ("tools", [{"role": "user", "content": "How warm is it in Oslo?"}], [WEATHER]),
)


@dataclass(frozen=True)
class Expected:
    """Expected values of a conversation: prompt ids and text, greedy answer, whether it ends by itself."""

    ids: list[int]
    text: str
    answer: str
    first: str
    stops: bool


@dataclass(frozen=True)
class Result:
    """One comparison: `ids`, `text` and `stop` are "equal", "not shown" or a sentence about the difference."""

    name: str
    ids: str
    answer: str
    stop: str

    @property
    def passed(self) -> bool:
        """Whether nothing differs."""
        return all(v in (EQUAL, NOT_SHOWN, FIRST) for v in (self.ids, self.answer, self.stop))


EQUAL, NOT_SHOWN, FIRST = "equal", "not shown", "first token equal"


def compare(
    server: Server, expect: Callable[[list[dict[str, Any]], list[Any] | None], Expected | None], *, exact: bool
) -> list[Result]:
    """Ask every conversation of CHATS; one for which `expect` returns None is left out (the template refuses it).

    Args:
        server: the server and the model there.
        expect: maps messages and tools to what this package makes of them.
        exact: the engine computes what this package computes (same type, same kernels), so whole answers are compared;
            otherwise the first token is, because rounding may change a later one.
    """
    results = []
    for name, chat, tools in CHATS:
        expected = expect(chat, tools)
        if expected is None:
            continue
        reply = server.ask(chat, Sampling(TOKENS), tools)
        if exact:
            answer = _same(expected.answer, reply.text)
        else:
            first = server.ask(chat, Sampling(1), tools).text
            answer = FIRST if first.strip() == expected.first.strip() else _same(expected.first, first)
        wanted = "stop" if expected.stops else "length"
        same_end = reply.finish == wanted or reply.finish == "tool_calls" or not exact
        stop = EQUAL if same_end else f"expected {wanted}, the server ended with {reply.finish}"
        results.append(Result(name, _ids(server, chat, tools, expected, reply.prompt_tokens), answer, stop))
    return results


def _ids(server: Server, chat: Sequence[Any], tools: Sequence[Any] | None, expected: Expected, counted: int) -> str:
    """Compare prompt ids: by vLLM's /tokenize, llama-server's /apply-template, else the number of prompt tokens."""
    root = server.url.removesuffix("/v1")
    asked: dict[str, Any] = {"model": server.model, "messages": list(chat), "add_generation_prompt": True}
    asked |= {"tools": list(tools)} if tools else {}
    answer = _post(f"{root}/tokenize", asked, server)
    if isinstance(answer, dict) and isinstance(answer.get("tokens"), list) and answer["tokens"]:
        theirs = answer["tokens"]
        return EQUAL if theirs == expected.ids else _first_difference("token", expected.ids, theirs, 4)
    answer = _post(f"{root}/apply-template", {k: v for k, v in asked.items() if k in ("messages", "tools")}, server)
    if isinstance(answer, dict) and isinstance(answer.get("prompt"), str):
        return EQUAL if _ends(expected.text, answer["prompt"]) else _same(expected.text, answer["prompt"])
    if not counted:
        return NOT_SHOWN
    return EQUAL if counted == len(expected.ids) else f"expected {len(expected.ids)} prompt tokens, found {counted}"


def _ends(ours: str, theirs: str) -> bool:
    """Whether two prompts are equal but for the first token's text, which llama-server adds when it tokenizes."""
    return ours == theirs or (ours.endswith(theirs) and len(ours) - len(theirs) < 32 and ours.startswith("<"))


def _post(address: str, body: object, server: Server) -> object:
    data = json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {server.client.api_key}"}
    try:
        request = urllib.request.Request(address, data, headers)  # noqa: S310 - http(s), checked by connect()
        opened = DIRECT.open if is_loopback(request.host.partition(":")[0]) else urllib.request.urlopen
        with opened(request, timeout=60) as reply:
            return json.loads(reply.read(50_000_000))
    except (OSError, ValueError):  # no such endpoint
        return None


def _same(ours: str, theirs: str) -> str:
    return EQUAL if ours.strip() == theirs.strip() else _first_difference("character", ours, theirs, 30)


def _first_difference(what: str, ours: Sequence[Any], theirs: Sequence[Any], most: int) -> str:
    pairs = enumerate(zip(ours, theirs, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    return f"differs at {what} {at}: expected {ours[at : at + most]!r}, found {theirs[at : at + most]!r}"
