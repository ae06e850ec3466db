"""Ask a language model, behind a server or loaded here; every response is kept by the hash of its request."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import xxhash

from finetune.context import Context
from finetune.errors import GateRefused, InputError
from finetune.recipe import LanguageModel
from finetune.serve.client import NoCompletion, Reply, Server, connect, token_count
from finetune.serve.client import Sampling as ServerSampling
from finetune.utils import links
from finetune.utils.files import canonical_json, file_digest, read_json, replace_bytes
from finetune.utils.runtime import SMALL_PARAMETERS, in_order, single_thread

if TYPE_CHECKING:
    from finetune.eval.generation import Request

RETRIES = 6  # of the client, with back-off: on 408, 409, 429, 5xx, broken connections and time-outs
GARBLED_RETRIES, GARBLED_SECONDS = 3, 1.0  # of answers that are no chat completion
BATCH_TOKENS = 16384  # prompts and answers of a local batch
LEAST_ROOM = 16  # tokens of an answer: a local prompt that leaves fewer is not asked
CHARACTERS = 4  # of a token, where a server does not count them
AHEAD = 4  # times as many answers may wait for a slow one before them


class BudgetUsed(GateRefused):
    """generate.max_requests or max_tokens is used up."""


@dataclass(frozen=True)
class Ask:
    """A request: the conversation so far, and how the answer is drawn."""

    messages: tuple[Mapping[str, str], ...]
    limit: int  # of new tokens
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def ask_user(text: str, limit: int, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> Ask:
    """Return a request of one user message."""
    return Ask(({"role": "user", "content": text},), limit, temperature, top_p, seed)


def stream(*parts: object) -> int:
    """Return the key of a random stream (< 2^31) from what names it."""
    return xxhash.xxh3_64_intdigest("\0".join(map(str, parts)).encode("utf-8", "surrogatepass")) % 2**31


class Budget:
    """Requests and tokens spent, kept responses included, and their limits. Used by several threads."""

    def __init__(self, requests: int | None = None, tokens: int | None = None) -> None:
        self.most_requests, self.most_tokens = requests, tokens
        self.requests = self.prompt_tokens = self.tokens = 0
        self.used_up = ""  # the limit that was reached
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Count one more request; False if a limit is reached."""
        with self._lock:
            if self.most_requests is not None and self.requests >= self.most_requests:
                self.used_up = f"max_requests {self.most_requests:,}"
            elif self.most_tokens is not None and self.prompt_tokens + self.tokens >= self.most_tokens:
                self.used_up = f"max_tokens {self.most_tokens:,}"
            else:
                self.requests += 1
                return True
            return False

    def spend(self, reply: Reply) -> None:
        """Count the tokens of a response."""
        with self._lock:
            self.prompt_tokens += reply.prompt_tokens
            self.tokens += reply.tokens


class Kept:
    """Responses on disk, a file each, named by the hash of the request. Other processes may use it at the same time."""

    def __init__(self, ctx: Context) -> None:
        self._root = ctx.artifacts or ctx.scratch
        self._folder = self._root / "responses"
        self._folder.mkdir(parents=True, exist_ok=True)
        links.require_inside(self._folder, self._root)

    def path(self, request: str) -> Path:
        """Return the file of a request's response."""
        return self._folder / request[:2] / f"{request}.json"

    def get(self, request: str) -> Reply | None:
        """Return the response, or None if there is none that can be read."""
        try:
            reply = Reply(**{**read_json(self.path(request)), "calls": ()})
            reply = replace(reply, prompt_tokens=token_count(reply.prompt_tokens), tokens=token_count(reply.tokens))
        except (OSError, ValueError, TypeError):
            return None
        return reply if isinstance(reply.text, str) and isinstance(reply.finish, str) else None

    def put(self, request: str, reply: Reply) -> None:
        """Keep a response: synced and moved into place."""
        path = self.path(request)
        path.parent.mkdir(exist_ok=True)
        value = {name: v for name, v in asdict(reply).items() if name != "calls"}
        replace_bytes(path, (canonical_json(value) + "\n").encode("utf-8", "backslashreplace"))


Keep = Callable[[int, Reply], None]


class Source(Protocol):
    """A model that answers requests."""

    def answer(self, asks: Sequence[Ask], budget: Budget, keep: Keep) -> Iterator[int]:
        """Pass index and response to `keep` as soon as it is there, from any thread; yield the index.

        A request that gets no budget is left out.
        """


