"""Bytes on the GPU, in RAM and on disk, by use. Weights, adapter, gradients and optimiser are exact."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from finetune.estimate.activations import MicroBatch, Policy, peak
from finetune.estimate.shapes import Shapes, decoder, saved_tensors, token_tables, trained_tensors
from finetune.gguf.writer import ENDS, bytes_of_kinds, bytes_with_metadata, data_bytes, stored_kind
from finetune.lora.config import is_saved
from finetune.models.inventory import why_not_packed
from finetune.models.quantized_cache import wanted
from finetune.quantized.formats import bytes_of
from finetune.recipe import Export, Lora, Merge, Quantization, Recipe, Runtime, Train

GIB = 1 << 30
BLOCK = 64  # bitsandbytes quantises 64 weights with one scale
NESTED_BLOCK = 256  # with double quantisation: 256 scales share one scale
CODE_BYTES = 16 * 4  # each matrix has a table of 16 values
NESTED_CODE_BYTES = 256 * 4 + 4  # with double quantisation: a table of 256 scale values, and the scales' mean
STATE_BLOCK = 256  # bitsandbytes' 8-bit optimisers: elements per scale
LEAST_8BIT = 4096  # tensors with fewer elements keep fp32 state
STATE_TABLES = 2 * 256 * 4  # value tables of both moments, once for all tensors

CONTEXT_BYTES = int(0.7 * GIB)  # assumed: CUDA's context, and the workspaces of cuBLAS
UNUSED_SHARE = 0.05  # assumed: of what comes and goes in a step, what torch's allocator holds and does not fill
OTHER_LAYERS = 0.15  # of the activations, more for layers that are not Llama's: 0.88 of them predicted at worst (phi)
PROCESS_BYTES = 3_000_000_000  # assumed: Python with torch, transformers and CUDA's libraries in RAM
SHARD_BYTES = 1_000_000_000  # size of a file of the 4-bit copy
STREAM_BYTES = 1_000_000_000  # merging is tensor by tensor: 0.49 GB for a 7B
KINDS = ("activations", "layer_inputs", "scores", "mask", "logits", "dequantized")


@dataclass(frozen=True)
class Training:
    """Properties of a recipe, and of its rows once they exist, that determine the bytes of training."""

    lora: Lora
    quantization: Quantization | None
    train: Train
    runtime: Runtime
    packed: bool
    row_tokens: int  # of the longest row
    sequences: int = 1  # rows that one of a batch's units is: two of a pair
    reference: bool = False  # preference training: a frozen copy of the adapter, and a forward more without gradients

    @classmethod
    def of(cls, recipe: Recipe, base: Path | None = None) -> Training:
        """Build with the longest rows that the recipe allows; `base` is the folder of a finished base stage, which
        records whether rows can be packed.
        """
        packed = recipe.pack is not None and (base is None or why_not_packed(base) is None)
        own = recipe.pack.length_tokens if recipe.pack and packed else None
        return cls(
            lora=recipe.lora,
            quantization=recipe.quantization,
            train=recipe.training,
            runtime=recipe.runtime,
            packed=packed,
            row_tokens=own or recipe.render.max_length_tokens,
        )

    @classmethod
    def of_preference(cls, recipe: Recipe) -> Training:
        """The preference training of a recipe that has the section, with the longest pairs that it allows."""
        asked = recipe.preference
        assert asked is not None  # noqa: S101
        return cls(
            lora=recipe.lora,
            quantization=recipe.quantization,
            train=recipe.alignment,
            runtime=recipe.runtime,
            packed=False,
            row_tokens=asked.max_length_tokens or recipe.render.max_length_tokens,
            sequences=2 if asked.method == "dpo" else 1,
            reference=True,
        )


def weight_bytes(shapes: Shapes, quantization: Quantization | None, element: int = 2) -> int:
    """Return the bytes of the base as stored by bitsandbytes: 4-bit codes, scales and tables; the rest with `element`
    bytes per element. The rotary frequencies exist twice.
    """
    other = element * shapes.other_parameters + 4 * shapes.head_dim
    if quantization is None:
        return element * shapes.quantized_parameters + other
    sizes = Counter(inner * outer for _, inner, outer in shapes.matrices)
    return sum(n * _matrix_bytes(size, double=quantization.double) for size, n in sizes.items()) + other


def _matrix_bytes(count: int, *, double: bool) -> int:
    """Return the bytes of a matrix of `count` elements; the last blocks of weights and scales may be partial."""
    scales = -(-count // BLOCK)
    codes = -(-count // 2) + CODE_BYTES
    return codes + (scales + 4 * -(-scales // NESTED_BLOCK) + NESTED_CODE_BYTES if double else 4 * scales)


def adapter_bytes(shapes: Shapes, lora: Lora) -> int:
    """Return the bytes of the adapter in fp32; its gradients need as much again."""
    return 4 * sum(trained_tensors(shapes, lora))


def optimizer_bytes(shapes: Shapes, lora: Lora, optimizer: str) -> int:
    """Return the bytes of two moments per trained element: fp32, or 8 bits with a scale per block for large tensors."""
    tensors = trained_tensors(shapes, lora)
    if "8bit" not in optimizer:
        return 8 * sum(tensors)
    large = [n for n in tensors if n >= LEAST_8BIT]
    states = sum(2 * n + 2 * 4 * -(-n // STATE_BLOCK) for n in large)
    return states + 8 * (sum(tensors) - sum(large)) + (STATE_TABLES if large else 0)


@dataclass(frozen=True)
class Attention:
    """Attention kernels of a device: `varlen` handles packed rows without a mask; without `grouped` an unmasked call
    with fewer key heads than query heads has no fused kernel (memory-efficient attention, the only one before sm80).
    """

    varlen: bool = False
    grouped: bool = True


GROUPED = Attention()


def micro_batch(
    shapes: Shapes, run: Training, rows: int, policy: Policy, attention: Attention, *, held: bool
) -> MicroBatch:
    """Return the micro-batch of `rows` of the longest rows on a GPU. Packed rows are one row. Padded or packed rows
    need a mask with SDPA, and so do rows that are not shorter than the base's sliding window.
    """
    rows, length, half = rows * run.sequences, run.row_tokens, run.train.precision != "fp32"
    shape = (1, rows * length) if run.packed else (rows, length)
    mask = not attention.varlen if run.packed else rows > 1 or windowed(shapes, run)
    scores = not (mask or attention.varlen or attention.grouped) and shapes.heads != shapes.kv_heads
    # a fully trained embedding or norm is fp32, which makes the residual stream fp32
    half = half and not any(
        is_saved(run.lora, n) for n in ("embed_tokens", "input_layernorm", "post_attention_layernorm")
    )
    fused = (
        run.runtime.fused_adapters != "off"
        and not run.reference
        and half
        and run.quantization is not None
        and not run.lora.dora
    )
    return MicroBatch(*shape, mask=mask, half=half, cuda=True, policy=policy, held=held, scores=scores, fused=fused)


def windowed(shapes: Shapes, run: Training) -> bool:
    """Return whether the base's sliding window makes SDPA need a dense mask that causal attention does not need."""
    return shapes.window is not None and shapes.window <= run.row_tokens


