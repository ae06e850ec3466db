"""A loaded model that answers: chat template, terminators, tokenizer; and the tokens of its prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from finetune.errors import FinetuneError, InputError
from finetune.utils.files import file_digest, read_json
from finetune.utils.format import first_line
from finetune.utils.quiet import quiet
from finetune.utils.runtime import available_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetune.models.layerwise import CausalModel

ROOM_FOR_CACHE = 0.85  # share of the free GPU memory for weights; the rest is for keys, values and activations


class Says(Protocol):
    """Prints lines: a Screen or a Context."""

    @property
    def say(self) -> Callable[[str], None]:
        """Print one line."""


@dataclass(frozen=True)
class Voice:
    """A loaded model with the template and terminators for its prompts and answers."""

    model: CausalModel
    tokenizer: Any  # PreTrainedTokenizerBase
    encoder: Any  # tokenization.encoder.Encoder
    profile: Any  # tokenization.template_profile.TemplateProfile
    template: str  # the text of its chat templates
    terminators: tuple[int, ...]
    pad_id: int
    positions: int | None  # longest sequence of the base, in tokens
    identity: str = ""  # digest of the model: equal files give equal digests


def folder_voice(folder: Path, screen: Says, device: str = "auto") -> AbstractContextManager[Voice]:
    """Load a merged model, in 16 bits on a GPU and in 32 on a CPU."""
    from finetune.models.device import pick_device, pick_precision

    files = require_voice(folder)
    device = pick_device(device)
    precision, why = pick_precision("auto", device)
    if why_not := no_room(loaded_bytes(files, device), device):
        raise FinetuneError(f"{folder}: {why_not}; give the name of its run, whose 4-bit base takes about a third")
    screen.say(f"{folder}: {precision} on {device}: {why}")
    template_file = folder / "template.json"
    facts = read_json(template_file) if template_file.is_file() else {}
    stops = facts.get("terminators") or generation_stops(folder)
    model = _load_folder(folder, precision, device)
    named = files + [f for n in ("config.json", "chat_template.jinja") if (f := folder / n).is_file()]
    identity = f"{sorted(map(file_digest, named))}, {precision}"
    return nullcontext(make_voice(model, folder, folder, stops, facts, identity))


def loaded_bytes(files: Sequence[Path], device: str) -> int:
    """Return the bytes of a folder's weights once loaded: in fp32 on a CPU, in 16 bits on a GPU.

    `files` are its weight files; their dtype is that of config.json (16 bits where it names none).
    """
    import torch

    place = files[0].with_name("config.json") if files else None
    config = read_json(place) if place and place.is_file() else {}
    config = config.get("text_config") or config
    stored = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"), torch.bfloat16)
    wanted = 2 if device == "cuda" else 4
    return sum(p.stat().st_size for p in files) * wanted // stored.itemsize


def no_room(needed: int, device: str) -> str:
    """Return why weights of `needed` bytes cannot be loaded on a device (cuda, cpu), or ""."""
    if device == "cuda":
        import torch

        free, what = int(ROOM_FOR_CACHE * torch.cuda.mem_get_info()[0]), "the GPU"
    else:
        free, what = available_memory() or needed, "this machine"
    short = f"{needed / 1e9:.1f} GB of weights, and {what} has {free / 1e9:.1f} GB free for them"
    return short if needed > free else ""


def require_voice(folder: Path) -> list[Path]:
    """Return the weights of a model's folder. Raises InputError if weights or a chat template are missing."""
    from finetune.models import loading

    files = loading.weight_files(folder)
    loading.refuse_without_safetensors(str(folder), [p.name for p in folder.iterdir()])
    if not files:
        raise InputError(f"{folder} lacks a shard that {loading.INDEX} names; copy it again")
    if not any(f.is_file() for f in _templates(folder)) and not loading.load_tokenizer(folder).chat_template:
        raise InputError(_no_template(folder))
    return files


def _templates(folder: Path) -> list[Path]:
    return [folder / "template" / "inference.jinja", folder / "chat_template.jinja"]


def _no_template(folder: Path) -> str:
    return f"{folder} has no chat template (chat_template.jinja): it was not made to chat"


def _load_folder(folder: Path, precision: Literal["bf16", "fp16", "fp32"], device: str) -> PreTrainedModel:
    import torch
    import transformers

    from finetune.models.device import DTYPES

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
        raise FinetuneError(f"cannot load {folder}: {first_line(error)}") from error
    if wrong := [
        f"{kind.removesuffix('_keys')} {sorted(map(str, report[kind]))[0]}" for kind in report if report[kind]
    ]:
        raise FinetuneError(f"the weights in {folder} are not those its config.json describes: {'; '.join(wrong)}")
    return model.requires_grad_(False).eval()


def generation_stops(folder: Path) -> list[int]:
    """Return the ids that end an answer by generation_config.json; empty if it names none."""
    path = folder / "generation_config.json"
    stops = read_json(path).get("eos_token_id") if path.is_file() else None
    return [stops] if isinstance(stops, int) else list(stops or [])


def make_voice(
    model: CausalModel,
    tokenizer_folder: Path,
    template_folder: Path,
    terminators: list[int],
    facts: dict[str, Any],  # template.json, if there is one
    identity: str,
) -> Voice:
    """Return the voice of a loaded model. Raises InputError if it has no chat template or no terminator."""
    from finetune.models.loading import load_tokenizer
    from finetune.tokenization.chat_template import JinjaRenderer, base_template
    from finetune.tokenization.encoder import Encoder
    from finetune.tokenization.template_profile import TemplateProfile

    tokenizer: Any = load_tokenizer(tokenizer_folder)
    special = tokenizer.special_tokens_map
    files = _templates(template_folder)
    trained = next((f.read_text(encoding="utf-8") for f in files if f.is_file()), None)
    if trained is None and not tokenizer.chat_template:
        raise InputError(_no_template(template_folder))
    template, tool_use = (trained, None) if trained else base_template(tokenizer)
    second = files[0].with_name("inference_tool_use.jinja")
    if trained and second.is_file():
        tool_use = second.read_text(encoding="utf-8")
    profile = TemplateProfile(JinjaRenderer(template, special), JinjaRenderer(tool_use, special) if tool_use else None)
    stops = terminators or ([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])
    if not stops:
        raise InputError(f"{template_folder} names no token that ends an answer (generation_config.json: eos_token_id)")
    pad = facts.get("pad_token") or tokenizer.pad_token
    return Voice(
        model=model,
        tokenizer=tokenizer,
        encoder=Encoder(tokenizer, facts.get("typed", ())),
        profile=profile,
        template=template + (tool_use or ""),
        terminators=tuple(stops),
        pad_id=tokenizer.get_vocab()[pad] if pad else stops[0],
        positions=model.config.to_dict().get("max_position_embeddings"),
        identity=identity,
    )


def prompt_ids(voice: Voice, chat: Sequence[dict[str, Any]], tools: Sequence[Any] | None = None) -> list[int]:
    """Return the prompt as rendered in training; a control string typed by the user stays text.

    Raises TemplateRefused (an InputError) if the chat template refuses these messages.
    """
    from finetune.tokenization.rendering import render_prompt

    rendered = render_prompt(voice.profile, voice.encoder.controls, [dict(m) for m in chat], tools)
    ids: list[int] = voice.encoder.encode_rendered([rendered])[0][0]
    return ids
