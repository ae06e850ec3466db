"""Plan the tensors of the merged model from shapes alone; `merge/blocks.py` computes them.

Each kind of adapter tensor follows peft's forward, not its `merge`, which adds the bias of LoRA's B unscaled on 4-bit
layers (peft 0.21.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import InputError
from finetune.merge.deltas import Change, Replace, ReplaceRows, read_changes
from finetune.models.skeleton import Skeleton, read_skeleton
from finetune.models.stored_names import StoredNames
from finetune.utils.files import read_json
from finetune.utils.limits import bounded, reading
from finetune.utils.safetensors_io import (
    FLOATS,
    GrownRef,
    TensorRef,
    TensorShape,
    dtype_code,
    read_file,
    read_folder,
)

if TYPE_CHECKING:
    from finetune.merge.nf4_round_trip import RoundTrip
    from finetune.models.new_tokens import NewTokens

PLAN_SECONDS, PLAN_BYTES = 60, 2 << 30  # of matching an adapter's names with a base's: 0.1 s for a 7B


@dataclass(frozen=True, slots=True)
class Target:
    """One tensor of the merged model: its base tensor, its changes and its output dtype."""

    name: str  # in the files; equal to the base's name
    base: TensorRef
    changes: tuple[Change, ...]
    dtype: str  # safetensors code
    round_trip: RoundTrip | None = None
    transposed: bool = False
    module: str = ""  # the model's module that owns it as weight or bias

    @property
    def shape(self) -> TensorShape:
        """Name, dtype and shape of the output."""
        return TensorShape(self.name, self.dtype, self.base.shape)


@dataclass(frozen=True)
class MergePlan:
    """Every tensor of the merged model by its name in the files; `untie` if head and embedding now differ."""

    targets: Mapping[str, Target]
    untie: bool
    stored: StoredNames = field(default_factory=StoredNames)

    @property
    def shapes(self) -> list[TensorShape]:
        """Return the output tensors, in the base's order."""
        return [t.shape for t in self.targets.values()]


def plan_merge(
    base: Path,
    adapter: Path,
    dtype: str,
    round_trip: RoundTrip | None = None,
    trust_remote_code: bool = False,
    tokens: NewTokens | None = None,
) -> MergePlan:
    """Plan the merged model from headers and configurations only.

    `base` holds config.json and safetensors, `adapter` what peft's `save_pretrained` wrote; `dtype` is a plain name
    ("bfloat16"). With `round_trip` the weights that bitsandbytes quantises, and no other, come from 4 bits. `tokens`
    were added before training: embedding and head then have their rows, which the adapter must hold.
    Raises InputError, before anything is written, for whatever cannot be merged exactly; each adapter tensor is used
    once and each base tensor written once.
    """
    files = read_folder(base)
    skeleton = read_skeleton(base, files, trust_remote_code, quantized=round_trip is not None)
    stored = skeleton.stored
    model_names = {stored.in_file(n): n for n in skeleton.parameters | set(skeleton.tied)}
    refs = {model_names.get(name, name): ref for name, ref in files.items()}
    if tokens is not None:
        refs = _grown(refs, skeleton, tokens)
    if strange := sorted(skeleton.parameters - set(refs) - set(skeleton.tied) - set(stored.made_of)):
        raise InputError(
            f"{base}: the weights lack {strange[0]} ({len(strange)} of the model's tensors in all); "
            "they were saved by another class or are incomplete"
        )
    what = f"{adapter} is not an adapter that can be merged"
    with reading(what), bounded(what, cpu_seconds=PLAN_SECONDS, memory_bytes=PLAN_BYTES):  # its patterns may not end
        changes = read_changes(read_file(adapter / "adapter_model.safetensors"), adapter, skeleton, refs)
    sources, untie = _resolve_ties(refs, changes, skeleton.tied)
    for name, ref in sources.items():
        _require_new_rows(name, ref, changes.get(name, ()))
    if lost := sorted(set(changes) - set(sources)):
        raise InputError(f"{adapter}: changes {lost[0]}, which the base in {base} does not have; is it the right base?")
    code = dtype_code(dtype)
    targets = {}
    for name, ref in sources.items():
        module = name.removesuffix(".weight")
        quantized = round_trip if name.endswith(".weight") and module in skeleton.quantized else None
        written = stored.in_file(name)
        targets[written] = Target(
            name=written,
            base=ref,
            changes=changes.get(name, ()),
            dtype=code if ref.dtype in FLOATS else ref.dtype,
            round_trip=quantized,
            transposed=skeleton.kinds.get(module) == "conv1d",
            module=module,
        )
    return MergePlan(targets, untie, stored)


def _grown(refs: Mapping[str, TensorRef], skeleton: Skeleton, tokens: NewTokens) -> dict[str, TensorRef]:
    """`refs` with the rows of new tokens in the embedding and the head; a base without spare rows has fewer."""
    grow = {f"{module}.{leaf}" for module in (skeleton.input_embedding, skeleton.head) for leaf in ("weight", "bias")}
    return {
        n: GrownRef.of(r, tokens.rows) if n in grow and r.shape[0] == tokens.stored < tokens.rows else r
        for n, r in refs.items()
    }


def _require_new_rows(name: str, ref: TensorRef, changes: tuple[Change, ...]) -> None:
    """Raise InputError if the adapter leaves rows as they are that the base does not have."""
    if not isinstance(ref, GrownRef) or any(isinstance(c, Replace) for c in changes):
        return
    held = {row for c in changes if isinstance(c, ReplaceRows) for row in c.rows}
    if lost := sorted(set(range(ref.stored_rows, ref.shape[0])) - held):
        raise InputError(f"adapter: {name}: it does not hold the row of new token {lost[0]}, which the base lacks")


def output_dtype(setting: str, base: Path) -> str:
    """Return the dtype of the merged model as a plain name: the setting, or the base's stored dtype for "auto"."""
    return str(read_json(base / "base.json")["dtype"]) if setting == "auto" else setting


def _resolve_ties(
    refs: Mapping[str, TensorRef], changes: dict[str, tuple[Change, ...]], tied: Mapping[str, str]
) -> tuple[dict[str, TensorRef], bool]:
    """Return the base tensor of each written tensor, and whether a tied head must be written separately.

    peft trains a copy if it changes one side of a tied pair, so the sides differ afterwards; but trainable tokens on
    the embedding alone are shared with the head: they are added to the head's `changes`.
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
