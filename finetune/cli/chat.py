"""`finetune chat`: talk to a trained adapter on its 4-bit base, or to a merged model, as it was trained."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from finetune.cli.prompt import clean, read_question, remembering
from finetune.context import Context
from finetune.errors import FinetuneError, InputError
from finetune.pipeline.run_view import read as read_run_view
from finetune.pipeline.runs import recipe_text
from finetune.pipeline.store import Store
from finetune.recipe import Recipe
from finetune.recipe.load import parse_recipe
from finetune.utils.console import Screen
from finetune.utils.files import canonical_json, read_json
from finetune.utils.links import require_model

HELP = (
    "/system TEXT  begin anew under this system message (without TEXT: under none)\n"
    "/reset        forget the conversation\n"
    "/seed N       the seed of the next answers\n"
    "/save FILE    add the conversation to a .jsonl that a recipe can read (default chat.jsonl)\n"
    "\\             at a line's end: the question goes on in the next line\n"
    "/quit         leave"
)
ROOM_FOR_CACHE = 0.85  # of the free GPU memory may go to weights; the rest holds keys, values and activations


@dataclass(frozen=True)
class Options:
    """How answers are made. `temperature` 0 is greedy; `compare` shows the answer without the adapter too."""

    max_new_tokens: int = 512
    temperature: float = 0.7
    seed: int = 0
    system: str | None = None
    compare: str | None = None


@dataclass
class Conversation:
    """What has been said so far, and under which system message and seed."""

    system: str | None
    seed: int
    messages: list[dict[str, str]] = field(default_factory=list)

    def chat(self) -> list[dict[str, str]]:
        """The messages, the system message first."""
        start = [{"role": "system", "content": self.system}] if self.system else []
        return [*start, *self.messages]


@dataclass(frozen=True)
class Voice:
    """A loaded model with all that turns a conversation into its prompt and tells where its answer ends."""

    model: Any  # PreTrainedModel or PeftModel
    tokenizer: Any  # PreTrainedTokenizerBase
    encoder: Any  # tokenization.encoder.Encoder
    render: Any  # tokenization.chat_template.JinjaRenderer
    takes_system: bool
    terminators: tuple[int, ...]
    pad_id: int
    positions: int | None  # the longest sequence the base was made for, in tokens


def chat(name: str, prompt: str | None, options: Options, artifacts: Path, scratch: Path) -> None:
    """Answer `prompt`, or without one every line of stdin. Answers go to stdout, everything else to stderr.

    Raises InputError where `name` is neither a run whose training is done nor a model's folder.
    """
    if options.compare not in (None, "base"):
        raise InputError(f"--compare {options.compare}: allowed: base")
    if prompt is not None and not prompt.strip():
        raise InputError("--prompt is empty; write a question, or leave it out to talk")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as in cli/run.py
    screen = Screen()
    folder = _model_folder(name)
    if folder is not None and options.compare:
        raise InputError("a merged model holds no base to compare with; give the name of its run instead")
    talk = _folder_voice(folder, screen) if folder else _run_voice(name, artifacts, scratch, screen)
    conversation = Conversation(options.system, options.seed)
    with talk as voice:
        if conversation.system and not voice.takes_system:
            screen.say("this template has no place for a system message: it goes before the first question")
        if prompt is not None:
            _exchange(voice, conversation, clean(prompt), options)
            return
        _talk(voice, conversation, options, screen)


# --- loading --------------------------------------------------------------------------------------------------------


def _model_folder(name: str) -> Path | None:
    """The model's folder that `name` is, or None for the name of a run. Raises InputError for another folder."""
    path = Path(name).expanduser()
    if (path / "config.json").is_file():
        require_model(path, name)
        return path
    if (path / "adapter_config.json").is_file():
        raise InputError(f"{name} is an adapter without its base; give the name of the run that trained it")
    looks_like_path = "/" in name and not name.partition("@")[0].endswith((".yaml", ".yml"))
    if looks_like_path:
        what = "holds no config.json" if path.is_dir() else "is no folder"
        raise InputError(f"{name} {what}; give a recipe (also RECIPE@RUN) or the folder of a merged model")
    return None


