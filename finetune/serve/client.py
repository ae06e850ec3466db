"""Talk to an OpenAI-compatible server through the openai client (extras `serve` and `synthetic`)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

from finetune.errors import FinetuneError, InputError
from finetune.serve.engines import KEY, is_loopback, read_key

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.chat import ChatCompletion

KEY_HOST = "FINETUNE_API_HOST"  # environment variable: the host, named by a recipe, that may get the key
RETRIES = 4  # of the client: on 408, 409, 429, 5xx and broken connections, with back-off
SECONDS = 600.0


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn; `temperature` 0 takes the most likely token."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Reply:
    """An answer: text, `finish` (stop, length, tool_calls), tokens of the prompt and of the answer (0: not stated).

    `calls`: the tool calls that the server took out of the text, as JSON values. `model`: the name that the server
    gives to what answered, empty if unknown.
    """

    text: str
    finish: str
    prompt_tokens: int = 0
    tokens: int = 0
    calls: tuple[Any, ...] = ()
    model: str = ""


class NoCompletion(FinetuneError):
    """The server answered with status 200 and something else than a chat completion."""


@dataclass(frozen=True)
class Server:
    """An address and the name of a model there."""

    url: str
    model: str
    client: OpenAI
    seconds: float = SECONDS  # after which a request is given up
    key_help: str = f"set {KEY} to the server's key"

    def ask(self, messages: Sequence[Any], sampling: Sampling, tools: Sequence[Any] | None = None) -> Reply:
        """Return the answer to a conversation. Raises FinetuneError or InputError with one sentence."""
        with sentences(self):
            made = self.client.chat.completions.create(**self._request(messages, sampling, tools))
        try:
            return _reply(made)
        except (AttributeError, LookupError, TypeError):
            words = "answered with something else than a chat completion; is it such an API?"
            raise NoCompletion(f"{self.url} {words}") from None

    def models(self) -> list[str]:
        """Return the names that the server lists; empty if it cannot. Raises NoCompletion for other values."""
        import openai

        try:
            listed = self.client.with_options(max_retries=0).models.list()
            return [str(m.id) for m in getattr(listed, "data", None) or []]
        except (
            openai.InternalServerError,
            openai.RateLimitError,
        ):  # transformers 5.23 fails if the Hub's cache is empty
            return []
        except (AttributeError, TypeError):  # the client takes a page of HTML for the list
            words = "answered with something else than a list of models; is it such an API?"
            raise NoCompletion(f"{self.url} {words}") from None

    def stream(self, messages: Sequence[Any], sampling: Sampling) -> Iterator[str]:
        """Yield the pieces of an answer as they come. Raises FinetuneError or InputError with one sentence."""
        with sentences(self):
            for chunk in self.client.chat.completions.create(**self._request(messages, sampling, None), stream=True):
                if chunk.choices and (piece := chunk.choices[0].delta.content):
                    yield piece

    def _request(self, messages: Sequence[Any], sampling: Sampling, tools: Sequence[Any] | None) -> dict[str, Any]:
        asked: dict[str, Any] = {
            "model": self.model,
            "messages": list(messages),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
        }
        return asked | ({"tools": list(tools)} if tools else {})


def _reply(made: ChatCompletion) -> Reply:
    choice, usage = made.choices[0], getattr(made, "usage", None)
    message = choice.message
    calls = tuple(call.model_dump(exclude_none=True) for call in message.tool_calls or ())
    read, written = (token_count(getattr(usage, f"{name}_tokens", 0)) for name in ("prompt", "completion"))
    finish, named = (
        str(value or "").encode(errors="replace").decode()
        for value in (choice.finish_reason, getattr(made, "model", ""))
    )
    return Reply(_text(message.content), finish, read, written, calls, named)


def _text(content: object) -> str:
    """Return the text of a message; of a list of parts the text parts. Raises TypeError or so for other values."""
    if isinstance(content, list):
        return "".join([part["text"] for part in content if part["type"] == "text"])
    if isinstance(content, str | None):
        return content or ""
    raise TypeError


def token_count(value: object) -> int:
    """Return a number of tokens; 0 for anything else, which is not stated."""
    return value if isinstance(value, int) and value > 0 else 0


def connect(
    url: str,
    model: str,
    *,
    field: str = "--server",
    typed: bool = True,
    retries: int = RETRIES,
    seconds: float = SECONDS,
) -> Server:
    """Return the server at `url` (…/v1, or its root), of which `model` will be asked.

    The key comes from FINETUNE_API_KEY, over https also from OPENAI_API_KEY: to any host if the user typed the address.
    If it is from a recipe (`typed` False), which a third party may have written, the first is sent only to this machine
    and to the host in FINETUNE_API_HOST, the second only to openai.com. OPENAI_ORG_ID and OPENAI_PROJECT_ID are sent
    only to openai.com. `field` names the option or field in errors. Raises InputError for an address that is not an
    http URL, for a key that no header can hold, and for a missing package.
    """
    parts = parsed_url(url, field)
    try:
        from openai import OpenAI
    except ImportError:
        raise InputError(f"{field} needs the openai package: pip install 'finetune-recipes[synthetic]'") from None
    root = url.rstrip("/")
    root = root if parts.path.rstrip("/") else f"{root}/v1"
    host = parts.hostname or ""
    openai_host = host == "openai.com" or host.endswith(".openai.com")
    allowed = typed or is_loopback(host) or host == os.environ.get(KEY_HOST, "").strip().lower()
    key = read_key() if allowed else ""
    if not key and parts.scheme == "https" and (typed or openai_host):
        key = read_key("OPENAI_API_KEY")
    unnamed = None if openai_host else ""  # None: the client reads OPENAI_ORG_ID and OPENAI_PROJECT_ID
    try:
        client = OpenAI(
            base_url=root,
            api_key=key or "none",
            organization=unnamed,
            project=unnamed,
            max_retries=retries,
            timeout=seconds,
        )
    except Exception:  # InvalidURL of httpx or httpx2, depending on the version of openai
        raise InputError(_no_address(url, field)) from None
    if allowed:
        return Server(root, model, client, seconds)
    return Server(root, model, client, seconds, f"set {KEY}, and {KEY_HOST}={host} to send the key to this host")


def _no_address(url: str, field: str) -> str:
    return f"{field} {url}: give the address of an OpenAI-compatible API, as http://127.0.0.1:8000/v1"


def parsed_url(url: str, field: str) -> SplitResult:
    """Return the parts of an API's address. Raises InputError if it is not an http URL, or contains a password."""
    wrong = _no_address(url, field)
    try:
        parts = urlsplit(url)
        if parts.username or parts.password:
            raise InputError(f"{field}: no password in the address; put the key into {KEY}")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise InputError(wrong)
        if parts.hostname.isascii():
            parts.hostname.encode("idna")
    except ValueError:  # a port that is no number, a bracket that is not closed, an empty or too long part of the host
        raise InputError(wrong) from None
    return parts