class Asker:
    """A model with its kept responses and its budget."""

    def __init__(self, source: Source, identity: Mapping[str, object], budget: Budget, ctx: Context) -> None:
        self.budget, self.answered_by, self.kept = budget, Counter[str](), 0
        self._source, self._identity, self._ctx, self._store = source, identity, ctx, Kept(ctx)
        self._tokens, self.seconds = 0, 0.0  # of new responses

    def ask_all(self, asks: Sequence[Ask], label: str) -> list[Reply | None]:
        """Return the response to each request, kept or new; None if the budget was used up.

        Raises FinetuneError or InputError for a model that cannot be asked; the responses before it are kept.
        """
        replies: dict[int, Reply] = {}
        names, todo = [self._name(ask) for ask in asks], []
        for index, name in enumerate(names):
            if (reply := self._store.get(name)) is None:
                todo.append(index)
            elif self.budget.take():
                self.budget.spend(reply)
                replies[index] = reply
        self.kept += len(replies)

        def keep(position: int, reply: Reply) -> None:
            self._store.put(names[todo[position]], reply)
            self.budget.spend(reply)
            replies[todo[position]] = reply

        begun, before = time.monotonic(), self.seconds
        bar = self._ctx.bar(label, len(todo))
        try:
            for position in self._source.answer([asks[i] for i in todo], self.budget, keep) if todo else ():
                self._tokens += replies[todo[position]].tokens
                self.seconds = before + time.monotonic() - begun
                bar.advance(1, f"{self._tokens / max(self.seconds, 1e-9):,.0f} tokens/s")
                self._ctx.stop.check()
        finally:
            bar.close()
        self.answered_by.update(reply.model for reply in replies.values() if reply.model)
        return [replies.get(i) for i in range(len(asks))]

    @property
    def tokens_per_second(self) -> float | None:
        """Generated tokens per second; None if no model was asked."""
        return round(self._tokens / self.seconds, 1) if self._tokens else None

    def _name(self, ask: Ask) -> str:
        content = canonical_json({"model": dict(self._identity), **asdict(ask)})
        return xxhash.xxh3_128_hexdigest(content.encode("utf-8", "surrogatepass"))


