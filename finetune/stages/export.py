"""The merged model as GGUF files and quantised folders, each read again, compared and scored."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.context import Context
from finetune.errors import FinetuneError, GateRefused, InputError
from finetune.eval.compare import first_rows
from finetune.metrics import ExportMetrics, Headline
from finetune.recipe import Certify, Export, Recipe, Section
from finetune.utils.files import read_json, write_bytes
from finetune.utils.limits import require_space
from finetune.utils.upstream import no_gguf_bar

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from finetune.gguf.chat import Chat
    from finetune.gguf.reader import GgufWeights
    from finetune.gguf.writer import Header, Planned
    from finetune.quantized.reader import QuantizedWeights
    from finetune.tokenization.token_rows import TokenRow

MAX_LOADED_PARAMETERS = 200_000_000  # transformers takes 4 bytes for each
READ_WHOLE = ("llama", "mistral", "qwen2")  # whose settings transformers reads from a GGUF
MANY_TOKENS = 65_536  # of a smaller model: its states are held for all of them


class Spec(Section):
    """The formats asked for, and how many held-out tokens a large model may be scored on (0 if none is)."""

    export: Export
    tokens: int


def spec(recipe: Recipe) -> Spec | None:
    """None when nothing is exported or merged."""
    if recipe.export is None or recipe.merge is None:
        return None
    tokens = (recipe.certify or Certify()).tokens if recipe.export.perplexity_rows else 0
    return Spec(export=recipe.export, tokens=tokens)


def fingerprint(spec: Spec) -> Mapping[str, object]:
    """The program that makes K-quants, if any is asked for: two versions of it write different files."""
    from finetune.gguf.llama_cpp import K_QUANTS, quantizer_digests

    return {"llama_quantize": quantizer_digests()} if K_QUANTS.keys() & set(spec.export.gguf) else {}


def run(spec: Spec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> ExportMetrics:
    """Write model-KIND.gguf for every kind with a Modelfile for the first, and a folder for every kind of `hf`.

    Every file is read again, a tensor at a time. `reload_difference` is the largest |weight of the GGUF - merged
    weight|, for kinds without blocks; `perplexity` (exp of nats a supervised token) is that of the merged model and of
    each file on the same held-out rows, `agreement` and `mean_kl` set each file beside the merged model. transformers
    reads small models too, and must find the same weights; `not_loaded`: why it did not. Raises InputError if
    a package or llama-quantize is missing, or if the architecture or the tokenizer cannot be described to
    llama.cpp; FinetuneError if the weights in a file are others; GateRefused if a file's perplexity or template
    is not the merged model's.
    """
    from finetune.gguf.scoring import Kind, score
    from finetune.models.device import pick_device
    from finetune.utils.safetensors_io import read_folder

    folder = inputs["merge"]
    refs = read_folder(folder).values()
    parameters = sum(prod(ref.shape) for ref in refs)
    kinds: dict[str, GgufWeights] = {}
    metrics: ExportMetrics = {}
    if spec.export.gguf:
        kinds, metrics = _write_gguf(spec, inputs, out, ctx)
    folders = _write_hf(spec, folder, out, ctx)
    sizes = metrics.get("bytes", {}) | {
        kind: sum(p.stat().st_size for p in w.folder.glob("*.safetensors")) for kind, w in folders.items()
    }
    bits = {_kind(name): round(8 * size / parameters, 3) for name, size in sizes.items()}
    merged_bits = round(8 * sum(r.size_bytes for r in refs) / parameters, 3)
    metrics = {**metrics, "bytes": sizes, "bits_per_weight": {"merged": merged_bits} | bits}
    rows = _rows(spec, inputs["render"] / "eval.parquet", parameters, ctx) if "render" in inputs else []
    small = parameters < MAX_LOADED_PARAMETERS
    if not rows:
        for weights in kinds.values():
            weights.require_finite()
        for quantized in folders.values():
            quantized.require_finite()
            if small:
                quantized.require_loaded([], None, ctx)
        why = "nothing is held out" if spec.export.perplexity_rows else "export.perplexity_rows is 0"
        return {**metrics, "perplexity_unknown": why}
    files = {kind: Kind(w) for kind, w in kinds.items()} | {k: Kind(w, w.prepare) for k, w in folders.items()}
    scores = score(folder, files, rows, pick_device(ctx.device), ctx)
    for kind, quantized in folders.items() if small else ():
        quantized.require_loaded(rows, scores.perplexity[kind], ctx)
    _refuse_ruined(scores.perplexity, spec.export.max_perplexity_ratio)
    return {
        **metrics,
        "perplexity": scores.perplexity,
        "agreement": scores.agreement,
        "mean_kl": scores.mean_kl,
        "perplexity_rows": scores.rows,
        "perplexity_tokens": scores.tokens,
    }


def headline(m: ExportMetrics) -> Headline:
    """Return the row of this stage in a table of stages."""
    listed = ", ".join(f"{kind} {value:.4g}" for kind, value in m.get("perplexity", {}).items())
    return Headline(listed and f"perplexity {listed}")


def _kind(file: str) -> str:
    return file.removeprefix("model-").removesuffix(".gguf")


def _refuse_ruined(perplexity: Mapping[str, float], most: float) -> None:
    """Raise GateRefused if a file's perplexity is more than `most` times the merged model's."""
    ratios = {kind: value / perplexity["merged"] for kind, value in perplexity.items()}
    if ruined := [f"{kind} ({ratio:.2f})" for kind, ratio in ratios.items() if ratio > most]:
        raise GateRefused(
            f"export: the perplexity divided by that of the merged model is above export.max_perplexity_ratio {most:g} "
            f"in {', '.join(ruined)}; choose a format with more bits, or raise export.max_perplexity_ratio"
        )


def _write_hf(spec: Spec, folder: Path, out: Path, ctx: Context) -> dict[str, QuantizedWeights]:
    """Write the quantised folders; return their weights by format."""
    from finetune.quantized import formats, reader, writer

    if why := formats.missing(spec.export.hf):
        raise InputError(f"export.hf: {why}")
    weights: dict[str, QuantizedWeights] = {}
    for kind in dict.fromkeys(spec.export.hf):
        writer.write(folder, out / kind, writer.plan(folder, kind), ctx)
        weights[kind] = reader.QuantizedWeights(out / kind)
    return weights


def _write_gguf(
    spec: Spec, inputs: Mapping[str, Path], out: Path, ctx: Context
) -> tuple[dict[str, GgufWeights], ExportMetrics]:
    """Write the GGUF files and the Modelfile and compare their weights; return these by kind, and metrics."""
    from finetune.gguf import llama_cpp
    from finetune.gguf import writer as gguf_writer
    from finetune.gguf.support import window_note
    from finetune.models import loading

    gguf_writer.require_gguf()
    folder = inputs["merge"]
    config: dict[str, Any] = read_json(folder / "config.json")
    kinds: list[str] = list(dict.fromkeys(spec.export.gguf))
    quantizer = llama_cpp.require_quantizer(kinds)
    exact_kind = gguf_writer.exact_kind(folder)
    exact = gguf_writer.plan(folder, config, exact_kind)
    plans = {kind: gguf_writer.plan(folder, config, kind) for kind in kinds if kind in gguf_writer.TYPES}
    tokenizer = loading.load_tokenizer(folder)
    header = _header(folder, config, tokenizer)
    needed = _bytes_needed(kinds, {exact_kind: exact, **plans}, exact_kind)
    require_space(out, needed, "export: the set of GGUF files", "ask for fewer kinds")
    differs = header.vocabulary.differs
    if differs:
        ctx.say(
            f"export: llama.cpp reads {differs} in other tokens than this tokenizer; answers to such text may differ"
        )
    if note := window_note(config):
        ctx.say(f"export: {note}")
    for kind, planned in plans.items():
        tracked = ctx.track(planned, f"export {kind}", len(planned))
        gguf_writer.write(out / f"model-{kind}.gguf", header, planned, kind, tracked)
    if others := [kind for kind in kinds if kind not in plans]:
        _quantize(quantizer, others, out, header, exact_kind, exact, ctx)
    sizes = {f"model-{kind}.gguf": (out / f"model-{kind}.gguf").stat().st_size for kind in kinds}
    _refuse_other_chats([out / name for name in sizes], header, tokenizer, inputs)
    template = _write_modelfile(out, f"model-{kinds[0]}.gguf", header, tokenizer)
    metrics: ExportMetrics = {"bytes": sizes, "tokenizer_exact": not differs, "ollama_template": template}
    if differs:
        metrics["tokenizer_differs"] = differs
    files, read = _read_again(folder, out, kinds, plans, exact, config, ctx)
    return files, {**metrics, **read}


def _bytes_needed(kinds: Sequence[str], plans: Mapping[str, list[Planned]], exact: str) -> int:
    from finetune.gguf.writer import bytes_of_kinds, file_bytes

    return bytes_of_kinds(kinds, exact, _parameters(plans[exact]), lambda kind: file_bytes(plans[kind]))


def _quantize(
    program: str, kinds: Sequence[str], out: Path, header: Header, kind: str, exact: list[Planned], ctx: Context
) -> None:
    """Write the K-quants from a GGUF that holds the merged weights exactly, which goes unless it was asked for."""
    from finetune.gguf import llama_cpp
    from finetune.gguf import writer as gguf_writer

    asked = out / f"model-{kind}.gguf"
    source = asked if asked.exists() else out / "source.gguf"
    if source != asked:
        gguf_writer.write(source, header, exact, kind, ctx.track(exact, f"export {kind}", len(exact)))
    before = gguf_writer.read_facts(source)
    for quant in ctx.track(kinds, "llama-quantize", len(kinds)):
        path = out / f"model-{quant}.gguf"
        llama_cpp.quantize(program, source, path, quant, ctx)
        after = gguf_writer.read_facts(path)
        if after != before:
            raise FinetuneError(
                f"{path.name}: llama-quantize wrote other tensors, another template or other terminators than it was "
                "given; take a newer llama.cpp"
            )
    if source != asked:
        source.unlink()


def _read_again(
    folder: Path,
    out: Path,
    kinds: Sequence[str],
    plans: Mapping[str, list[Planned]],
    exact: list[Planned],
    config: Mapping[str, Any],
    ctx: Context,
) -> tuple[dict[str, GgufWeights], ExportMetrics]:
    """The weights in each file, and how far they are from the merged ones."""
    from finetune.gguf.reader import ROUNDED, GgufWeights

    files = {kind: GgufWeights(out / f"model-{kind}.gguf", exact, plans.get(kind)) for kind in kinds}
    differences = {}
    not_loaded = _not_loaded(exact, config)
    for kind, weights in files.items():
        if not not_loaded:
            weights.require_same(_loaded(weights.path, folder))
        if kind in ROUNDED:
            tracked = ctx.track(plans[kind], f"reading {weights.path.name}", len(exact))
            differences[weights.path.name] = max(weights.difference(p) for p in tracked)
    metrics: ExportMetrics = {"reload_difference": differences} if differences else {}
    return files, {**metrics, "not_loaded": not_loaded} if not_loaded else metrics


def _rows(spec: Spec, path: Path, parameters: int, ctx: Context) -> list[TokenRow]:
    """Return the held-out rows to score; a large model (`parameters`) is scored on fewer tokens."""
    from finetune.tokenization.token_rows import read_token_rows

    if not spec.export.perplexity_rows:
        return []
    rows = [row for row in read_token_rows(path, spec.export.perplexity_rows) if row.mask[1:].any()]
    most = spec.tokens if parameters >= MAX_LOADED_PARAMETERS else MANY_TOKENS
    chosen = first_rows(rows, most)
    if len(chosen) < len(rows):
        ctx.say(f"export: {len(chosen)} of {len(rows)} held-out rows are scored, {most:,} tokens at most")
    return [rows[i] for i in chosen]


def _parameters(planned: list[Planned]) -> int:
    return sum(prod(p.source.shape) for p in planned)


def _not_loaded(planned: list[Planned], config: Mapping[str, Any]) -> str:
    """Why transformers does not read such a file back as it was; "" if it does."""
    from finetune.gguf.support import of_config, rope

    if not (arch := of_config(config)).reloaded:
        return f"it reads no GGUF of a {arch.name}"
    if _parameters(planned) >= MAX_LOADED_PARAMETERS:
        return f"a model over {MAX_LOADED_PARAMETERS // 10**6} M parameters would take it 4 bytes for each"
    if config["model_type"] in ("llama", "mistral") and any(p.name.endswith(".bias") for p in planned):
        return "it has no biases for Llama's GGUF"
    if (kind := rope(config)["rope_type"]) != "default":
        return f"it does not read {kind} rotary settings from a GGUF"
    return ""


def _loaded(path: Path, merged: Path) -> Mapping[str, torch.Tensor]:
    """The weights of a file as transformers reads them, fp32; the network is not asked.

    The model is that of the merged configuration if transformers does not read every setting from the file.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    source: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    if read_json(merged / "config.json")["model_type"] not in READ_WHOLE:
        source["config"] = AutoConfig.from_pretrained(merged, local_files_only=True)
    with no_gguf_bar():
        model: Any = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **source)
    state: Mapping[str, torch.Tensor] = model.state_dict()
    return state


