"""A merged model as one GGUF file for llama.cpp, Ollama and LM Studio, written one tensor at a time.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Mistral is llama.cpp's `llama`, whose rotary
embedding turns neighbouring dimensions (2i, 2i + 1) together where transformers turns (i, i + d/2): the rows of q and k
change places. Qwen2's rotary embedding is that of transformers, so its rows stay.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import InputError
from finetune.gguf.llama_cpp import K_QUANTS
from finetune.gguf.support import PARTIAL, of_config, rope, tensor_name
from finetune.gguf.vocabulary import Vocabulary
from finetune.utils.safetensors_io import FLOATS, TensorRef, read_folder

if TYPE_CHECKING:
    import numpy as np
    import torch
    from gguf import GGUFWriter

# name in the file -> (values a block, bytes a block), for a plan made without the package gguf
TYPES = {
    "f32": (1, 4), "f16": (1, 2), "bf16": (1, 2),
    "q4_0": (32, 18), "q4_1": (32, 20), "q5_0": (32, 22), "q5_1": (32, 24), "q8_0": (32, 34),
}  # fmt: skip
ENDS = ("token_embd.weight", "output.weight")
TEMPLATE_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}  # jinja's word → GGUF's
METADATA_BYTES = 8_000_000
ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class Header:
    """Metadata of the file."""

    config: Mapping[str, Any]  # config.json
    vocabulary: Vocabulary
    special: Mapping[str, int]  # "bos", "eos", "pad", "unk" -> token id, those there are
    terminators: tuple[int, ...]  # every token that ends an answer; the first is eos
    template: str | None


@dataclass(frozen=True, slots=True)
class Planned:
    """One tensor of the file."""

    name: str
    kind: str  # one of TYPES
    source: TensorRef
    heads: int  # heads whose rows change places; 0 leaves them
    offset: float = 0.0  # added to every value

    @property
    def size_bytes(self) -> int:
        """Bytes of its data in the file, without padding."""
        return data_bytes(self.source.shape, self.kind)


def require_gguf() -> None:
    """Raise InputError unless the `gguf` package is there."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise InputError("export.gguf needs the gguf package: pip install gguf") from error


def plan(folder: Path, config: Mapping[str, Any], kind: str) -> list[Planned]:
    """Every tensor of the file, known from shapes alone, in the order of the layers.

    One dimension stays f32, as llama.cpp wants it. Under a quantised kind a row that 32 does not divide is f16, and
    under q4 and q5 the embedding and the head are q8_0: llama.cpp keeps them finer too. Raises InputError for a tensor
    without a place.
    """
    arch = of_config(config)
    heads = {"attn_q": config["num_attention_heads"] if arch.permuted else 0}
    heads["attn_k"] = (config.get("num_key_value_heads") or config["num_attention_heads"]) if arch.permuted else 0
    planned = []
    for name, ref in read_folder(folder).items():
        if name.endswith("rotary_emb.inv_freq"):
            continue  # of older files; every reader computes it
        target = tensor_name(name, arch)
        if ref.dtype not in FLOATS:
            raise InputError(f"{ref.file}: {name} is {ref.dtype}; a GGUF is written from {', '.join(sorted(FLOATS))}")
        part = target.split(".")[2] if target.startswith("blk.") else ""
        offset = arch.offset if target.endswith("norm.weight") else 0.0
        planned.append(Planned(target, stored_kind(target, ref.shape, kind), ref, heads.get(part, 0), offset))
    return sorted(planned, key=lambda p: _order(p.name))


def exact_kind(folder: Path) -> str:
    """The kind that holds the weights of a folder as they are: bf16 or f16 if all are that, else f32."""
    dtypes = {ref.dtype for ref in read_folder(folder).values() if len(ref.shape) > 1}
    return {"BF16": "bf16", "F16": "f16"}.get(dtypes.pop(), "f32") if len(dtypes) == 1 else "f32"


