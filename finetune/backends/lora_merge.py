"""Merge an adapter into its base one tensor at a time: plan everything from shapes first, execute second.

The delta is computed in fp32, added in fp32 and rounded once. The rules for each kind of adapter tensor are those of
peft's forward, not of its `merge`, which adds the bias of LoRA's B unscaled on 4-bit layers (peft 0.21.2).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from finetune.backends.checkpoints import (
    FLOATS,
    TensorRef,
    TensorShape,
    dtype_code,
    read_file,
    read_folder,
    torch_dtype,
)
from finetune.backends.lora_changes import SLICE_ELEMENTS, Change, LowRank, ReplaceRows, read_changes
from finetune.backends.skeleton import read_skeleton
from finetune.errors import FinetuneError, InputError
from finetune.records import read_json

if TYPE_CHECKING:
    import torch


BLOCK = 64  # weights that share a scale: what transformers asks of bitsandbytes


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """How training stored the weights of linear modules: rounded to `dtype`, then to 4 bits in blocks of 64."""

    type: Literal["nf4", "fp4"]
    double: bool
    dtype: str  # "bfloat16": what the base was loaded in before it was quantised
    device: str = "cpu"  # where training quantised it

    def apply(self, weight: torch.Tensor, transposed: bool = False) -> torch.Tensor:
        """Quantise and dequantise (out, in), or (in, out) when `transposed`: the values the adapter saw, in `dtype`."""
        import torch

        value = weight.to(device=self.device, dtype=torch_dtype(self.dtype))
        value = (value.T if transposed else value).clone(memory_format=torch.contiguous_format)
        # Slices of whole blocks give the same bits as the whole in a fraction of the memory. Where a row does not end
        # with a block, bitsandbytes' CPU kernel (0.50.2) pairs blocks and scales by the shape: keep the shape then.
        step = len(value) if value.shape[1] % BLOCK else max(1, SLICE_ELEMENTS // value.shape[1])
        slices = [slice(start, start + step) for start in range(0, len(value), step)]
        packed, scales = zip(*(self._quantize(value[rows]) for rows in slices), strict=True)
        for rows, codes, scale in zip(slices, packed, self._stored_scales(scales), strict=True):
            value[rows] = self._dequantize(codes, scale, value[rows])
        return (value.T if transposed else value).to("cpu")

    def _quantize(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed codes, and the largest magnitude of each block (fp32)."""
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(values, blocksize=BLOCK, compress_statistics=False, quant_type=self.type)
        return packed, state.absmax

    def _stored_scales(self, scales: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """What is left of the scales once double quantisation has rounded them to 8 bits about their mean."""
        import torch
        from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

        if not self.double:
            return scales
        every = torch.cat(list(scales))
        offset = every.mean()
        rounded, state = quantize_blockwise(every - offset, blocksize=256)
        return torch.split(dequantize_blockwise(rounded, state) + offset, [len(s) for s in scales])

    def _dequantize(self, packed: torch.Tensor, scales: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        state = QuantState(scales, shape=like.shape, dtype=like.dtype, blocksize=BLOCK, quant_type=self.type)
        return dequantize_4bit(packed, state).reshape(like.shape)


@dataclass(frozen=True, slots=True)
class Target:
    """One tensor of the merged model: from which base tensor, changed how, written in which dtype."""

    name: str
    base: TensorRef
    changes: tuple[Change, ...]
    dtype: str  # safetensors code
    round_trip: RoundTrip | None = None
    transposed: bool = False

    @property
    def shape(self) -> TensorShape:
        """What will be written."""
        return TensorShape(self.name, self.dtype, self.base.shape)


@dataclass(frozen=True)
class MergePlan:
    """Every tensor of the merged model, by name; `untie` when the head no longer is the embedding."""

    targets: Mapping[str, Target]
    untie: bool

    @property
    def shapes(self) -> list[TensorShape]:
        """What will be written, in the base's order."""
        return [t.shape for t in self.targets.values()]


def plan_merge(
    base: Path, adapter: Path, dtype: str, round_trip: RoundTrip | None = None, trust_remote_code: bool = False
) -> MergePlan:
    """Read only headers and configurations, and say what each tensor of the merged model is made of.

    `base` holds config.json and safetensors, `adapter` what peft's `save_pretrained` wrote; `dtype` is a plain name
    ("bfloat16"). With `round_trip` the weights that bitsandbytes quantises, and no other, come from 4 bits.
    Raises InputError, before anything is written, for whatever cannot be merged exactly; each adapter tensor is used
    once and each base tensor written once.
    """
    skeleton = read_skeleton(base, trust_remote_code)
    refs = read_folder(base)
    if strange := sorted(skeleton.parameters - set(refs) - set(skeleton.tied)):
        raise InputError(
            f"{base}: the weights lack {strange[0]} ({len(strange)} of the model's tensors in all); "
            "they were saved by another class or are incomplete"
        )
    changes = read_changes(read_file(adapter / "adapter_model.safetensors"), adapter, skeleton, refs)
    sources, untie = _resolve_ties(refs, changes, skeleton.tied)
    if lost := sorted(set(changes) - set(sources)):
        raise InputError(f"{adapter}: changes {lost[0]}, which the base in {base} does not have; is it the right base?")
    code = dtype_code(dtype)
    targets = {}
    for name, ref in sources.items():
        module = name.removesuffix(".weight")
        quantized = round_trip if name.endswith(".weight") and module in skeleton.quantized else None
        targets[name] = Target(
            name=name,
            base=ref,
            changes=changes.get(name, ()),
            dtype=code if ref.dtype in FLOATS else ref.dtype,
            round_trip=quantized,
            transposed=skeleton.kinds.get(module) == "conv1d",
        )
    return MergePlan(targets, untie)


def output_dtype(setting: str, base: Path) -> str:
    """The dtype of the merged model, a plain name: what the recipe says, and for "auto" what the base is stored in."""
    return str(read_json(base / "base.json")["dtype"]) if setting == "auto" else setting


def merged_tensor(plan: MergePlan, name: str) -> torch.Tensor:
    """One tensor of the merged model, on the CPU, in its output dtype; a tied head is asked for by either name.

    Raises FinetuneError when a value is not finite (a broken adapter, or fp16 too narrow for the base).
    """
    target = plan.targets[name]
    value = target.base.load()
    if target.round_trip:
        value = target.round_trip.apply(value, target.transposed)
    dtype = torch_dtype(target.dtype)
    if len(target.changes) == 1 and isinstance(low_rank := target.changes[0], LowRank) and low_rank.layout == "linear":
        value = low_rank.rounded(value, dtype)
    elif target.changes:
        value = value.float()
        for change in target.changes:
            value = change.apply(value)
    value = value.to(dtype).contiguous()
    if value.is_floating_point() and not _finite(value):
        raise FinetuneError(
            f"{name} is not finite in the merged model ({target.dtype}); with merge.dtype float16 take bfloat16, "
            "otherwise the adapter or the base is broken"
        )
    return value


def _finite(value: torch.Tensor) -> bool:
    """Whether every element is finite; slices, as torch makes a wide copy of whatever it tests."""
    import torch

    parts = torch.split(value.reshape(-1), SLICE_ELEMENTS)
    # A sum that is finite settles it, several times as fast as looking at each element.
    return all(bool(torch.isfinite(p.sum(dtype=torch.float32)) or torch.isfinite(p).all()) for p in parts)


def merged_tensors(plan: MergePlan) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of the merged model, one in memory at a time."""
    for name in plan.targets:
        yield name, merged_tensor(plan, name)


def _resolve_ties(
    refs: Mapping[str, TensorRef], changes: dict[str, tuple[Change, ...]], tied: Mapping[str, str]
) -> tuple[dict[str, TensorRef], bool]:
    """Which base tensor each written tensor comes from, and whether a tied head has to be written for itself.

    peft trains a copy where it changes one side of a tied pair, so the sides differ afterwards; but trainable tokens
    on the embedding alone are shared with the head. `changes` gains the head's share of such rows.
    """
    sources = dict(refs)
    untie = False
    for head, embedding in tied.items():
        if head in refs and not _same(refs[head], refs[embedding]):
            raise InputError(f"config.json ties {head} to {embedding}, but the weights hold two different tensors")
        on_embedding, on_head = changes.get(embedding, ()), changes.get(head, ())
        rows_only = [isinstance(c, ReplaceRows) for c in (*on_embedding, *on_head)]
        if any(rows_only) and not (on_embedding and all(rows_only)):
            raise InputError(
                f"the adapter changes the tied {embedding} and {head} in different ways, one of them by "
                "trainable_token_indices; that is not supported: name the tokens for the embedding only"
            )
        if any(rows_only) and not on_head:
            if head in refs:
                changes[head] = on_embedding
        elif on_embedding or on_head:
            untie = True
            sources[head] = replace(refs[embedding], name=head)
    return sources, untie


def _same(first: TensorRef, second: TensorRef) -> bool:
    import torch

    return first.shape == second.shape and torch.equal(first.load(), second.load())
