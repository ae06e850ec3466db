"""Check that the reference model of preference training equals the start adapter, before step 1 and after a resume.

TRL 1.16 copies an adapter to the frozen adapter `ref` only if a PeftModel that holds it is passed, and then casts the
policy's adapter to bf16 if the base is quantised. The policy would then differ from its reference at step 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from finetune.errors import GateRefused
from finetune.recipe import Section

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

POLICY, REFERENCE = ".default.", ".ref."
LOSS_TOLERANCE = 1e-5  # of what the loss is at equal policies, relative: rounding of one fp32 mean


class Objective(Section):
    """Settings of the preference section that decide the loss."""

    method: str  # dpo or kto
    loss: str  # TRL's name
    beta: float
    label_smoothing: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


def start_values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the trainable parameters of the adapter `default`, fp32, by name."""
    return {n: p.detach().float().clone() for n, p in model.named_parameters() if p.requires_grad and POLICY in n}


def restore(model: torch.nn.Module, start: Mapping[str, torch.Tensor]) -> None:
    """Set policy and reference to the values in `start`, in fp32; freeze the reference."""
    for name, value in start.items():
        policy = model.get_parameter(name)
        policy.data = value.clone()
        try:
            reference = model.get_parameter(name.replace(POLICY, REFERENCE))
        except AttributeError:
            raise GateRefused(
                f"align: TRL made no frozen copy of {name}: the reference would be the base and not the start adapter"
            ) from None
        reference.data = value.clone()
        reference.requires_grad_(False)


def require_start(model: torch.nn.Module, start: Mapping[str, torch.Tensor], *, resumed: bool) -> None:
    """Require that the reference is bitwise equal to the start adapter; if not `resumed`, the policy too.

    Raises GateRefused with the first parameter that differs.
    """
    import torch

    kinds = ((REFERENCE, "the reference"),) if resumed else ((REFERENCE, "the reference"), (POLICY, "the policy"))
    for part, who in kinds:
        for name, value in start.items():
            now = model.get_parameter(name.replace(POLICY, part))
            if now.dtype != torch.float32 or not torch.equal(now.detach().cpu(), value.cpu()):
                raise GateRefused(
                    f"align: {who} is not equal to the start adapter: {name.replace(POLICY, part)} differs by "
                    f"{float((now.detach().cpu().float() - value.cpu()).abs().max()):.3g} ({now.dtype})"
                )
            if part == REFERENCE and now.requires_grad:
                raise GateRefused(f"align: {name.replace(POLICY, part)} of the reference would be trained")


@contextmanager
def as_reference(model: PeftModel) -> Iterator[None]:
    """Context manager: `model` uses the start adapter `ref`. At the end `requires_grad` is as before."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.set_adapter("ref")
    try:
        yield
    finally:
        model.set_adapter("default")
        for name, parameter in model.named_parameters():
            if REFERENCE in name:
                parameter.requires_grad_(False)
        for parameter in trainable:
            parameter.requires_grad_(True)


def check_labels(batch: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], sides: Sequence[str]) -> None:
    """Raise GateRefused if the tokens and labels of a collated batch, without padding, differ from `rows`.

    `batch` holds input_ids, attention_mask, completion_mask, (sides × rows, T) int64, side after side.
    """
    wanted = [(row["prompt_ids"], row[f"{side}_ids"], row[f"{side}_mask"]) for side in sides for row in rows]
    for k, (prompt, answer, mask) in enumerate(wanted):
        ids, attention, labels = (batch[n][k].tolist() for n in ("input_ids", "attention_mask", "completion_mask"))
        real = sum(attention)
        own = list(prompt) + list(answer), [0] * len(prompt) + list(mask)
        if (ids[:real], labels[:real]) != own or any(labels[real:]) or not any(labels[1:]):
            raise GateRefused(
                f"align: row {k} of the first batch has other tokens or labels than the rendered pair: "
                f"{real} tokens, {sum(labels)} supervised; the pair has {len(own[0])} and {sum(mask)}"
            )


def log_probabilities(model: PeftModel, batch: Mapping[str, Any]) -> torch.Tensor:
    """(B,) fp32: the summed log-probability of the supervised tokens of each row; computed without TRL."""
    import torch

    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    logps = torch.log_softmax(logits[:, :-1].float(), dim=-1)
    logps = logps.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    return (logps * batch["completion_mask"][:, 1:]).sum(-1)


def require_loss(loss: float, expected: float | None, what: str) -> None:
    """Raise GateRefused if the loss differs from `expected`, the loss for equal policy and reference."""
    if expected is not None and not abs(loss - expected) <= LOSS_TOLERANCE * max(1.0, abs(expected)):
        raise GateRefused(
            f"align: the loss {what} is {loss:.6f}; for equal policy and reference it is {expected:.6f}: the "
            "reference differs from the start adapter"
        )


def expected_loss(objective: Objective, batch: Mapping[str, Any] | None) -> float | None:
    """Return TRL's loss for equal policy and reference; None if it depends on `batch` and there is none."""
    weight = 1.0
    if objective.desirable_weight != objective.undesirable_weight:
        if batch is None:
            return None
        right = float(batch["label"].float().mean())
        weight = right * objective.desirable_weight + (1 - right) * objective.undesirable_weight
    else:
        weight = objective.desirable_weight
    return loss_at_start(objective.loss, objective.beta, objective.label_smoothing, weight)


def loss_at_start(loss: str, beta: float, smoothing: float, weight: float = 1.0) -> float | None:
    """Return TRL's loss for equal policy and reference; None if the reference does not decide it.

    `weight`: the mean of KTO's weights over the batch. Source: the formulas of trl/trainer/dpo_trainer.py and
    kto_trainer.py at log-ratios of 0.
    """
    two = math.log(2)
    if loss == "exo_pair":
        return -two - 0.5 * (math.log1p(-smoothing) + math.log(smoothing))
    known = {
        "sigmoid": two, "sigmoid_norm": two, "robust": two, "aot": two, "aot_unpaired": two, "hinge": 1.0,
        "ipo": (0.5 / beta) ** 2, "nca_pair": 2 * two, "bco_pair": 2 * two, "sppo_hard": 2 * (0.5 / beta) ** 2,
        "apo_zero": 1.0, "apo_down": 1.0, "discopop": 0.5 * two + 0.5, "kto": 0.5 * weight,
        "apo_zero_unpaired": 0.5 * weight,
    }  # fmt: skip
    return known.get(loss)