def _header(folder: Path, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Header:
    from transformers import PreTrainedTokenizerFast

    from finetune.gguf.vocabulary import read_vocabulary
    from finetune.gguf.writer import Header
    from finetune.tokenization.chat_template import default_template
    from finetune.tokenization.template_sandbox import check_template

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
    if template := default_template(tokenizer):
        check_template(template, tokenizer.special_tokens_map, "export: the model's chat template")
    return Header(
        config=config,
        vocabulary=read_vocabulary(folder, content, config["vocab_size"], bos if isinstance(bos, str) else None),
        special={name: i for name, i in ids.items() if isinstance(i, int)},
        terminators=terminators,
        template=template,
    )


def _write_modelfile(out: Path, weights: str, header: Header, tokenizer: PreTrainedTokenizerBase) -> str:
    """Write the Modelfile; return the source of Ollama's template: "modelfile", or "gguf"."""
    from finetune.gguf.ollama import modelfile, read_pieces

    tokens = header.vocabulary.tokens
    bos = tokens[header.special["bos"]] if header.vocabulary.add_bos else None
    pieces = read_pieces(lambda chat, prompt: _rendered(tokenizer, chat, prompt)) if header.template else None
    stops = [tokens[i] for i in header.terminators]
    write_bytes(out / "Modelfile", modelfile(weights, pieces, stops, bos).encode())
    return "gguf" if pieces is None else "modelfile"


def _refuse_other_chats(
    paths: Sequence[Path], header: Header, tokenizer: PreTrainedTokenizerBase, inputs: Mapping[str, Path]
) -> None:
    """Raise GateRefused if a file's chat template or terminators are not those that were trained."""
    from finetune.gguf.chat import differences

    trained = inputs.get("render", Path()) / "template"
    text, ends = header.template, header.terminators
    if (trained / "template.json").exists():
        text = (trained / "inference.jinja").read_text(encoding="utf-8")
        ends = tuple(read_json(trained / "template.json")["terminators"])
    for path in paths:
        ours = partial(_rendered, tokenizer, prompt=True, template=text) if text else None
        if differing := list(differences(path, ours, ends)):
            raise GateRefused(f"export: {path.name} does not write conversations as they were trained: {differing[0]}")


def _rendered(tokenizer: PreTrainedTokenizerBase, chat: Chat, prompt: bool, template: str | None = None) -> str:
    from jinja2 import TemplateError

    from finetune.tokenization.template_sandbox import RenderingTooLong, limited

    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": prompt, "chat_template": template}
    try:
        with limited(len(chat)):
            return str(tokenizer.apply_chat_template(list(chat), **options))
    except TemplateError as error:
        raise ValueError(str(error)) from error
    except RenderingTooLong:
        raise InputError(
            f"export: the chat template does not finish in the allowed time on a conversation of {len(chat)} turns; "
            "fix it, or set render.template to another"
        ) from None
