"""Checks on the real model before the first step and after the third; each raises GateRefused.

They cost a few passes over a few hundred tokens and restore random generators, gradients and mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.errors import GateRefused
from finetune.lora.config import ROWS, SAVED, is_target, layer_count, rank_of, saved_parameters
from finetune.recipe import Lora

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from trl import SFTTrainer

    from finetune.models.new_tokens import NewTokens

    Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]

DOCUMENT_TOKENS = 256  # of each of the two documents used
ROWS_LOOKED_AT = 64
ELEMENTS = 65_536  # compared per parameter, evenly spread
UPDATES = 3  # A has no gradient at first because B is zero; B moves at the first update, A at the second
MOVED = 0.99


@dataclass(frozen=True)
class Tolerance:
    """Effect of rounding alone: on a loss (relative), on logits (relative RMS), on a gradient (relative)."""

    loss: float
    logits: float
    gradient: float


TOLERANCES = {"fp32": Tolerance(1e-4, 1e-3, 1e-3), "bf16": Tolerance(1e-2, 0.01, 0.02)}
TOLERANCES["fp16"] = TOLERANCES["bf16"]


def prove(
    trainer: SFTTrainer,
    collate: Collate,
    dataset: Sequence[dict[str, Any]],
    lora: Lora,
    precision: str,
    *,
    packed: bool,
    tokens: NewTokens | None = None,
) -> None:
    """Run all checks before step 1 on up to two documents of `dataset`. Raises GateRefused."""
    model: Any = trainer.model
    prove_adapters(model)
    prove_planned(model, planned_parameters(model, lora, tokens))
    first = dataset[0]
    check_batch(collate([first]), first.get("seq_lengths"), packed)
    documents = two_documents(dataset)
    tolerance = TOLERANCES[precision]
    with undisturbed(model), trainer.accelerator.autocast():
        batch = on_device(collate(together(documents, packed=packed)), model.device)
        model.eval()
        prove_loss(trainer, batch, tolerance.loss)
        if len(documents) == 2:
            prove_isolation(model, collate, documents, tolerance.logits, packed=packed)
        prove_gradients(model, batch, tolerance.gradient, scale=1024.0 if precision == "fp16" else 1.0)


@contextmanager
def as_in_training(trainer: SFTTrainer) -> Iterator[None]:
    """Enable activation checkpointing as in training (`Trainer` does so in `train`) and reset the memory peak after."""
    import torch

    from finetune.train import activation_checkpointing

    model: Any = trainer.model
    if trainer.args.activation_checkpointing:
        settings: Any = trainer.args.activation_checkpointing_kwargs
        activation_checkpointing.enable(model, settings)
    yield
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Restore random generators and mode, and clear gradients, also after an exception."""
    from finetune.utils.runtime import RandomState

    before, training = RandomState.now(), model.training
    try:
        yield
    finally:
        before.restore()
        model.train(training)
        model.zero_grad(set_to_none=True)


# --- the documents --------------------------------------------------------------------------------------------------


