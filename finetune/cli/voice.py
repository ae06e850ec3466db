"""Load a model for generation (a run's adapter on its base, a merged model, a base) with template and terminators."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune.context import Context
from finetune.errors import FinetuneError, InputError
from finetune.pipeline import run_view
from finetune.pipeline.runs import recipe_text
from finetune.pipeline.store import Store
from finetune.recipe import Recipe
from finetune.recipe.load import parse_recipe
from finetune.utils.console import Screen
from finetune.utils.files import file_digest, read_json
from finetune.utils.links import require_model

HUB_BASE = r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?"
ROOM_FOR_CACHE = 0.85  # share of the free GPU memory for weights; the rest is for keys, values and activations


@dataclass(frozen=True)
class Voice:
    """A loaded model with the template and terminators for its prompts and answers."""

    model: Any  # PreTrainedModel or PeftModel
    tokenizer: Any  # PreTrainedTokenizerBase
    encoder: Any  # tokenization.encoder.Encoder
    profile: Any  # tokenization.template_profile.TemplateProfile
    template: str  # the text of its chat templates
    terminators: tuple[int, ...]
    pad_id: int
    positions: int | None  # longest sequence of the base, in tokens
    identity: str = ""  # digest of the model: equal files give equal digests


def model_folder(name: str) -> Path | None:
    """Return the model folder that `name` is, or None for the name of a run. Raises InputError for another folder."""
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
def run_voice(name: str, artifacts: Path, scratch: Path, screen: Screen) -> Iterator[Voice]:
    """Load the adapter of a run on its base, quantised as in training."""
    from finetune.models import loading
    from finetune.models.device import pick_device, pick_precision
    from finetune.utils import runtime

    store = Store(artifacts, scratch)
    value = run_view.finished(store, name, run_view.adapter_needs, screen.say)
    recipe_name = name.partition("@")[0]
    stages = run_view.adapter_needs(value)
    for stage in stages:
        if value["stages"][stage]["status"] != "done":
            status = value["stages"][stage]["status"]
            raise InputError(f"{stage} of {value['recipe']} is {status}: run `finetune run {recipe_name}` first")
    base, adapter = (Path(value["stages"][stage]["path"]) for stage in stages)
    adapter /= "adapter"
    recipe = recipe_of(value, recipe_name)
    device = pick_device(recipe.runtime.device)
    ctx = Context(scratch.absolute(), recipe.runtime, recipe.tracking, say=screen.say, bar=screen.bar, device=device)
    precision, why = pick_precision(recipe.training.precision, device)
    kind = recipe.quantization.type.upper() if recipe.quantization else "unquantised"
    screen.say(f"{value['recipe']}@{value['run']}: adapter on {recipe.model.id} ({kind}), {precision}: {why}")
    frozen = loading.load_base(recipe.model, base, ctx, recipe.quantization, precision, device)
    model = loading.attach_adapter(frozen, adapter)
    described = adapter / "template" / "template.json"  # an adapter imported without rows has none
    facts = read_json(described) if described.is_file() else {}
    with runtime.fitting(base, device):
        stops = facts.get("terminators") or _generation_stops(base)
        digests = [Path(value["stages"][stage]["path"]).name for stage in stages]  # keys of the two stages
        identity = f"{digests}, {precision}"
        yield _voice(model, base, adapter, stops, facts, identity)


def recipe_of(value: dict[str, Any], name: str) -> Recipe:
    """Return the recipe as this run read it; relative paths are resolved next to the original file."""
    text = recipe_text(value["folder"])
    origin = Path(name) if name.endswith((".yaml", ".yml")) else value["folder"] / "recipe.yaml"
    return parse_recipe(text, origin, value["sets"])


def folder_voice(folder: Path, screen: Screen) -> AbstractContextManager[Voice]:
    """Load a merged model, in 16 bits on a GPU and in 32 on a CPU."""
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
    model = _load_folder(folder, precision, device)
    named = files + [f for n in ("config.json", "chat_template.jinja") if (f := folder / n).is_file()]
    identity = f"{sorted(map(file_digest, named))}, {precision}"
    return nullcontext(_voice(model, folder, folder, stops, facts, identity))


@contextmanager
def base_voice(name: str, artifacts: Path, scratch: Path, screen: Screen) -> Iterator[Voice]:
    """Load a published base: OWNER/NAME[@REVISION] on the Hub, or a builtin, which is trained first."""
    from finetune.models import loading
    from finetune.pipeline import runner
    from finetune.pipeline.runs import Run

    model, _, revision = name.partition("@")
    asked = {"id": model, "revision": revision or None}
    try:
        recipe = Recipe.model_validate({"name": "base", "model": asked, "data": [{"source": "pydoc"}]})
    except ValueError as error:
        raise InputError(f"{name} is no run, folder or base: {str(error).splitlines()[2].strip()}") from None
    store = Store(artifacts, scratch)
    ctx = Context(store.scratch, recipe.runtime, recipe.tracking, say=screen.say, bar=screen.bar)
    runner.run(recipe, store, ctx, Run(store.artifacts, "base", "", (), "0" * 8, write=False), until="base")
    step = next(s for s in runner.plan(recipe, store) if s.stage.name == "base")
    assert step.folder is not None  # noqa: S101 - it was built
    weights = loading.ensure_base(recipe.model, step.folder, ctx)
    with folder_voice(weights, screen) as voice:
        yield voice


def open_voice(name: str, artifacts: Path, scratch: Path, screen: Screen) -> AbstractContextManager[Voice]:
    """Load the model of `name`: RECIPE[@RUN], the folder of a model, or a base. Raises InputError."""
    is_base = name.startswith("builtin:") or re.fullmatch(HUB_BASE, name) is not None
    if is_base and not Path(name).is_dir() and not name.partition("@")[0].endswith((".yaml", ".yml")):
        return base_voice(name, artifacts, scratch, screen)
    folder = model_folder(name)
    return folder_voice(folder, screen) if folder else run_voice(name, artifacts, scratch, screen)


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
    facts: dict[str, Any],  # template.json, if there is one
    identity: str,
) -> Voice:
    from finetune.models.loading import load_tokenizer
    from finetune.tokenization.chat_template import JinjaRenderer, base_template
    from finetune.tokenization.encoder import Encoder
    from finetune.tokenization.template_profile import TemplateProfile

    tokenizer: Any = load_tokenizer(tokenizer_folder)
    special = tokenizer.special_tokens_map
    files = [template_folder / "template" / "inference.jinja", template_folder / "chat_template.jinja"]
    trained = next((f.read_text(encoding="utf-8") for f in files if f.is_file()), None)
    if trained is None and not tokenizer.chat_template:
        raise InputError(f"{template_folder} has no chat template (chat_template.jinja): it was not made to chat")
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