def training(
    shapes: Shapes, run: Training, rows: int, policy: Policy = "full", attention: Attention = GROUPED, world: int = 1
) -> dict[str, int]:
    """Return peak bytes on the GPU of a training with micro-batches of `rows`, by use.

    The peak is in a backward, or in the optimiser's step, when all gradients exist and no activations.
    """
    several = rows * world < run.train.batch_rows
    batch = micro_batch(shapes, run, rows, policy, attention, held=several)
    step_peak = peak(decoder(shapes, run.lora, quantized=run.quantization is not None), batch)
    adapter = adapter_bytes(shapes, run.lora)
    whole = 4 * sum(saved_tensors(shapes, run.lora))
    gradients = step_peak.get("gradients", 0) + (adapter if several else whole)
    # torch's AdamW computes the root of all second moments at once
    in_step = {"gradients": adapter, "optimizer_step": adapter if run.train.optimizer == "adamw" else 0}
    in_backward = {"gradients": gradients, **{k: step_peak.get(k, 0) for k in KINDS}}
    if shapes.inventory is not None:
        in_backward["other_layers"] = int(OTHER_LAYERS * step_peak.get("activations", 0))
    in_backward["new_tokens"] = new_token_bytes(shapes, run.lora, 2 if batch.half else 4)
    most = max((in_backward, in_step), key=lambda parts: sum(parts.values()))
    return {
        "weights": weight_bytes(shapes, run.quantization, 4 if run.train.precision == "fp32" else 2),
        "adapter": adapter,
        **({"reference_adapter": adapter} if run.reference else {}),
        "optimizer": optimizer_bytes(shapes, run.lora, run.train.optimizer),
        **{kind: size for kind, size in most.items() if size},
        "unused": int(UNUSED_SHARE * sum(most.values())),
        "device": CONTEXT_BYTES,
    }


