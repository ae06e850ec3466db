"""`finetune generate`: answer every row of a file; a stopped run continues where it was."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from finetune.cli.session import make_context, signals_handled
from finetune.cli.voice import Voice, open_voice, prompt_ids
from finetune.context import Context
from finetune.errors import InputError, not_written
from finetune.eval.prompts import PromptRow, read_prompts
from finetune.pipeline.store import Store
from finetune.recipe import Recipe
from finetune.serve import client as served
from finetune.serve.client import Reply, Server, connect
from finetune.utils.console import Screen
from finetune.utils.files import canonical_json, replace_bytes
from finetune.utils.runtime import in_order

SERVER_REQUESTS = 8  # at once
AHEAD = 4  # times as many answers may wait for a slow one before them


@dataclass(frozen=True)
class Options:
    """Generation options: `temperature` 0 is greedy, `n` answers per prompt; `batch_tokens` changes no answer."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    n: int = 1
    system: str | None = None
    batch_tokens: int = 16384
    server: str | None = None


@dataclass(frozen=True)
class Task:
    """One requested answer: the row and the index among its `n` answers."""

    row: PromptRow
    sample: int
    ids: list[int]

    @property
    def id(self) -> str:
        """The id of the output line."""
        return f"{self.row.id}-{self.sample}"


def generate(name: str, source: Path, target: Path, options: Options, artifacts: Path, scratch: Path) -> None:
    """Answer every row of `source` into `target`, a JSON object a line, in the order of the input.

    A line is {"id", "row", "sample", "messages", "tools", "answer", "finish", "tokens", "made_by"}; `finish` is "stop"
    or "length", `made_by` a digest of the model and the options. Each batch is appended and synced. Raises InputError
    for a row that cannot be asked, and for a `target` that holds answers to other rows, of another model or options.
    """
    if options.n > 1 and options.temperature == 0:
        raise InputError(f"--n {options.n}: at temperature 0 all answers are the same; give --temperature, or --n 1")
    if source.resolve() == target.resolve():
        raise InputError(f"--output {target} is the input itself; name another file")
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise InputError(f"--output {target}: {'it is a folder' if target.is_dir() else 'its folder does not exist'}")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as in cli/run.py
    rows = read_prompts(source, options.system)
    screen, store = Screen(), Store(artifacts, scratch)
    with ExitStack() as stack:
        server = connect(options.server, name) if options.server else None
        voice = None if server else stack.enter_context(open_voice(name, artifacts, scratch, screen))
        stop = stack.enter_context(signals_handled(screen))
        made_by = digest_of(voice, options, name)
        tasks = _tasks(voice, rows, options, source)
        done = read_output(target, {t.id for t in tasks}, made_by)
        left = [t for t in tasks if t.id not in done]
        if done:
            screen.say(f"{len(done)} of {len(tasks)} answers are in {target}; going on")
        recipe = Recipe.model_validate(
            {"name": "generate", "model": "builtin:tiny-mistral", "data": [{"source": "pydoc"}]}
        )
        ctx = make_context(recipe, store, screen, stop, "generate", 0, 1)
        if server is not None:
            answers = _answered_there(server, left, options, ctx)
        else:
            assert voice is not None  # noqa: S101 - one of both answers
            answers = _answered_here(voice, left, options, ctx)
        with closing(answers):
            _write_all(answers, len(left), made_by, target, ctx)
    order = {t.id: position for position, t in enumerate(tasks)}
    lines = sorted(_read_lines(target), key=lambda line: order[line["id"]])
    replace_bytes(target, "".join(canonical_json(line) + "\n" for line in lines).encode())
    print(target)  # noqa: T201 - the command's result


def digest_of(voice: Voice | None, options: Options, name: str = "") -> str:
    """Digest of what decides an answer beside its row: the model's files and the options but for the batch.

    Of a model behind a server (no `voice`) only the address and the model's name there are known.
    """
    asked = {k: v for k, v in asdict(options).items() if k not in ("batch_tokens", "n", "system", "server")}
    model = {"server": options.server, "model": name}
    if voice is not None:
        model = {"model": voice.identity, "template": voice.template}
    content = {**model, **asked}
    return xxhash.xxh3_64_hexdigest(canonical_json(content).encode())


def _tasks(voice: Voice | None, rows: Sequence[PromptRow], options: Options, source: Path) -> list[Task]:
    """Every row as token ids. Raises InputError for the first row that the template or the model's length refuses."""
    tasks: list[Task] = []
    for row in rows:
        if voice is None:  # the server renders
            tasks += [Task(row, sample, []) for sample in range(options.n)]
            continue
        try:
            ids = prompt_ids(voice, row.messages, row.tools)
        except InputError as error:
            raise InputError(f"{source}, row {row.number + 1}: {error}") from None
        if voice.positions is not None and len(ids) >= voice.positions:
            raise InputError(
                f"{source}, row {row.number + 1}: its prompt has {len(ids)} tokens, this model reads "
                f"{voice.positions}; shorten or remove the row"
            )
        tasks += [Task(row, sample, ids) for sample in range(options.n)]
    return tasks


