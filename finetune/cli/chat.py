"""`finetune chat`: talk to a trained adapter on its 4-bit base, or to a merged model, as it was trained."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from finetune.cli.voice import Voice, folder_voice, model_folder, prompt_ids, run_voice
from finetune.errors import FinetuneError, InputError, Stopped
from finetune.utils.console import Screen
from finetune.utils.files import canonical_json

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from finetune.models.layerwise import Generator

HELP = (
    "/system TEXT  start again with this system message (without TEXT: under none)\n"
    "/reset        forget the conversation\n"
    "/seed N       the seed of the next answers\n"
    "/save FILE    add the conversation to a .jsonl that a recipe can read (default chat.jsonl)\n"
    "\\             at a line's end: the question goes on in the next line\n"
    "/quit         leave"
)


@dataclass(frozen=True)
class Options:
    """Generation options. `temperature` 0 is greedy; `compare` also shows the answer without the adapter."""

    max_new_tokens: int = 512
    temperature: float = 0.7
    seed: int = 0
    system: str | None = None
    compare: str | None = None
    server: str | None = None


@dataclass
class Conversation:
    """Turns of the conversation, its system message and its seed."""

    system: str | None
    seed: int
    messages: list[dict[str, str]] = field(default_factory=list)

    def chat(self) -> list[dict[str, str]]:
        """Return the messages, the system message first."""
        start = [{"role": "system", "content": self.system}] if self.system else []
        return [*start, *self.messages]


def chat(name: str, prompt: str | None, options: Options, artifacts: Path, scratch: Path) -> None:
    """Answer `prompt`, or without one every line of stdin. Answers go to stdout, everything else to stderr.

    Raises InputError if `name` is neither a run whose training is done nor a model's folder.
    """
    if options.compare not in (None, "base"):
        raise InputError(f"--compare {options.compare}: allowed: base")
    if prompt is not None and not prompt.strip():
        raise InputError("--prompt is empty; write a question, or omit it for a conversation")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as in cli/run.py
    screen, conversation = Screen(), Conversation(options.system, options.seed)
    with ExitStack() as stack:
        if options.server:
            exchange = _with_server(name, options, screen)
        else:
            folder = model_folder(name)
            if folder is not None and options.compare:
                raise InputError("a merged model holds no base to compare with; give the name of its run instead")
            talk = folder_voice(folder, screen) if folder else run_voice(name, artifacts, scratch, screen)
            voice = stack.enter_context(talk)
            if conversation.system and not voice.profile.takes_system:
                screen.say("this template has no place for a system message: it goes before the first question")
            exchange = partial(_exchange, voice, options=options)
        if prompt is not None:
            exchange(conversation, clean(prompt))
        else:
            _talk(exchange, conversation, screen)


def _with_server(name: str, options: Options, screen: Screen) -> Exchange:
    from finetune.serve.client import Sampling, connect

    if options.compare:
        raise InputError("--compare base: a server has no adapter to switch off; leave --server out")
    server = connect(str(options.server), name)
    screen.say(f"{server.url}, model {server.model}")

    def exchange(conversation: Conversation, question: str) -> None:
        asked = {"role": "user", "content": question}
        seed = conversation.seed + len(conversation.messages)
        sampling = Sampling(options.max_new_tokens, options.temperature, 1.0, seed)
        pieces = []
        for piece in server.stream([*conversation.chat(), asked], sampling):
            pieces.append(piece)
            _write(printable(piece))
        _write("\n")
        conversation.messages += [asked, {"role": "assistant", "content": "".join(pieces).strip()}]

    return exchange


Exchange = Callable[[Conversation, str], None]  # answers a question and remembers both


def _talk(exchange: Exchange, conversation: Conversation, screen: Screen) -> None:
    """One line of stdin after the other, until /quit or its end."""
    terminal = sys.stdin.isatty()
    if terminal:
        screen.say("/help lists the commands; Ctrl-C ends an answer, Ctrl-D the conversation")
    with remembering(terminal):
        _talk_on(exchange, conversation, screen, terminal)


def _talk_on(exchange: Exchange, conversation: Conversation, screen: Screen, terminal: bool) -> None:
    while True:
        try:
            line = read_question(terminal).strip()
        except EOFError:
            return
        except KeyboardInterrupt:  # sent to stop an answer that has just ended
            if not terminal:
                raise
            continue
        if line.startswith("/"):
            try:
                if not _command(line, conversation, screen):
                    return
            except (InputError, OSError) as error:
                screen.say(str(error))
        elif line:
            try:
                exchange(conversation, line)
            except FinetuneError as error:
                # A signal ends the conversation, and a server that failed if no person can ask again.
                if isinstance(error, Stopped) or not (terminal or isinstance(error, InputError)):
                    raise
                screen.say(str(error))
            except KeyboardInterrupt:
                _write("\n")
                screen.say("(stopped; this question and its answer are forgotten)")


def _command(line: str, conversation: Conversation, screen: Screen) -> bool:
    """Run a /command; return False for /quit. Raises InputError for an invalid value."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    match name:
        case "/quit" | "/exit":
            return False
        case "/reset":
            conversation.messages.clear()
            screen.say("a new conversation")
        case "/system":
            conversation.system = rest or None
            conversation.messages.clear()
            screen.say(f"a new conversation, {'under this system message' if rest else 'without a system message'}")
        case "/seed":
            if not rest.isdecimal() or int(rest) >= 2**32:
                raise InputError(f"/seed {rest}: write a number from 0 to {2**32 - 1}")
            conversation.seed = int(rest)
            screen.say(f"seed {rest}")
        case "/save":
            if not conversation.messages:
                raise InputError("the conversation is empty")
            path = Path(rest or "chat.jsonl").expanduser()
            with path.open("a", encoding="utf-8") as file:
                file.write(canonical_json({"messages": conversation.chat()}) + "\n")
            screen.say(f"added to {path}")
        case "/help":
            screen.say(HELP)
        case _:
            raise InputError(f"no command {name}; allowed:\n{HELP}")
    return True


