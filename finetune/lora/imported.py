"""Import an adapter made by any tool: check that it fits this base and template, and copy it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import FinetuneError, GateRefused, InputError
from finetune.lora.start import CONFIG, WEIGHTS
from finetune.metrics import TrainMetrics
from finetune.utils.files import read_json, write_bytes, write_json
from finetune.utils.safetensors_io import read_file

if TYPE_CHECKING:
    from finetune.tokenization.chat_template import JinjaRenderer

PROBES: tuple[tuple[str, list[dict[str, Any]]], ...] = (
    ("a question", [{"role": "user", "content": "How far is it?"}]),
    (
        "a second question",
        [
            {"role": "user", "content": "How far is it?"},
            {"role": "assistant", "content": "Two miles."},
            {"role": "user", "content": "And back?"},
        ],
    ),
    (
        "a system message",
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How far is it?"}],
    ),
)


def copy_adapter(source: Path, base: Path, target: Path) -> TrainMetrics:
    """Copy weights and configuration; the configuration names the pinned base, like that of a trained adapter.

    Args:
        source: folder with adapter_config.json and adapter_model.safetensors.
        base: finished base stage, with base.json.
        target: folder to write.

    Returns:
        {"tensors", "trainable_parameters"}: number of tensors and of their elements.

    Raises:
        InputError: a tensor holds NaN or an infinity.
    """
    import torch

    target.mkdir(parents=True, exist_ok=True)
    elements = 0
    refs = read_file(source / WEIGHTS)
    for name, ref in refs.items():
        tensor = ref.load()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"lora.start_from: {name} in {source.name} holds NaN or an infinity; train it again")
        elements += tensor.numel()
    shutil.copyfile(source / WEIGHTS, target / WEIGHTS)
    pinned, config = read_json(base / "base.json"), read_json(source / CONFIG)
    config |= {"base_model_name_or_path": pinned["id"], "revision": pinned["revision"], "inference_mode": True}
    if isinstance(config.get("target_modules"), list):
        config["target_modules"] = sorted(config["target_modules"])
    write_json(target / CONFIG, config)
    return {"tensors": len(refs), "trainable_parameters": elements}


def copy_tokenizer(source: Path, base: Path, target: Path) -> None:
    """Copy the adapter's tokenizer and chat template; those of the base if the adapter has none."""
    from finetune.models import loading

    own = (source / "tokenizer_config.json").is_file() and any(
        (source / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
    )
    loading.copy_tokenizer(source if own else base, target)
    template = template_of(source)
    if template is not None and not (target / "chat_template.jinja").is_file():
        write_bytes(target / "chat_template.jinja", template.encode())


def template_of(folder: Path) -> str | None:
    """Return the chat template saved in `folder`: chat_template.jinja, or a text in tokenizer_config.json."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    path = folder / "tokenizer_config.json"
    template = read_json(path).get("chat_template") if path.is_file() else None
    return template if isinstance(template, str) else None


def require_same_tokens(source: Path, base: Path, say: Callable[[str], None]) -> None:
    """Refuse an adapter whose tokenizer gives a token another id than the base's; `say` reports additional tokens.

    Raises InputError. An adapter without a tokenizer is assumed to use the base's.
    """
    from finetune.models.loading import load_tokenizer

    if not (source / "tokenizer_config.json").is_file():
        return
    try:
        theirs = load_tokenizer(source).get_vocab()
    except FinetuneError as error:
        say(f"train: the adapter's tokenizer cannot be read, the base's is used: {error}")
        return
    ours = load_tokenizer(base).get_vocab()
    if moved := [token for token, number in theirs.items() if ours.get(token, number) != number]:
        token = moved[0]
        raise InputError(
            f"lora.start_from: the adapter's tokenizer gives {token!r} the id {theirs[token]}, the base's "
            f"{ours[token]} ({len(moved)} such tokens); set model to the base that was trained"
        )
    if more := sorted(theirs.keys() - ours.keys()):
        say(f"train: the adapter's tokenizer has {len(more)} tokens that the base's lacks, such as {more[0]!r}; unused")


def require_same_template(source: Path, base: Path, rendered: Path) -> None:
    """Refuse an adapter whose chat template writes other prompts than the rendered one.

    `rendered` is the template folder of the render stage. Raises GateRefused with the first prompt that differs.
    """
    from finetune.models.loading import load_tokenizer
    from finetune.tokenization.chat_template import JinjaRenderer

    theirs = template_of(source)
    if theirs is None:
        return
    ours = (rendered / "inference.jinja").read_text(encoding="utf-8")
    special = load_tokenizer(base).special_tokens_map
    for name, chat in PROBES:
        first, second = (_written(JinjaRenderer(text, special), chat) for text in (theirs, ours))
        if first != second:
            raise GateRefused(
                f"train: the adapter's chat template writes {name} as {_short(first)}, but render.template writes "
                f"{_short(second)}; save the adapter's template as a .jinja file next to the recipe and set "
                "render.template to it"
            )


def _written(render: JinjaRenderer, chat: list[dict[str, Any]]) -> str | None:
    from finetune.tokenization.chat import TemplateRefused

    try:
        return str(render(chat, True)[0])
    except TemplateRefused:
        return None


def _short(text: str | None) -> str:
    return "nothing (it refuses)" if text is None else repr(text[:120])