class ServerSource:
    """An OpenAI-compatible server, asked by several threads."""

    def __init__(self, model: LanguageModel, field: str) -> None:
        self._server = server_of(model, field)
        self._threads = model.concurrency

    def answer(self, asks: Sequence[Ask], budget: Budget, keep: Keep) -> Iterator[int]:
        """As in Source; the indices come in order."""

        def ask(numbered: tuple[int, Ask]) -> int | None:
            if not budget.take():
                return None
            keep(numbered[0], self._ask(numbered[1]))
            return numbered[0]

        positions = in_order(ask, enumerate(asks), self._threads, AHEAD * self._threads)
        try:
            yield from (position for position in positions if position is not None)
        finally:
            positions.close()

    def _ask(self, ask: Ask) -> Reply:
        sampling = ServerSampling(ask.limit, ask.temperature, ask.top_p, ask.seed)
        for attempt in range(GARBLED_RETRIES + 1):
            try:
                reply = self._server.ask(ask.messages, sampling)
            except NoCompletion:
                if attempt == GARBLED_RETRIES:
                    raise
                time.sleep(GARBLED_SECONDS * 2**attempt)
            else:
                break
        if reply.tokens or not reply.text:
            return reply
        asked = sum(len(m["content"]) for m in ask.messages)  # this server counts no tokens
        return replace(reply, prompt_tokens=asked // CHARACTERS, tokens=max(1, len(reply.text) // CHARACTERS))


class LocalSource:
    """A model of this machine, asked in batches; it is loaded at the first request."""

    def __init__(self, folder: Callable[[], Path], ctx: Context) -> None:
        self._folder, self._ctx = folder, ctx
        self._opened = contextlib.ExitStack()
        self._voice: Any = None  # eval.voice.Voice

    def answer(self, asks: Sequence[Ask], budget: Budget, keep: Keep) -> Iterator[int]:
        """As in Source; short requests come first."""
        from finetune.eval import generation, voice

        if self._voice is None:
            self._voice = self._opened.enter_context(voice.folder_voice(self._folder(), self._ctx, self._ctx.device))
            if self._voice.model.num_parameters() < SMALL_PARAMETERS:
                self._opened.enter_context(single_thread())
        model = self._voice
        groups: dict[tuple[float, float], list[tuple[int, generation.Request]]] = {}
        for position, ask in enumerate(asks):
            if not budget.take():
                break
            request = self._request(ask)
            if isinstance(request, str):
                keep(position, Reply("", request))
                yield position
            else:
                groups.setdefault((ask.temperature, ask.top_p), []).append((position, request))
        for drawn, group in groups.items():
            requests, sampling = [r for _, r in group], generation.Sampling(*drawn)
            made = generation.answer(
                model.model, requests, sampling, model.terminators, model.pad_id, self._ctx, BATCH_TOKENS
            )
            for batch in made:
                for i, generated in sorted(batch.items()):
                    text = model.tokenizer.decode(generated.ids, skip_special_tokens=True)
                    keep(group[i][0], Reply(text, generated.finish, len(requests[i].prompt), len(generated.ids)))
                    yield group[i][0]

    def _request(self, ask: Ask) -> Request | str:
        from finetune.eval.generation import Request
        from finetune.eval.voice import prompt_ids

        try:
            ids = prompt_ids(self._voice, [dict(m) for m in ask.messages])
        except InputError:
            return "template"  # it refuses these turns
        room = ask.limit if self._voice.positions is None else self._voice.positions - len(ids)
        return "too_long" if room < LEAST_ROOM else Request(ids, min(ask.limit, room), ask.seed)

    def close(self) -> None:
        """Free the model."""
        self._voice = None
        self._opened.close()


@contextlib.contextmanager
def open_asker(model: LanguageModel, base: Path, budget: Budget, ctx: Context, field: str) -> Iterator[Asker]:
    """Within this block a model that can be asked.

    Args:
        model: which.
        base: the folder of the base stage; only a builtin model is read from it.
        budget: what it may be asked.
        ctx: for progress, signals and the folder of kept responses.
        field: its place in the recipe, for errors.
    """
    if model.local is None:
        source = ServerSource(model, field)
        yield Asker(source, identity(model, base), budget, ctx)
        return
    local = LocalSource(lambda: local_folder(model, base, ctx), ctx)
    try:
        yield Asker(local, identity(model, base), budget, ctx)
    finally:
        local.close()
        free_gpu()


def server_of(model: LanguageModel, field: str) -> Server:
    """Return the client of the model's endpoint. Raises InputError for a bad address or a missing package."""
    assert model.endpoint is not None and model.name is not None  # noqa: S101 - validated
    return connect(model.endpoint, model.name, field=field, typed=False, retries=RETRIES, seconds=model.timeout_seconds)


def identity(model: LanguageModel, base: Path | None = None) -> dict[str, object]:
    """Return the identity of this model: address and name, a commit, or the digests of its files.

    A builtin is identified by the weights in `base`; without it, by its name only.
    """
    local = model.local
    if local is None:
        return {"endpoint": model.endpoint, "name": model.name}
    if local.folder is not None:
        from finetune.models import loading

        names = [*loading.MODEL_FILES, *loading.TOKENIZER_FILES, *loading.more_templates(local.folder), "template.json"]
        small = [*(local.folder / n for n in names), *local.folder.glob("template/*.jinja")]
        named = {p for p in (*small, *loading.weight_files(local.folder)) if p.is_file()}
        return {"files": {p.relative_to(local.folder).as_posix(): file_digest(p) for p in sorted(named)}}
    if local.kind == "hub":
        from finetune.hub.client import resolve_revision

        return {"id": local.id, "revision": resolve_revision(local.id, local.revision)}
    return {"id": local.id, **({"weights": file_digest(base / "model.safetensors")} if base else {})}


def local_folder(model: LanguageModel, base: Path, ctx: Context) -> Path:
    """Return the folder of a local model, after its download."""
    from finetune.models.loading import hub_snapshot

    local = model.local
    assert local is not None  # noqa: S101 - the caller asked
    if local.kind == "hub":
        return hub_snapshot(local, str(identity(model)["revision"]), ctx, weights=True)
    return local.folder or base


def free_gpu() -> None:
    """Return the memory of models that no variable holds any more to the GPU."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
