"""The merged model as GGUF files, each read again and compared, with an Ollama Modelfile. Asked for by `export:`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.context import Context, Metrics
from finetune.errors import FinetuneError, InputError
from finetune.recipe import Export, Recipe
from finetune.records import read_json, write_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finetune.backends.gguf_file import Header, Planned
    from finetune.backends.ollama import Chat

RELOADED = ("f32", "f16", "bf16")  # the kinds that have an exact expectation
MAX_RELOADED_PARAMETERS = 200_000_000


def spec(recipe: Recipe) -> Export | None:
    """The formats asked for; None when nothing is exported or merged."""
    return recipe.export if recipe.merge else None


def fingerprint(spec: Export) -> Mapping[str, object]:
    """Nothing outside the recipe decides the output."""
    return {}


def run(spec: Export, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Metrics:
    """Write model-KIND.gguf for every kind, and a Modelfile for the first.

    `reload_difference` is the largest |weight of the GGUF as transformers reads it - merged weight|, for kinds without
    blocks and models under 200 M parameters. Raises InputError where the gguf package is missing, or where the
    architecture or the tokenizer cannot be told to llama.cpp; FinetuneError where the reloaded weights are others.
    """
    from finetune.backends import gguf_file, models

    gguf_file.require_gguf()
    folder = inputs["merge"]
    config: dict[str, Any] = read_json(folder / "config.json")
    gguf_file.architecture(config)
    kinds = list(dict.fromkeys(spec.gguf))
    plans = {kind: gguf_file.plan(folder, config, kind) for kind in kinds}
    tokenizer = models.load_tokenizer(folder)
    header = _header(folder, config, tokenizer)
    _require_space(out, sum(gguf_file.file_bytes(p) for p in plans.values()))
    if not header.vocabulary.exact:
        ctx.say("export: llama.cpp splits some text differently from this tokenizer; answers may differ a little")
    sizes, differences = {}, {}
    for kind, planned in plans.items():
        path = out / f"model-{kind}.gguf"
        gguf_file.write(path, header, planned, kind, ctx.track(planned, f"export {kind}", len(planned)))
        sizes[path.name] = path.stat().st_size
        if kind in RELOADED and _reloadable(planned, config):
            differences[path.name] = _reload_difference(path, planned)
    template = _write_modelfile(out, f"model-{kinds[0]}.gguf", header, tokenizer)
    metrics: Metrics = {"bytes": sizes, "tokenizer_exact": header.vocabulary.exact, "ollama_template": template}
    if differences:
        metrics["reload_difference"] = differences
    return metrics


def _header(folder: Path, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Header:
    from transformers import PreTrainedTokenizerFast

    from finetune.backends.gguf_file import Header
    from finetune.backends.gguf_vocabulary import read_vocabulary

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(f"{folder}: GGUF needs a tokenizer.json, and this tokenizer has none; set export: null")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    path = folder / "generation_config.json"
    ends = (read_json(path) if path.exists() else {}).get("eos_token_id")
    ends = tokenizer.eos_token_id if ends is None else ends
    terminators = tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    ids["unk"] = tokenizer.unk_token_id
    bos = tokenizer.bos_token
    return Header(
        config=config,
        vocabulary=read_vocabulary(folder, content, config["vocab_size"], bos if isinstance(bos, str) else None),
        special={name: i for name, i in ids.items() if isinstance(i, int)},
        terminators=terminators,
        template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )


def _write_modelfile(out: Path, weights: str, header: Header, tokenizer: PreTrainedTokenizerBase) -> str:
    """Write the Modelfile; says where Ollama has its template from: "modelfile", or "gguf"."""
    from finetune.backends.ollama import modelfile, read_pieces

    tokens = header.vocabulary.tokens
    bos = tokens[header.special["bos"]] if header.vocabulary.add_bos else None
    pieces = read_pieces(lambda chat, prompt: _rendered(tokenizer, chat, prompt)) if header.template else None
    stops = [tokens[i] for i in header.terminators]
    write_bytes(out / "Modelfile", modelfile(weights, pieces, stops, bos).encode())
    return "gguf" if pieces is None else "modelfile"


def _rendered(tokenizer: PreTrainedTokenizerBase, chat: Chat, prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt))
    except TemplateError as error:
        raise ValueError(str(error)) from error


def _require_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if free < needed:
        raise FinetuneError(
            f"export: the GGUF files need {needed / 1e9:.1f} GB in {out} and {free / 1e9:.1f} GB are free; free "
            f"{(needed - free) / 1e9:.1f} GB, or ask for fewer kinds"
        )


def _reloadable(planned: list[Planned], config: Mapping[str, Any]) -> bool:
    """Small enough, and of a kind that transformers reads whole: it has no biases for Llama's GGUF."""
    biases = config["model_type"] != "qwen2" and any(p.name.endswith(".bias") for p in planned)
    return not biases and sum(prod(p.source.shape) for p in planned) < MAX_RELOADED_PARAMETERS


def _reload_difference(path: Path, planned: list[Planned]) -> float:
    """The largest difference from the merged weights; rounding to the file's kind is the only one allowed."""
    import torch
    from transformers import AutoModelForCausalLM

    dtypes = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    found = model.state_dict()
    largest = 0.0
    for p in planned:
        merged = p.source.load()
        there = found.get(p.source.name)
        if there is None or not torch.equal(there, merged.to(dtypes[p.kind]).float()):
            raise FinetuneError(f"{path.name}: {p.name} reads back as other weights; this is a mistake in this program")
        largest = max(largest, float((there - merged.float()).abs().max()))
    return largest