@contextmanager
def _run_voice(name: str, artifacts: Path, scratch: Path, screen: Screen) -> Iterator[Voice]:
    """The adapter of a run on the base it was trained on, quantised as it was then."""
    from finetune.models import loading
    from finetune.models.device import pick_device, pick_precision
    from finetune.utils import runtime

    value = read_run_view(Store(artifacts.absolute(), scratch.absolute()), name)
    recipe_name = name.partition("@")[0]
    for stage in ("base", "train"):
        if value["stages"][stage]["status"] != "done":
            status = value["stages"][stage]["status"]
            raise InputError(f"{stage} of {value['recipe']} is {status}: run `finetune run {recipe_name}` first")
    base, adapter = (Path(value["stages"][stage]["path"]) for stage in ("base", "train"))
    adapter /= "adapter"
    recipe = _recipe_of(value, recipe_name)
    device = pick_device(recipe.runtime.device)
    ctx = Context(scratch.absolute(), recipe.runtime, recipe.tracking, say=screen.say, bar=screen.bar, device=device)
    precision, why = pick_precision(recipe.train.precision, device)
    kind = recipe.quantization.type.upper() if recipe.quantization else "unquantised"
    screen.say(f"{value['recipe']}@{value['run']}: adapter on {recipe.model.id} ({kind}), {precision}: {why}")
    frozen = loading.load_base(recipe.model, base, ctx, recipe.quantization, precision, device)
    model = loading.attach_adapter(frozen, adapter)
    facts = read_json(adapter / "template" / "template.json")
    with runtime.fitting(base, device):
        yield _voice(model, base, adapter, facts["terminators"], facts["pad_token"])


def _recipe_of(value: dict[str, Any], name: str) -> Recipe:
    """The recipe as this run read it; its relative paths are looked for beside the file it came from."""
    text = recipe_text(value["folder"])
    origin = Path(name) if name.endswith((".yaml", ".yml")) else value["folder"] / "recipe.yaml"
    return parse_recipe(text, origin, value["sets"])


def _folder_voice(folder: Path, screen: Screen) -> AbstractContextManager[Voice]:
    """A merged model, in 16 bits on a GPU and in 32 on a CPU."""
    import torch

    from finetune.models import loading
    from finetune.models.device import pick_device, pick_precision

    files = loading.weight_files(folder)
    loading.refuse_without_safetensors(str(folder), [p.name for p in folder.iterdir()])
    if not files:
        raise InputError(f"{folder} lacks a shard that {loading.INDEX} names; copy it again")
    device = pick_device("auto")
    precision, why = pick_precision("auto", device)
    needed = sum(p.stat().st_size for p in files)
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
        if needed > ROOM_FOR_CACHE * free:
            raise FinetuneError(
                f"{folder} holds {needed / 1e9:.1f} GB of weights and the GPU has {free / 1e9:.1f} GB free; give the "
                "name of its run, whose 4-bit base takes about a third"
            )
    screen.say(f"{folder}: {precision} on {device}: {why}")
    template_file = folder / "template.json"
    facts = read_json(template_file) if template_file.is_file() else {}
    stops = facts.get("terminators") or _generation_stops(folder)
    return nullcontext(_voice(_load_folder(folder, precision, device), folder, folder, stops, facts.get("pad_token")))