Answers = Generator[list[tuple[Task, Reply]], None, None]


def _answered_here(voice: Voice, tasks: Sequence[Task], options: Options, ctx: Context) -> Answers:
    """Yield the answers of the model loaded here, a batch at a time."""
    from finetune.eval.generation import Request, Sampling, answer

    limits = [options.max_new_tokens if voice.positions is None else voice.positions - len(t.ids) for t in tasks]
    requests = [
        Request(t.ids, min(options.max_new_tokens, limit), _stream(t.id, options.seed))
        for t, limit in zip(tasks, limits, strict=True)
    ]
    sampling = Sampling(options.temperature, options.top_p)
    for batch in answer(voice.model, requests, sampling, voice.terminators, voice.pad_id, ctx, options.batch_tokens):
        texts = {i: voice.tokenizer.decode(made.ids, skip_special_tokens=True) for i, made in batch.items()}
        yield [(tasks[i], Reply(texts[i], made.finish, tokens=len(made.ids))) for i, made in sorted(batch.items())]


def _answered_there(server: Server, tasks: Sequence[Task], options: Options, ctx: Context) -> Answers:
    """Yield the answers of a server in the order of `tasks`; `SERVER_REQUESTS` are asked for at once.

    Raises the first error of a request, after the answers to those before it.
    """

    def ask(task: Task) -> Reply:
        seed = _stream(task.id, options.seed) % 2**31
        sampling = served.Sampling(options.max_new_tokens, options.temperature, options.top_p, seed)
        return server.ask(task.row.messages, sampling, task.row.tools)

    replies = in_order(ask, tasks, SERVER_REQUESTS, AHEAD * SERVER_REQUESTS)
    try:
        for task, reply in zip(tasks, replies, strict=True):
            ctx.stop.check()
            yield [(task, reply)]
    finally:
        replies.close()


def _write_all(answers: Answers, count: int, made_by: str, target: Path, ctx: Context) -> None:
    """Append each batch of answers to `target`, and report the speed."""
    bar, start, tokens = ctx.bar("generate", count), time.monotonic(), 0
    append(target, [])  # the file exists even if there is nothing to answer
    try:
        for batch in answers:
            append(target, [_line(task, reply, made_by) for task, reply in batch])
            tokens += sum(reply.tokens for _, reply in batch)
            bar.advance(len(batch), f"{tokens / max(time.monotonic() - start, 1e-9):,.0f} tokens/s")
    finally:
        bar.close()
    seconds = max(time.monotonic() - start, 1e-9)
    if count:
        ctx.say(f"{count} answers, {tokens:,} tokens in {seconds:.1f} s: {tokens / seconds:,.0f} tokens/s")


def _stream(task: str, seed: int) -> int:
    """Return the key of an answer's random stream, from the row's id, the sample's index and the seed only."""
    return int.from_bytes(xxhash.xxh3_128_digest(f"{seed}\0{task}".encode()), "big")


def _line(task: Task, reply: Reply, made_by: str) -> dict[str, Any]:
    line = {"id": task.id, "row": task.row.number, "sample": task.sample, "messages": task.row.messages}
    line |= {"tools": task.row.tools} if task.row.tools else {}
    line |= {"answer": reply.text, "finish": reply.finish, "tokens": reply.tokens, "made_by": made_by}
    return line | ({"tool_calls": list(reply.calls)} if reply.calls else {})


def append(target: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Append JSON lines to a file and sync it. Raises FinetuneError if the disk refuses."""
    try:
        with target.open("ab") as file:
            file.write("".join(canonical_json(line) + "\n" for line in lines).encode("utf-8", "surrogatepass"))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise not_written(target, error) from None


def read_output(target: Path, expected: set[str], made_by: str) -> set[str]:
    """The ids of the answers that an earlier run left in `target`; a line torn by a kill is cut off.

    Raises InputError, and changes nothing, if the file is something else: other rows, another model or options.
    """
    if not target.exists():
        return set()
    ids: set[str] = set()
    for number, line in enumerate(_read_lines(target), start=1):
        other = "is of another model or other options" if line["made_by"] != made_by else ""
        if line["id"] not in expected:
            other = "answers a row that the input does not have (or --system, or --n, was another)"
        if line["id"] in ids:
            other = "answers a row for a second time"
        if other:
            raise InputError(f"--output {target}: line {number} {other}; name another file, or remove this one")
        ids.add(line["id"])
    content = target.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):  # a line torn by a kill
        try:
            os.truncate(target, whole)
        except OSError as error:
            raise not_written(target, error) from None
    return ids


def _read_lines(target: Path) -> list[dict[str, Any]]:
    """Return the complete lines of an output file. Raises InputError for a line that is not an answer."""
    lines = []
    for number, text in enumerate(target.read_bytes().split(b"\n")[:-1], start=1):  # last: partial or empty
        try:
            line = json.loads(text)
            if not all(isinstance(line[key], str) for key in ("id", "answer", "made_by")):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            raise InputError(
                f"--output {target}: line {number} is not an answer of this command; name another file, or "
                "remove this one"
            ) from None
        lines.append(line)
    return lines
