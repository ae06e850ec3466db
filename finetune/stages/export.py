"""The merged model as GGUF files, each read again, compared and scored, with an Ollama Modelfile."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
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
    from finetune.data.training_rows import TokenRow

RELOADED = ("f32", "f16", "bf16")  # the kinds that have an exact expectation
MAX_RELOADED_PARAMETERS = 200_000_000
SCORED_TOKENS = 4096  # of a batch, padding included


def spec(recipe: Recipe) -> Export | None:
    """The formats asked for; None when nothing is exported or merged."""
    return recipe.export if recipe.merge else None


def fingerprint(spec: Export) -> Mapping[str, object]:
    """The program that makes K-quants, where any is asked for: two versions of it write different files."""
    from finetune.backends.llama_cpp import K_QUANTS, quantizer_digests

    return {"llama_quantize": quantizer_digests()} if K_QUANTS.keys() & set(spec.gguf) else {}


def run(spec: Export, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Metrics:
    """Write model-KIND.gguf for every kind, and a Modelfile for the first.

    `reload_difference` is the largest |weight of the GGUF as transformers reads it - merged weight|, for kinds without
    blocks; `perplexity` is that of the merged model and of each file, as transformers reads it, on the same held-out
    rows (exp of nats a supervised token); both for models under 200 M parameters. Raises InputError where the gguf
    package or llama-quantize is missing, or where the architecture or the tokenizer cannot be told to llama.cpp;
    FinetuneError where the reloaded weights are others.
    """
    from finetune.backends import gguf_file, llama_cpp, models

    gguf_file.require_gguf()
    folder = inputs["merge"]
    config: dict[str, Any] = read_json(folder / "config.json")
    gguf_file.architecture(config)
    kinds: list[str] = list(dict.fromkeys(spec.gguf))
    quantizer = llama_cpp.require_quantizer(kinds)
    exact = gguf_file.plan(folder, config, gguf_file.exact_kind(folder))
    plans = {kind: gguf_file.plan(folder, config, kind) for kind in kinds if kind in gguf_file.TYPES}
    tokenizer = models.load_tokenizer(folder)
    header = _header(folder, config, tokenizer)
    _require_space(out, _bytes_needed(kinds, plans, exact))
    differs = header.vocabulary.differs
    if differs:
        ctx.say(
            f"export: llama.cpp reads {differs} in other tokens than this tokenizer; answers to such text may differ"
        )
    for kind, planned in plans.items():
        tracked = ctx.track(planned, f"export {kind}", len(planned))
        gguf_file.write(out / f"model-{kind}.gguf", header, planned, kind, tracked)
    if others := [kind for kind in kinds if kind not in plans]:
        _quantize(quantizer, others, out, header, exact, ctx)
    sizes = {f"model-{kind}.gguf": (out / f"model-{kind}.gguf").stat().st_size for kind in kinds}
    template = _write_modelfile(out, f"model-{kinds[0]}.gguf", header, tokenizer)
    metrics: Metrics = {"bytes": sizes, "tokenizer_exact": not differs, "ollama_template": template}
    metrics |= {"tokenizer_differs": differs} if differs else {}
    return metrics | _read_again(spec, inputs, out, kinds, plans, exact, config, ctx)


def _bytes_needed(kinds: Sequence[str], plans: Mapping[str, list[Planned]], exact: list[Planned]) -> int:
    from finetune.backends.gguf_file import METADATA_BYTES, exact_kind_of, file_bytes
    from finetune.backends.llama_cpp import K_QUANTS

    needed = sum(file_bytes(planned) for planned in plans.values())
    parameters = sum(prod(p.source.shape) for p in exact)
    bits = [K_QUANTS[kind] for kind in kinds if kind not in plans]
    if bits and exact_kind_of(exact) not in plans:
        needed += file_bytes(exact)  # what llama-quantize reads
    return needed + sum(METADATA_BYTES + int(parameters * b / 8) for b in bits)


def _quantize(
    program: str, kinds: Sequence[str], out: Path, header: Header, exact: list[Planned], ctx: Context
) -> None:
    """Write the K-quants from a GGUF that holds the merged weights exactly, which goes unless it was asked for."""
    from finetune.backends import gguf_file, llama_cpp

    kind = gguf_file.exact_kind_of(exact)
    asked = out / f"model-{kind}.gguf"
    source = asked if asked.exists() else out / "source.gguf"
    if source != asked:
        gguf_file.write(source, header, exact, kind, ctx.track(exact, f"export {kind}", len(exact)))
    before = gguf_file.read_facts(source)
    for quant in ctx.track(kinds, "llama-quantize", len(kinds)):
        path = out / f"model-{quant}.gguf"
        llama_cpp.quantize(program, source, path, quant, ctx)
        after = gguf_file.read_facts(path)
        if after != before:
            raise FinetuneError(
                f"{path.name}: llama-quantize wrote other tensors, another template or other terminators than it was "
                "given; take a newer llama.cpp"
            )
    if source != asked:
        source.unlink()


def _read_again(
    spec: Export,
    inputs: Mapping[str, Path],
    out: Path,
    kinds: Sequence[str],
    plans: Mapping[str, list[Planned]],
    exact: list[Planned],
    config: Mapping[str, Any],
    ctx: Context,
) -> Metrics:
    """What each file is as transformers reads it: its distance from the merged weights, and its perplexity."""
    from finetune.data.training_rows import read_token_rows

    if unknown := _unreadable(exact, config):
        ctx.say(f"export: the files are not scored: {unknown}")
        return {"perplexity_unknown": unknown}
    rows = read_token_rows(inputs["render"] / "eval.parquet", spec.perplexity_rows) if spec.perplexity_rows else []
    differences: dict[str, float] = {}
    perplexity: dict[str, float] = {"merged": _perplexity(_load(inputs["merge"], None, ctx), rows, ctx)} if rows else {}
    for kind in kinds:
        path = out / f"model-{kind}.gguf"
        if not rows and kind not in RELOADED:
            continue
        model = _load(out, path.name, ctx)
        if kind in RELOADED:
            differences[path.name] = _reload_difference(model, path, plans[kind])
        if rows:
            perplexity[kind] = _perplexity(model, rows, ctx)
    metrics: Metrics = {"reload_difference": differences} if differences else {}
    if not rows:
        why = "nothing is held out" if spec.perplexity_rows else "export.perplexity_rows is 0"
        return metrics | {"perplexity_unknown": why}
    return metrics | {"perplexity": perplexity, "perplexity_rows": len(rows)}


def _unreadable(planned: list[Planned], config: Mapping[str, Any]) -> str:
    """Why transformers does not read such a file back as it was; "" where it does."""
    from finetune.backends.gguf_file import rope

    if sum(prod(p.source.shape) for p in planned) >= MAX_RELOADED_PARAMETERS:
        return f"a model over {MAX_RELOADED_PARAMETERS // 10**6} M parameters is not read back"
    if config["model_type"] != "qwen2" and any(p.name.endswith(".bias") for p in planned):
        return "transformers has no biases for Llama's GGUF"
    if (kind := rope(config)["rope_type"]) != "default":
        return f"transformers does not read {kind} rotary settings from a GGUF"
    return ""


def _load(folder: Path, gguf: str | None, ctx: Context) -> Any:  # noqa: ANN401 - PreTrainedModel
    """A model in fp32, from safetensors or from one GGUF of the folder; the network is not asked."""
    import torch
    from transformers import AutoModelForCausalLM

    from finetune.backends.models import pick_device

    source = {} if gguf is None else {"gguf_file": gguf}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True, **source)
    return model.to(pick_device(ctx.device)).eval()


def _perplexity(model: Any, rows: Sequence[TokenRow], ctx: Context) -> float:  # noqa: ANN401 - PreTrainedModel
    from finetune.backends.scoring import row_nll
    from finetune.metrics.perplexity import perplexity

    nll, counts = row_nll(model, rows, SCORED_TOKENS, ctx, "perplexity")
    return perplexity(nll, counts)


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


def _reload_difference(model: Any, path: Path, planned: list[Planned]) -> float:  # noqa: ANN401 - PreTrainedModel
    """The largest difference from the merged weights; rounding to the file's kind is the only one allowed."""
    import torch

    dtypes = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    found = model.state_dict()
    largest = 0.0
    for p in planned:
        merged = p.source.load()
        there = found[p.source.name].cpu() if p.source.name in found else None
        if there is None or not torch.equal(there, merged.to(dtypes[p.kind]).float()):
            raise FinetuneError(f"{path.name}: {p.name} reads back as other weights; this is a mistake in this program")
        largest = max(largest, float((there - merged.float()).abs().max()))
    return largest