def two_documents(dataset: Sequence[dict[str, Any]]) -> list[dict[str, list[int]]]:
    """Return the first two documents with a supervised token, cut around it; one if there is only one."""
    documents: list[dict[str, list[int]]] = []
    for number in range(min(len(dataset), ROWS_LOOKED_AT)):
        row = dataset[number]
        start = 0
        for length in row.get("seq_lengths") or [len(row["input_ids"])]:
            ids, labels = (row[name][start : start + length] for name in ("input_ids", "labels"))
            start += length
            supervised = next((i for i, label in enumerate(labels) if i and label != -100), None)
            if supervised is None:
                continue
            cut = slice(max(0, supervised - DOCUMENT_TOKENS // 2), None)
            documents.append({"input_ids": ids[cut][:DOCUMENT_TOKENS], "labels": labels[cut][:DOCUMENT_TOKENS]})
            if len(documents) == 2:
                return documents
    if not documents:
        raise GateRefused("none of the first rows has a supervised token: there is nothing to learn from")
    return documents


def together(documents: Sequence[dict[str, list[int]]], *, packed: bool) -> list[dict[str, list[int]]]:
    """Return the documents as one packed row, or as the rows of one padded batch."""
    if not packed:
        return list(documents)
    joined = {name: [token for d in documents for token in d[name]] for name in ("input_ids", "labels")}
    return [{**joined, "seq_lengths": [len(d["input_ids"]) for d in documents]}]


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return `batch` with its tensors on `device`."""
    import torch

    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


# --- the proofs -----------------------------------------------------------------------------------------------------


def prove_adapters(model: torch.nn.Module) -> None:
    """Refuse a model whose trainable parameters are not LoRA parameters in fp32, or that has none."""
    import torch

    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    wrong = [n for n, p in trainable.items() if p.dtype != torch.float32]
    if wrong:
        raise GateRefused(f"{len(wrong)} trainable parameters are not fp32 ({wrong[0]} is {trainable[wrong[0]].dtype})")
    other = [n for n in trainable if "lora_" not in n and SAVED not in n and ROWS not in n]
    if other or not trainable:
        raise GateRefused(
            "only LoRA parameters, lora.modules_to_save and new tokens' rows should train, found "
            f"{other[0] if other else 'none'}"
        )


def planned_parameters(
    model: PeftModel,
    lora: Lora,
    tokens: NewTokens | None = None,
) -> dict[str, tuple[int, ...]]:
    """Name → shape of the parameters that `lora` trains, from the base's matrices, not peft's layers."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from finetune.models.architecture import adaptable
    from finetune.models.layerwise import without_adapter

    base = without_adapter(model)
    head = base.get_output_embeddings()
    planned = saved_parameters(lora, base, tokens)
    linear = {
        path.removesuffix(".base_layer"): module
        for path, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and ".lora_" not in path
        and module is not head
        and SAVED not in f"{path}."
        and ".token_adapter." not in path
    }
    layers = layer_count(linear)
    for name in adaptable(base, linear):
        if ".original_module" in name or not is_target(lora, name, layers):
            continue
        module = linear[name]
        inner, outer = module.weight.shape if isinstance(module, Conv1D) else (module.in_features, module.out_features)
        rank = rank_of(lora, name)
        prefix = f"base_model.model.{name}"
        planned[f"{prefix}.lora_A.default.weight"] = (rank, inner)
        planned[f"{prefix}.lora_B.default.weight"] = (outer, rank)
        if lora.dora:
            planned[f"{prefix}.lora_magnitude_vector.default.weight"] = (outer,)
    return planned


def prove_planned(model: torch.nn.Module, planned: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a model whose trainable parameters are not exactly the planned ones."""
    trained = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    wrong = sorted(n for n in planned.keys() | trained.keys() if planned.get(n) != trained.get(n))
    if wrong:
        raise GateRefused(
            f"{len(wrong)} trainable parameters are not those of the recipe's lora section: {wrong[0]} should be "
            f"{planned.get(wrong[0], 'absent')} and is {trained.get(wrong[0], 'absent')}"
        )


def check_batch(batch: dict[str, torch.Tensor], lengths: list[int] | None, packed: bool) -> None:
    """Refuse a batch whose documents could attend to each other, or that has no supervised token.

    `batch` holds input_ids, labels (1, T) int64, and position_ids when packed; `lengths` are the documents' lengths.
    """
    import torch

    if not bool((batch["labels"] != -100).any()):
        raise GateRefused("the first batch has no supervised token: its labels are all -100")
    supervised = batch["labels"] != -100
    if not torch.equal(batch["labels"][supervised], batch["input_ids"][supervised]):
        raise GateRefused("the labels of the first batch differ from its tokens")
    if not packed:
        return
    if "attention_mask" in batch:
        raise GateRefused("the packed batch carries a dense attention mask: its documents would see each other")
    expected = torch.cat([torch.arange(n) for n in lengths or []])
    if "position_ids" not in batch or not torch.equal(batch["position_ids"][0], expected):
        raise GateRefused(
            "the positions of the packed batch do not restart at each document: they would see each other"
        )


def manual_loss(model: PeftModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the mean cross-entropy of the supervised tokens, each from the position before it; () fp32.

    The first token of a document is not predicted: in a packed row the position before it is in another document.
    """
    import torch

    logits = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
    labels = batch["labels"].clone()
    if "position_ids" in batch:
        labels[batch["position_ids"] == 0] = -100
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())


def prove_loss(trainer: SFTTrainer, batch: Mapping[str, Any], tolerance: float) -> None:
    """Refuse a trainer whose loss is not the mean over the supervised tokens (NaN passes: the watchdog reports it at
    step 1).
    """
    import torch

    model: Any = trainer.model
    with torch.no_grad():
        theirs = float(trainer.compute_loss(model, dict(batch)))
        ours = float(manual_loss(model, batch))
    if abs(theirs - ours) > tolerance * max(1.0, abs(ours)):
        raise GateRefused(
            f"the trainer's loss on the first documents is {theirs:.5f}, the mean over their supervised tokens "
            f"{ours:.5f}: it would train on other tokens than the labels"
        )


def prove_isolation(
    model: PeftModel,
    collate: Collate,
    documents: Sequence[dict[str, list[int]]],
    tolerance: float,
    *,
    packed: bool,
) -> None:
    """Refuse a model in which a document's logits depend on another document of the same row or batch.

    The other document's tokens are reversed and its length is kept: both passes then have the same shapes and kernels,
    so that a difference comes from attention, not from rounding of 4-bit products of another size.
    """
    import torch

    def logits(chosen: Sequence[dict[str, list[int]]]) -> list[torch.Tensor]:
        batch = on_device(collate(together(chosen, packed=packed)), model.device)
        batch.pop("labels")
        both: torch.Tensor = model(**batch, use_cache=False).logits
        first, second = (len(d["input_ids"]) for d in chosen)
        return [both[0, :first], both[0, first:] if packed else both[1, :second]]

    turned = [{**d, "input_ids": d["input_ids"][::-1]} for d in documents]
    with torch.no_grad():
        beside = logits(documents)
        for one in (1,) if packed else (0, 1):  # in a packed row only the second can attend to the other
            other = logits([documents[i] if i == one else turned[i] for i in (0, 1)])[one].float()
            off = float((beside[one].float() - other).pow(2).mean().sqrt() / other.std())
            if off > tolerance:
                raise GateRefused(
                    f"two {'packed documents' if packed else 'rows of a batch'} see each other: the logits of one "
                    f"differ by {off:.1%} (RMS) when the other is changed; rounding explains {tolerance:.1%} at most"
                )


def prove_gradients(model: PeftModel, batch: Mapping[str, torch.Tensor], tolerance: float, scale: float = 1.0) -> None:
    """Refuse a model whose gradients change after a forward in eval mode (bitsandbytes repacks 4-bit weights on some
    CPUs; most gradients are then wrong although the loss looks normal).
    """
    import torch

    before = _gradients(model, batch, scale)
    model.eval()
    with torch.no_grad():
        model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False)
    after = _gradients(model, batch, scale)
    wrong = [n for n, g in before.items() if float((after[n] - g).norm()) > tolerance * float(g.norm())]
    # One of hundreds may differ: on a GPU the order of sums in backward is not fixed. The defect affects most of them.
    if len(wrong) > len(before) // 10:
        raise GateRefused(
            f"one evaluation changed the gradients of {len(wrong)} of {len(before)} adapter matrices ({wrong[0]}): it "
            "modified the base's weights"
        )


def _gradients(model: PeftModel, batch: Mapping[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """Return subsampled gradients in training mode, with the same dropout mask every time."""
    import torch

    from finetune.utils.runtime import RandomState

    before = RandomState.now()
    model.train()
    model.zero_grad(set_to_none=True)
    # Autocast would reuse casts made without a graph (pytorch#165068), and nothing would have a gradient.
    torch.clear_autocast_cache()
    (manual_loss(model, batch) * scale).backward()
    before.restore()
    gradients = {n: thinned(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    if not gradients:
        raise GateRefused("no adapter matrix has a gradient: nothing would be trained")
    return gradients


def thinned(tensor: torch.Tensor) -> torch.Tensor:
    """Return up to ELEMENTS of a tensor, evenly spread; (N,) on the CPU."""
    flat = tensor.detach().flatten()
    return flat[:: -(-flat.numel() // ELEMENTS)].cpu().clone()


class Movement:
    """Check that nearly every element of the adapter has moved after a few updates with a positive learning rate."""

    def __init__(self, model: torch.nn.Module) -> None:
        from torch.distributed.tensor import DTensor

        # Of an embedding only the rows that were read have a gradient: no share of it must have moved.
        rows = (SAVED, ROWS)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad and not any(r in n for r in rows)}
        shared_out = any(isinstance(p, DTensor) for p in trained.values())
        self._before = {} if shared_out else {n: thinned(p) for n, p in trained.items()}
        self._updates = 0

    def updated(self, model: torch.nn.Module, learning_rate: float, *, skipped: bool) -> None:
        """Count an optimiser step, unless it was skipped (fp16's scale was too high) or had rate 0."""
        if not self._before or skipped or not learning_rate:
            return
        self._updates += 1
        if self._updates == UPDATES:
            self._compare({n: thinned(p) for n, p in model.named_parameters() if n in self._before})
            self._before = {}

    def _compare(self, now: Mapping[str, torch.Tensor]) -> None:
        moved = {n: float((now[n] != before).float().mean()) for n, before in self._before.items()}
        still = min(moved, key=lambda n: moved[n])
        elements = sum(before.numel() for before in self._before.values())
        share = sum(moved[n] * before.numel() for n, before in self._before.items()) / elements
        # A few dead channels (padded widths, inactive units) have no gradient, but never a whole matrix.
        if share < MOVED or moved[still] == 0:
            count = sum(part < MOVED for part in moved.values())
            raise GateRefused(
                f"after {UPDATES} updates only {moved[still]:.0%} of {still} has moved ({count} of {len(moved)} "
                "adapter matrices): no gradient reaches the rest, or its updates are rounded away. Raise "
                "train.learning_rate, or use train.optimizer: adamw"
            )