def _exchange(voice: Voice, conversation: Conversation, question: str, options: Options) -> None:
    """Stream the answer to `question` and add both to the conversation; on a failure add neither."""
    asked = {"role": "user", "content": question}
    ids = prompt_ids(voice, [*conversation.chat(), asked])
    seed = conversation.seed + len(conversation.messages)
    labelled = options.compare is not None
    if labelled:
        _write("adapter> ")
    answer = _answer(voice, ids, options, seed)
    _write("\n")
    if labelled:
        _write("base> ")
        with cast("PeftModel", voice.model).disable_adapter():
            _answer(voice, ids, options, seed)
        _write("\n")
    conversation.messages += [asked, {"role": "assistant", "content": answer}]


def _answer(voice: Voice, ids: list[int], options: Options, seed: int) -> str:
    """The answer to a prompt of token ids, written piece by piece; ends before a terminator, which is not part of it.

    Raises InputError if the prompt leaves no room for an answer.
    """
    import torch
    from transformers import GenerationConfig, TextStreamer

    room = options.max_new_tokens if voice.positions is None else voice.positions - len(ids)
    if room < 1:
        raise InputError(f"the conversation has {len(ids)} tokens, this model reads {voice.positions}: /reset it")

    class Writer(TextStreamer):
        """Streamer that prints complete words."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            _write(printable(text))

    sampling = {"temperature": options.temperature, "top_k": 50, "top_p": 1.0} if options.temperature else {}
    config = GenerationConfig(
        do_sample=options.temperature > 0,
        max_new_tokens=min(options.max_new_tokens, room),
        eos_token_id=list(voice.terminators),
        pad_token_id=voice.pad_id,
        use_cache=True,
        **sampling,
    )
    torch.manual_seed(seed)
    prompt = torch.tensor([ids], device=voice.model.device)
    with torch.inference_mode():
        out: torch.Tensor = cast("Generator", voice.model).generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=config,
            streamer=Writer(voice.tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    text: str = voice.tokenizer.decode(out[0, len(ids) :].tolist(), skip_special_tokens=True)
    return text.strip()


def printable(text: str) -> str:
    """Return `text` without control characters, with which a model's output could control a terminal."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "�" for c in text)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def history_file() -> Path:
    """Return the file with the history of typed lines, readable by the user only."""
    home = os.environ.get("XDG_STATE_HOME", "")
    root = Path(home) if Path(home).is_absolute() else Path("~/.local/state").expanduser()
    return root / "finetune" / "chat_history"


@contextmanager
def remembering(terminal: bool) -> Iterator[None]:
    """Within the block, `input` edits lines and knows those of earlier conversations; only on a terminal.

    A history that cannot be read or written is done without.
    """
    if not terminal:
        yield
        return
    try:
        import readline
    except ImportError:  # Windows, or a Python without readline
        yield
        return
    path = history_file()
    readline.set_history_length(1000)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        readline.read_history_file(path)
    try:
        yield
    finally:
        with suppress(OSError):
            readline.write_history_file(path)


def read_question(terminal: bool) -> str:
    """Read a line, and further ones while a line ends in a backslash. Raises EOFError, KeyboardInterrupt."""
    line = input("\nyou> " if terminal else "")
    while line.endswith("\\"):
        line = line[:-1] + "\n"
        try:
            line += input("...> " if terminal else "")
        except EOFError:  # the lines so far are the question
            break
    return clean(line)


def clean(text: str) -> str:
    """Return `text` without lone surrogates, which a terminal with another encoding sends."""
    return text.encode("utf-8", "replace").decode()