def _load_folder(folder: Path, precision: Literal["bf16", "fp16", "fp32"], device: str) -> Any:  # noqa: ANN401 - model
    import torch
    import transformers

    from finetune.models.device import DTYPES
    from finetune.utils.quiet import quiet

    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    auto: Any = transformers.AutoModelForCausalLM
    try:
        with quiet():
            model, report = auto.from_pretrained(
                folder,
                dtype=dtypes[DTYPES[precision]],
                device_map={"": device},
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise FinetuneError(f"cannot load {folder}: {str(error).strip().splitlines()[0]}") from error
    if wrong := [
        f"{kind.removesuffix('_keys')} {sorted(map(str, report[kind]))[0]}" for kind in report if report[kind]
    ]:
        raise FinetuneError(f"the weights in {folder} are not those its config.json describes: {'; '.join(wrong)}")
    return model.requires_grad_(False).eval()


def _generation_stops(folder: Path) -> list[int]:
    path = folder / "generation_config.json"
    stops = read_json(path).get("eos_token_id") if path.is_file() else None
    return [stops] if isinstance(stops, int) else list(stops or [])


def _voice(
    model: Any,  # noqa: ANN401 - PreTrainedModel or PeftModel
    tokenizer_folder: Path,
    template_folder: Path,
    terminators: list[int],
    pad_token: str | None,
) -> Voice:
    from finetune.models.loading import load_tokenizer
    from finetune.tokenization.chat import takes_system
    from finetune.tokenization.chat_template import JinjaRenderer
    from finetune.tokenization.encoder import Encoder

    tokenizer: Any = load_tokenizer(tokenizer_folder)
    file = template_folder / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.is_file() else tokenizer.chat_template
    if not template:
        raise InputError(f"{template_folder} has no chat template (chat_template.jinja): it was not made to chat")
    render = JinjaRenderer(template, tokenizer.special_tokens_map)
    stops = terminators or ([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])
    if not stops:
        raise InputError(f"{template_folder} names no token that ends an answer (generation_config.json: eos_token_id)")
    pad = pad_token or tokenizer.pad_token
    return Voice(
        model=model,
        tokenizer=tokenizer,
        encoder=Encoder(tokenizer, template),
        render=render,
        takes_system=takes_system(render),
        terminators=tuple(stops),
        pad_id=tokenizer.get_vocab()[pad] if pad else stops[0],
        positions=model.config.to_dict().get("max_position_embeddings"),
    )


# --- talking --------------------------------------------------------------------------------------------------------


def _talk(voice: Voice, conversation: Conversation, options: Options, screen: Screen) -> None:
    """One line of stdin after the other, until /quit or its end."""
    terminal = sys.stdin.isatty()
    if terminal:
        screen.say("/help lists the commands; Ctrl-C ends an answer, Ctrl-D the conversation")
    with remembering(terminal):
        _talk_on(voice, conversation, options, screen, terminal)


def _talk_on(voice: Voice, conversation: Conversation, options: Options, screen: Screen, terminal: bool) -> None:
    while True:
        try:
            line = read_question(terminal).strip()
        except EOFError:
            return
        except KeyboardInterrupt:  # meant for an answer that has just ended
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
                _exchange(voice, conversation, line, options)
            except InputError as error:
                screen.say(str(error))
            except KeyboardInterrupt:
                _write("\n")
                screen.say("(stopped; this question and its answer are forgotten)")


def _command(line: str, conversation: Conversation, screen: Screen) -> bool:
    """Carry out a /command; False for /quit. Raises InputError for a value that cannot be."""
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
                raise InputError("nothing said yet")
            path = Path(rest or "chat.jsonl").expanduser()
            with path.open("a", encoding="utf-8") as file:
                file.write(canonical_json({"messages": conversation.chat()}) + "\n")
            screen.say(f"added to {path}")
        case "/help":
            screen.say(HELP)
        case _:
            raise InputError(f"no command {name}; there is\n{HELP}")
    return True


def _exchange(voice: Voice, conversation: Conversation, question: str, options: Options) -> None:
    """Print the answer to `question` as it is made and remember both; on any failure neither is remembered."""
    asked = {"role": "user", "content": question}
    ids = _prompt_ids(voice, [*conversation.chat(), asked])
    seed = conversation.seed + len(conversation.messages)
    labelled = options.compare is not None
    if labelled:
        _write("adapter> ")
    answer = _answer(voice, ids, options, seed, _write)
    _write("\n")
    if labelled:
        _write("base> ")
        with voice.model.disable_adapter():
            _answer(voice, ids, options, seed, _write)
        _write("\n")
    conversation.messages += [asked, {"role": "assistant", "content": answer}]


def _prompt_ids(voice: Voice, chat: list[dict[str, str]]) -> list[int]:
    """The prompt as training rendered it; a control string that a person types stays text."""
    from finetune.tokenization.chat import merge_system, render_row

    messages: list[dict[str, Any]] = [dict(m) for m in chat]
    if not voice.takes_system:
        messages = merge_system(messages)
    rendered = render_row(voice.render, voice.encoder.controls, messages, generation_prompt=True)
    ids: list[int] = voice.encoder.encode_rendered([rendered])[0][0]
    return ids


def _answer(voice: Voice, ids: list[int], options: Options, seed: int, write: Callable[[str], None]) -> str:
    """The answer to a prompt of token ids, written piece by piece; ends before a terminator, which is not part of it.

    Raises InputError where the prompt leaves no room for an answer.
    """
    import torch
    from transformers import GenerationConfig, TextStreamer

    room = options.max_new_tokens if voice.positions is None else voice.positions - len(ids)
    if room < 1:
        raise InputError(f"the conversation has {len(ids)} tokens, this model reads {voice.positions}: /reset it")

    class Writer(TextStreamer):
        """Whole words as they come, to `write`."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(printable(text))

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
        out = voice.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=config,
            streamer=Writer(voice.tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    text: str = voice.tokenizer.decode(out[0, len(ids) :].tolist(), skip_special_tokens=True)
    return text.strip()


def printable(text: str) -> str:
    """`text` without the control characters by which what a model writes could steer a terminal."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "�" for c in text)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
