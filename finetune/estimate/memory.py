"""Bytes on the GPU, in RAM and on disk, by what holds them. Weights, adapter, gradients and optimiser are exact."""

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
from finetune.recipe import Export, Lora, Merge, Quantization, Recipe, Runtime, Train

GIB = 1 << 30
BLOCK = 64  # bitsandbytes quantises 64 weights with one scale
NESTED_BLOCK = 256  # and, double, 256 scales with one of their own
CODE_BYTES = 16 * 4  # each matrix has a table of the 16 values
NESTED_CODE_BYTES = 256 * 4 + 4  # and, double, one of the 256 that a scale may have, and the scales' mean
STATE_BLOCK = 256  # bitsandbytes' 8-bit optimisers: elements with one scale
LEAST_8BIT = 4096  # elements of a tensor below which its state stays fp32
STATE_TABLES = 2 * 256 * 4  # their values, for both moments, once for all tensors

CONTEXT_BYTES = int(0.7 * GIB)  # assumed: CUDA's context, and the workspaces of cuBLAS
UNUSED_SHARE = 0.05  # assumed: of what comes and goes in a step, what torch's allocator holds and does not fill
OTHER_LAYERS = 0.15  # of the activations, more for layers that are not Llama's: 0.88 of them predicted at worst (phi)
PROCESS_BYTES = 3_000_000_000  # assumed: Python with torch, transformers and CUDA's libraries in RAM
SHARD_BYTES = 1_000_000_000  # a file of the 4-bit copy, as it is written
STREAM_BYTES = 1_000_000_000  # merging goes tensor by tensor: a 7B in 0.49 GB
KINDS = ("activations", "layer_inputs", "scores", "mask", "logits", "dequantized")


@dataclass(frozen=True)
class Training:
    """What of a recipe, and of its rows once they are there, decides the bytes of its training."""

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
        """With the longest rows that the recipe allows; `base` is the folder of a finished base stage, which knows
        whether rows can be packed.
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
        train = recipe.training.model_copy(update={"batch_rows": asked.batch_pairs})
        return cls(
            lora=recipe.lora,
            quantization=recipe.quantization,
            train=train,
            runtime=recipe.runtime,
            packed=False,
            row_tokens=asked.max_length_tokens or recipe.render.max_length_tokens,
            sequences=2 if asked.method == "dpo" else 1,
            reference=True,
        )


def weight_bytes(shapes: Shapes, quantization: Quantization | None, element: int = 2) -> int:
    """The base on the device as bitsandbytes stores it: 4-bit codes, scales and tables; the rest with so many bytes an
    element. The rotary frequencies are there twice.
    """
    other = element * shapes.other_parameters + 4 * shapes.head_dim
    if quantization is None:
        return element * shapes.quantized_parameters + other
    sizes = Counter(inner * outer for _, inner, outer in shapes.matrices)
    return sum(n * _matrix_bytes(size, double=quantization.double) for size, n in sizes.items()) + other


def _matrix_bytes(count: int, *, double: bool) -> int:
    """One matrix of `count` elements; the last block of weights, and of scales, may be a part of one."""
    scales = -(-count // BLOCK)
    codes = -(-count // 2) + CODE_BYTES
    return codes + (scales + 4 * -(-scales // NESTED_BLOCK) + NESTED_CODE_BYTES if double else 4 * scales)


def adapter_bytes(shapes: Shapes, lora: Lora) -> int:
    """fp32, and as much again for its gradients."""
    return 4 * sum(trained_tensors(shapes, lora))


def optimizer_bytes(shapes: Shapes, lora: Lora, optimizer: str) -> int:
    """Two moments of every trained element: fp32, or bytes with a scale a block, where the tensor is large enough."""
    tensors = trained_tensors(shapes, lora)
    if "8bit" not in optimizer:
        return 8 * sum(tensors)
    large = [n for n in tensors if n >= LEAST_8BIT]
    states = sum(2 * n + 2 * 4 * -(-n // STATE_BLOCK) for n in large)
    return states + 8 * (sum(tensors) - sum(large)) + (STATE_TABLES if large else 0)


@dataclass(frozen=True)
class Attention:
    """What a device's kernels do: `varlen` takes packed rows without a mask; without `grouped` an unmasked call with
    fewer keys than queries finds no fused kernel (memory-efficient attention, all there is before sm80, takes none).
    """

    varlen: bool = False
    grouped: bool = True


GROUPED = Attention()


def micro_batch(
    shapes: Shapes, run: Training, rows: int, policy: Policy, attention: Attention, *, held: bool
) -> MicroBatch:
    """`rows` of the longest rows on a GPU. Packed ones are laid into one. Padded or packed ones need a mask under SDPA,
    and so do rows that are not shorter than the base's sliding window.
    """
    rows, length, half = rows * run.sequences, run.row_tokens, run.train.precision != "fp32"
    shape = (1, rows * length) if run.packed else (rows, length)
    mask = not attention.varlen if run.packed else rows > 1 or windowed(shapes, run)
    scores = not (mask or attention.varlen or attention.grouped) and shapes.heads != shapes.kv_heads
    # an embedding or a norm that is trained whole is fp32, and so is then all that flows through the layers
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
    """Whether the base's sliding window makes SDPA take a dense mask where causal attention needs none."""
    return shapes.window is not None and shapes.window <= run.row_tokens