def read_facts(path: Path) -> dict[str, Any]:
    """Facts read from a finished file: `tensors` (name → shape), `template`, `terminators` (token ids), `strings` (text
    of the tokens that a template may name: bos_token, eos_token, …, as far as the file has them).
    """
    import gguf

    reader = gguf.GGUFReader(path)
    names = ("eos_token_id", "eot_token_id", "eom_token_id")
    ends = [reader.get_field(f"tokenizer.ggml.{name}") for name in names]
    template = reader.get_field("tokenizer.chat_template")
    tokens = reader.get_field("tokenizer.ggml.tokens")
    named = {f"{n}_token": reader.get_field(f"tokenizer.ggml.{k}_token_id") for n, k in TEMPLATE_TOKENS.items()}
    return {
        "tensors": {t.name: [int(n) for n in t.shape] for t in reader.tensors},
        "template": template.contents() if template else None,
        "terminators": [int(end.contents()) for end in ends if end],
        "strings": {n: tokens.contents(int(i.contents())) for n, i in named.items() if i and tokens},
    }


def data_bytes(shape: Sequence[int], kind: str) -> int:
    """Bytes of a tensor's data in a file, without padding."""
    values, size = TYPES[kind]
    return prod(shape) // values * size


def file_bytes(planned: Iterable[Planned]) -> int:
    """Bytes the file will take at most, with room for the metadata."""
    return bytes_with_metadata(p.size_bytes for p in planned)


def bytes_with_metadata(tensors: Iterable[int]) -> int:
    """Return the size of a GGUF file at most; `tensors` are the bytes of each tensor."""
    return METADATA_BYTES + sum(size + ALIGNMENT for size in tensors)


def bytes_of_kinds(kinds: Iterable[str], exact: str, parameters: int, file_of: Callable[[str], int]) -> int:
    """Bytes of a file of each of `kinds`, and of the `exact` one that K-quants are made from, asked for or not.

    `file_of` gives the bytes of a kind that is written here; a K-quant's are about its bits a weight.
    """
    asked = set(kinds)
    quants = asked & K_QUANTS.keys()
    written = (asked - quants) | ({exact} if quants else set())
    return sum(map(file_of, written)) + sum(METADATA_BYTES + int(parameters * K_QUANTS[q] / 8) for q in quants)


