"""Talk to an OpenAI-compatible server through the openai client (extra `serve`)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from finetune.errors import FinetuneError, InputError
from finetune.serve.engines import KEY

if TYPE_CHECKING:
    from openai import OpenAI

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

    `calls`: the tool calls that the server took out of the text, as JSON values.
    """

    text: str
    finish: str
    prompt_tokens: int = 0
    tokens: int = 0
    calls: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Server:
    """An address and the name of a model there."""

    url: str
    model: str
    client: OpenAI

    def ask(self, messages: Sequence[Any], sampling: Sampling, tools: Sequence[Any] | None = None) -> Reply:
        """Return the answer to a conversation. Raises FinetuneError or InputError with one sentence."""
        with sentences(self):
            made = self.client.chat.completions.create(**self._request(messages, sampling, tools))
        choices = getattr(made, "choices", None)
        if not choices:
            raise FinetuneError(f"{self.url} answered with something else than a chat completion; is it such an API?")
        message, usage = choices[0].message, made.usage
        read, written = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
        calls = tuple(call.model_dump(exclude_none=True) for call in message.tool_calls or ())
        return Reply(message.content or "", choices[0].finish_reason or "", read, written, calls)

    def models(self) -> list[str]:
        """Return the names that the server lists; empty if it cannot list them."""
        import openai

        try:
            return [m.id for m in self.client.with_options(max_retries=0).models.list().data]
        except openai.InternalServerError:  # transformers 5.23 lists the Hub's cache, and fails if there is none
            return []

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


def connect(url: str, model: str) -> Server:
    """Return the server at `url` (…/v1, or its root), of which `model` will be asked.

    The key comes from FINETUNE_API_KEY, over https also from OPENAI_API_KEY. Raises InputError for an address that is
    no http URL, and for a missing package.
    """
    wrong = f"--server {url}: give the address of an OpenAI-compatible API, as http://127.0.0.1:8000/v1"
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise InputError(wrong)
    except ValueError:  # a port that is no number, a bracket that is not closed
        raise InputError(wrong) from None
    if parts.username or parts.password:
        raise InputError(f"--server: no password in the address; put the key into {KEY}")
    try:
        from openai import OpenAI
    except ImportError:
        raise InputError("--server needs the openai package: pip install 'finetune-recipes[serve]'") from None
    root = url.rstrip("/")
    root = root if parts.path.rstrip("/") else f"{root}/v1"
    key = os.environ.get(KEY) or (os.environ.get("OPENAI_API_KEY") if parts.scheme == "https" else None) or "none"
    return Server(root, model, OpenAI(base_url=root, api_key=key, max_retries=RETRIES, timeout=SECONDS))


@contextmanager
def sentences(server: Server) -> Iterator[Server]:
    """Raise the client's errors as one sentence: InputError for what the user can set, else FinetuneError."""
    import openai

    try:
        yield server
    except openai.AuthenticationError:
        raise InputError(f"{server.url} refused the key; set {KEY} to the server's key") from None
    except openai.PermissionDeniedError as error:
        raise InputError(f"{server.url} refused: {_words(error)}") from None
    except openai.NotFoundError as error:
        raise InputError(f"{server.url} has no model {server.model or 'list'}: {_words(error)}") from None
    except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
        raise InputError(f"{server.url} refused the request: {_words(error)}") from None
    except openai.APITimeoutError:
        raise FinetuneError(f"{server.url} did not answer within {SECONDS:.0f} s") from None
    except openai.APIConnectionError as error:
        raise FinetuneError(f"{server.url} cannot be reached: {_words(error.__cause__ or error)}") from None
    except openai.APIError as error:  # a status that did not go away on retry, a stream that broke off
        raise FinetuneError(f"{server.url} failed: {_words(error)}") from None


def _words(error: BaseException) -> str:
    from finetune.utils.secrets import redact

    return redact(" ".join(str(error).split()))[:300] or type(error).__name__