def training(
    shapes: Shapes, run: Training, rows: int, policy: Policy = "full", attention: Attention = GROUPED, world: int = 1
) -> dict[str, int]:
    """Bytes on the GPU at the highest moment of a training with micro-batches of `rows`, by what holds them.

    That moment is in a backward, or in the optimiser's step, when all gradients are there and nothing else is.
    """
    several = rows * world < run.train.batch_rows
    batch = micro_batch(shapes, run, rows, policy, attention, held=several)
    dequantizes = run.quantization is not None and not run.runtime.cache_dequantized
    found = peak(decoder(shapes, run.lora, quantized=dequantizes), batch)
    adapter = adapter_bytes(shapes, run.lora)
    whole = 4 * sum(saved_tensors(shapes, run.lora))
    gradients = found.get("gradients", 0) + (adapter if several else whole)
    # torch's AdamW takes the root of all second moments at once
    in_step = {"gradients": adapter, "optimizer_step": adapter if run.train.optimizer == "adamw" else 0}
    in_backward = {"gradients": gradients, **{k: found.get(k, 0) for k in KINDS}}
    if shapes.inventory is not None:
        in_backward["other_layers"] = int(OTHER_LAYERS * found.get("activations", 0))
    in_backward["new_tokens"] = new_token_bytes(shapes, run.lora, 2 if batch.half else 4)
    most = max((in_backward, in_step), key=lambda parts: sum(parts.values()))
    kept = 2 * shapes.quantized_parameters if run.quantization and run.runtime.cache_dequantized else 0
    return {
        "weights": weight_bytes(shapes, run.quantization, 4 if run.train.precision == "fp32" else 2) + kept,
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
    """Bytes of RAM at the highest moment of each part of the work, the process itself among them."""
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
    """Elements of the fused experts of one layer, about."""
    return shapes.inventory.experts // shapes.layers if shapes.inventory else 0


def _layer_by_layer(shapes: Shapes) -> int:
    """Where rows go through a layer at a time in fp32: three layers' room (of a 7B 3.5 GB, as was measured), or two
    heads.
    """
    layer = shapes.quantized_parameters // shapes.layers + _experts_of_layer(shapes)
    return STREAM_BYTES + 4 * max(3 * layer, 2 * shapes.vocabulary * shapes.hidden)


def disk(shapes: Shapes, recipe: Recipe) -> dict[str, int]:
    """Bytes by root: scratch holds the download, the 4-bit copy, the merged model and its GGUF files, artifacts the
    adapter and its checkpoints.
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
    """The GGUF files as gguf/writer plans them from the merged weights."""
    exact = {"bfloat16": "bf16", "float16": "f16"}.get(_merged_dtype(shapes, merge), "f32")
    return bytes_of_kinds(export.gguf, exact, shapes.parameters, lambda kind: _gguf_bytes(shapes, kind))


def _gguf_bytes(shapes: Shapes, kind: str) -> int:
    ends = ("token_embd.weight",) if shapes.tied else ENDS
    tensors = [(name, (shapes.vocabulary, shapes.hidden)) for name in ends]
    tensors += [(name.rpartition(".")[2], (outer, inner)) for name, inner, outer in shapes.matrices]
    vectors = 4 * (shapes.other_parameters - len(ends) * shapes.vocabulary * shapes.hidden)
    return bytes_with_metadata([vectors, *(data_bytes(shape, stored_kind(n, shape, kind)) for n, shape in tensors)])


def keeps_copy(shapes: Shapes, recipe: Recipe) -> bool:
    """Whether a 4-bit copy of the base stays in scratch."""
    return recipe.quantization is not None and wanted(recipe.runtime.keep_quantized, shapes.parameters)