@contextmanager
def sentences(server: Server) -> Iterator[Server]:
    """Raise the client's errors as one sentence: InputError for what the user can set, else FinetuneError."""
    import openai

    def words(error: BaseException) -> str:
        return _words(error, server.client.api_key)

    try:
        yield server
    except openai.AuthenticationError:
        raise InputError(f"{server.url} refused the key; {server.key_help}") from None
    except openai.PermissionDeniedError as error:
        raise InputError(f"{server.url} refused: {words(error)}") from None
    except openai.NotFoundError as error:
        raise InputError(f"{server.url} has no model {server.model or 'list'}: {words(error)}") from None
    except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
        raise InputError(f"{server.url} refused the request: {words(error)}") from None
    except openai.APITimeoutError:
        raise FinetuneError(f"{server.url} did not answer within {server.seconds:g} s") from None
    except openai.APIConnectionError as error:
        raise FinetuneError(f"{server.url} cannot be reached: {words(error.__cause__ or error)}") from None
    except openai.APIError as error:  # a status that did not go away on retry, a stream that broke off
        raise FinetuneError(f"{server.url} failed: {words(error)}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise NoCompletion(f"{server.url} answered with something else than JSON: {words(error)}") from None


def _words(error: BaseException, key: str) -> str:
    from finetune.utils.secrets import redact

    text = " ".join(str(error).split())
    for form in (key, repr(key)[1:-1]) if len(key) > 4 else ():
        text = text.replace(form, "[hidden]")
    return redact(text)[:300] or type(error).__name__