def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k, (heads * d, …), from transformers' order (two halves) to llama.cpp's (pairs)."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k, (heads * d, …), from llama.cpp's order (pairs) back to transformers' (two halves)."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write(
    path: Path, header: Header, planned: Sequence[Planned], kind: str, tracked: Iterable[Planned] | None = None
) -> None:
    """Write the file, holding one tensor at a time; synced to disk. The same model is the same bytes.

    `tracked` is `planned` once more, under a progress bar. Raises InputError if a value does not fit into f16.
    """
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, of_config(header.config).name)
    _describe(writer, header, kind, sum(prod(p.source.shape) for p in planned))
    factors = _rope_factors(header.config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for p in planned:
        number = gguf.GGMLQuantizationType[p.kind.upper()]
        writer.add_tensor_info(p.name, p.source.shape, np.dtype(np.float32), p.size_bytes, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        if factors is not None:
            writer.write_tensor_data(factors)
        for p in planned if tracked is None else tracked:
            writer.write_tensor_data(_data(p))
    finally:
        writer.close()
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _data(planned: Planned) -> np.ndarray[Any, Any]:
    """The tensor's bytes in the file."""
    import gguf
    import torch

    weight = planned.source.load()
    if planned.heads:
        weight = permute(weight, planned.heads)
    if planned.offset:
        weight = weight.float() + planned.offset
    if planned.kind == "bf16":  # numpy has no bfloat16; torch rounds to the nearest even, as llama.cpp does
        return weight.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    if planned.kind == "f16":
        weight = weight.to(torch.float16)
        if not bool(weight.isfinite().all()):
            raise InputError(f"{planned.source.name} holds values beyond f16 (65504); export bf16 or f32 instead")
        return weight.contiguous().numpy()
    values = weight.to(torch.float32).contiguous().numpy()
    number = gguf.GGMLQuantizationType[planned.kind.upper()]
    result: np.ndarray[Any, Any] = gguf.quants.quantize(values, number)
    return result


def stored_kind(name: str, shape: Sequence[int], kind: str) -> str:
    """Return the storage type of the tensor `name` in a file of `kind`."""
    if len(shape) == 1:
        return "f32"
    if shape[-1] % TYPES[kind][0]:
        return "f16"
    return "q8_0" if kind.startswith(("q4", "q5")) and name in ENDS else kind


def _order(name: str) -> tuple[int, str]:
    if name.startswith("blk."):
        return int(name.split(".")[1]) + 1, name
    return (0, name) if name.startswith("token") else (1 << 30, name)


def _describe(writer: GGUFWriter, header: Header, kind: str, parameters: int) -> None:
    """Return every key of the metadata, from the files of the merged folder: no date, no path, no program."""
    import gguf

    config, arch = header.config, of_config(header.config).name
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_type("model")
    # llama.cpp takes "phi3" in a name for Phi-3's tokenizer, and fails where its tokens are missing
    kept = str(config["model_type"]).replace("phi3", "phi")
    writer.add_name(f"{'phi3' if header.vocabulary.strips else kept}-{parameters / 1e9:.3g}B")
    writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if kind == 'f32' else 'MOSTLY'}_{kind.upper()}"])
    if kind.startswith("q"):
        writer.add_quantization_version(2)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    _describe_architecture(writer, arch, config, width)
    _describe_rope(writer, config)
    _describe_vocabulary(writer, header)


def _describe_architecture(writer: GGUFWriter, arch: str, config: Mapping[str, Any], width: int) -> None:
    """Return metadata that llama.cpp needs for some architectures; `width` is that of a head."""
    if "rms_norm_eps" in config:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    else:
        writer.add_layer_norm_eps(config.get("layer_norm_eps") or config["norm_epsilon"])
    if arch == "llama" or arch in PARTIAL:
        writer.add_rope_dimension_count(int(rope(config)["partial_rotary_factor"] * width))
    if arch == "phi3":
        writer.add_rope_scaling_orig_ctx_len(
            config.get("original_max_position_embeddings") or config["max_position_embeddings"]
        )
    if arch == "stablelm":
        writer.add_parallel_residual(bool(config.get("use_parallel_residual", False)))
    if arch in ("phi3", "gemma2", "gemma3", "cohere2"):  # 0: a phi3 without one
        writer.add_sliding_window(config.get("sliding_window") or 0)
    if arch == "cohere2":
        writer.add_logit_scale(config.get("logit_scale", 0.0625))
    for field, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
    ):
        if config.get(field):
            add(config[field])
    if arch == "granite":
        writer.add_attention_scale(config.get("attention_multiplier", 1.0))
        writer.add_embedding_scale(config.get("embedding_multiplier", 1.0))
        writer.add_residual_scale(config.get("residual_multiplier", 1.0))
        writer.add_logit_scale(config.get("logits_scaling", 1.0))  # llama.cpp divides by it, as transformers does


def _describe_rope(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    import gguf

    settings = rope(config)
    kind = settings["rope_type"]
    writer.add_rope_freq_base(settings["rope_theta"])
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(settings["factor"])
    if kind == "yarn":
        original = settings.get("original_max_position_embeddings") or config["max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(original)


def _rope_factors(config: Mapping[str, Any]) -> np.ndarray[Any, Any] | None:
    """Return llama.cpp's divisors of Llama-3.1's rotary frequencies, (d/2,) float32; None for other models.

    The formula is transformers' `_compute_llama3_parameters`, written as a divisor.
    """
    import numpy as np

    settings = rope(config)
    if settings["rope_type"] != "llama3":
        return None
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    low, high, factor = settings["low_freq_factor"], settings["high_freq_factor"], settings["factor"]
    factors = []
    for i in range(0, width, 2):
        turns = settings["original_max_position_embeddings"] * settings["rope_theta"] ** (-i / width) / (2 * math.pi)
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


def _describe_vocabulary(writer: GGUFWriter, header: Header) -> None:
    vocabulary, special = header.vocabulary, header.special
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.add_space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(False)
    adders = {"bos": writer.add_bos_token_id, "pad": writer.add_pad_token_id, "unk": writer.add_unk_token_id}
    for name, add in adders.items():
        if name in special:
            add(special[name])
    # the format has three keys for a token that ends an answer; llama.cpp stops at each of them
    ends = header.terminators or ((special["eos"],) if "eos" in special else ())
    keys = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for token, add in zip(ends, keys, strict=False):
        add(token)
    if header.template:
        writer.add_chat_template(header.template)