def new_token_bytes(shapes: Shapes, lora: Lora, element: int) -> int:
    """Of a head in which new tokens' rows are trained: peft's copy of the whole with these rows, the gradient of that
    copy, which TRL sums in fp32, and its cast (trl/kernels/chunked_logprob.py; peft/tuners/trainable_tokens/layer.py).
    """
    return shapes.vocabulary * shapes.hidden * (2 * element + 4) if token_tables(shapes, lora) else 0


def ram(shapes: Shapes, recipe: Recipe, rows: int, policy: Policy) -> dict[str, int]:
    """Return peak bytes of RAM of each part of the work, including the process itself."""
    largest = max(shapes.vocabulary * shapes.hidden, *(i * o for _, i, o in shapes.matrices), _experts_of_layer(shapes))
    offloaded = 2 * shapes.layers * rows * Training.of(recipe).row_tokens * shapes.hidden if policy == "offload" else 0
    copying = SHARD_BYTES if keeps_copy(shapes, recipe) else 0
    return {
        "quantise": PROCESS_BYTES + 3 * 2 * largest + copying,
        "train": PROCESS_BYTES + offloaded,
        "certify": _layer_by_layer(shapes) if recipe.certify and recipe.merge else 0,
        "merge": STREAM_BYTES if recipe.merge else 0,
        "export": (_layer_by_layer(shapes) if recipe.export.perplexity_rows else STREAM_BYTES) if recipe.export else 0,
    }


def _experts_of_layer(shapes: Shapes) -> int:
    """Return the approximate elements of the fused experts of one layer."""
    return shapes.inventory.experts // shapes.layers if shapes.inventory else 0


def _layer_by_layer(shapes: Shapes) -> int:
    """Return the bytes of a layer-wise forward in fp32: three layers (3.5 GB for a 7B, as measured) or two heads."""
    layer = shapes.quantized_parameters // shapes.layers + _experts_of_layer(shapes)
    return STREAM_BYTES + 4 * max(3 * layer, 2 * shapes.vocabulary * shapes.hidden)


def disk(shapes: Shapes, recipe: Recipe) -> dict[str, int]:
    """Return bytes by root: scratch has the download, the 4-bit copy, the merged model and its GGUF files; artifacts
    has the adapter and its checkpoints.
    """
    adapter = adapter_bytes(shapes, recipe.lora)
    optimizer = optimizer_bytes(shapes, recipe.lora, recipe.training.optimizer)
    best = adapter if recipe.training.keep_best else 0
    return {
        "download": _bytes_of(shapes.dtype) * shapes.parameters if recipe.model.kind == "hub" else 0,
        "quantized_copy": weight_bytes(shapes, recipe.quantization) if keeps_copy(shapes, recipe) else 0,
        "merged": _bytes_of(_merged_dtype(shapes, recipe.merge)) * shapes.parameters if recipe.merge else 0,
        "export": _export_bytes(shapes, recipe.merge, recipe.export) if recipe.merge and recipe.export else 0,
        "adapter": adapter,
        "training_checkpoints": (recipe.runtime.keep_checkpoints + 1) * (adapter + optimizer + best),
    }


def _merged_dtype(shapes: Shapes, merge: Merge) -> str:
    return shapes.dtype if merge.dtype == "auto" else merge.dtype


def _bytes_of(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def _export_bytes(shapes: Shapes, merge: Merge, export: Export) -> int:
    """Return the bytes of the GGUF files and quantised folders, as their writers plan them from the merged weights."""
    dtype = _merged_dtype(shapes, merge)
    exact = {"bfloat16": "bf16", "float16": "f16"}.get(dtype, "f32")
    matrices = [(inner, outer) for _, inner, outer in shapes.matrices]
    folders = (bytes_of(kind, matrices, shapes.other_parameters, _bytes_of(dtype)) for kind in set(export.hf))
    files = bytes_of_kinds(export.gguf, exact, shapes.parameters, lambda kind: _gguf_bytes(shapes, kind))
    return files + sum(folders)


def _gguf_bytes(shapes: Shapes, kind: str) -> int:
    ends = ("token_embd.weight",) if shapes.tied else ENDS
    tensors = [(name, (shapes.vocabulary, shapes.hidden)) for name in ends]
    tensors += [(name.rpartition(".")[2], (outer, inner)) for name, inner, outer in shapes.matrices]
    vectors = 4 * (shapes.other_parameters - len(ends) * shapes.vocabulary * shapes.hidden)
    return bytes_with_metadata([vectors, *(data_bytes(shape, stored_kind(n, shape, kind)) for n, shape in tensors)])


def keeps_copy(shapes: Shapes, recipe: Recipe) -> bool:
    """Return whether a 4-bit copy of the base is kept in scratch."""
    return recipe.quantization is not None and wanted(recipe.runtime.keep_quantized, shapes.parameters)
