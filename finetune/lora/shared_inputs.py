"""4-bit layers that receive the same tensor, as query, key and value or gate and up do: one operator for them.

Which layers these are is asked of the model, and proved on it before step 1 (`share_inputs`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora.bnb import Linear4bit as AdaptedLinear4bit

from finetune.lora import fused_linear
from finetune.lora.fused_linear import FusedLinear4bit, base_of, biases_of, factors_of, packed
from finetune.models.compile import KeptLinear4bit
from finetune.utils.runtime import RandomState

if TYPE_CHECKING:
    from finetune.lora.fused_linear import Stored

TRIED_TOKENS = 16
SAME = {torch.float32: 1e-3}  # relative difference of a gradient by rounding alone; in 16 bits:
SAME_16 = 0.25  # small gradients of keys are sums that cancel; a missing adapter or scaling is off by 1


class Group:
    """Layers of one module that receive the same tensor: the first of them computes the results of all.

    A result waits until its layer is called with the same tensor; a layer that is called with another one, or is no
    plain LoRA at that moment, computes alone.
    """

    def __init__(self, layers: Sequence[Any], stored: Stored) -> None:
        self.layers, self.stored = list(layers), stored
        self.given: torch.Tensor | None = None
        self.graded = False
        self.waiting: dict[int, torch.Tensor] = {}
        for number, layer in enumerate(layers):
            layer.group, layer.number = self, number
            layer.__class__ = SHARING[type(layer)]

    def result(self, number: int, x: torch.Tensor) -> torch.Tensor | None:
        """(…, in_features) → (…, out_features) of layer `number`; None: it computes alone."""
        if number and self.given is x and number in self.waiting and self.graded == torch.is_grad_enabled():
            out = self.waiting.pop(number)
            if not self.waiting:
                self.given = None
            return out
        factors = [factors_of(layer, x) for layer in self.layers] if number == 0 else [None]
        plain = [f for f in factors if f is not None and f[3] is None]
        if len(plain) < len(self.layers):
            return None
        a, b, scalings, _ = (list(f) for f in zip(*plain, strict=True))
        biases = biases_of([base_of(layer) for layer in self.layers], x)
        out, *rest = fused_linear.adapted_linears(x, None, *self.stored, biases, a, b, scalings)[:-1]
        self.given, self.graded, self.waiting = x, torch.is_grad_enabled(), dict(enumerate(rest, 1))
        return out


class _Sharing(torch.nn.Module):
    """A layer of a group, by its class: compiled layers share graphs, which a function of each would prevent."""

    group: Group
    number: int

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """(…, in_features) → (…, out_features)."""
        out = None if args or kwargs else self.group.result(self.number, x)
        alone: Any = super().forward
        return alone(x, *args, **kwargs) if out is None else out


SHARING: dict[type, type] = {
    kind: type(f"Sharing{kind.__name__}", (_Sharing, kind), {})
    for kind in (FusedLinear4bit, Linear4bit, KeptLinear4bit)
}


def dissolve(model: torch.nn.Module) -> None:
    """Every layer computes alone again; weights that were joined stay parts of one tensor."""
    for module in model.modules():
        if isinstance(module, _Sharing):
            module.__class__ = type(module).__bases__[1]
            del module.group, module.number


def share_inputs(model: Any, precision: AbstractContextManager[Any]) -> tuple[int, str | None]:  # noqa: ANN401
    """Fuse 4-bit layers that receive the same tensor; return how many groups there are, and why there are none.

    `model` is peft's. The groups come from one forward of TRIED_TOKENS tokens, in the context `precision` (autocast);
    logits and gradients of such a forward must be the same with them and without, or they are dissolved. Adapters,
    gradients, mode and random generators are left as they were.
    """
    random, training = RandomState.now(), model.training
    second = [p for n, p in model.named_parameters() if ".lora_B." in n]
    before = [p.detach().clone() for p in second]
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (1, TRIED_TOKENS), generator=generator).to(model.device)
    groups: list[Group] = []
    try:
        model.eval()
        with torch.no_grad():
            for p in second:  # with zeros neither A nor a swapped result would show
                p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
        with torch.compiler.set_stance("force_eager"), precision:
            calls = _Calls(model)
            apart = _outcome(model, ids)
            groups = [Group(layers, stored) for layers, stored in calls.groups()]
            off = _difference(apart, _outcome(model, ids)) if groups else None
    finally:
        with torch.no_grad():
            for p, value in zip(second, before, strict=True):
                p.copy_(value)
        model.train(training)
        model.zero_grad(set_to_none=True)
        random.restore()
    if off is not None:
        dissolve(model)
        return 0, off
    return len(groups), None


class _Calls:
    """Which 4-bit layers of `model` receive which tensor, in order, from now until `groups`."""

    def __init__(self, model: torch.nn.Module) -> None:
        adapted = {id(base_of(m)) for m in model.modules() if isinstance(m, AdaptedLinear4bit)}
        # layers by parent, tensor and value; the tensors live on, so that no id comes twice
        self.seen: dict[tuple[str, int], list[tuple[torch.Tensor, torch.Tensor, torch.nn.Module]]] = {}
        self._hooks = [
            module.register_forward_pre_hook(partial(self._note, name.rpartition(".")[0]))
            for name, module in model.named_modules()
            if isinstance(module, (FusedLinear4bit, Linear4bit)) and id(module) not in adapted
        ]

    def _note(self, parent: str, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        given = inputs[0]
        self.seen.setdefault((parent, id(given)), []).append((given, given.detach().clone(), module))

    def groups(self) -> list[tuple[list[torch.nn.Module], Stored]]:
        """Layers of one module that received the same unchanged tensor, an adapter among them, and their matrices."""
        for hook in self._hooks:
            hook.remove()
        often = Counter(id(module) for calls in self.seen.values() for *_, module in calls)
        found = []
        for calls in self.seen.values():
            layers = [
                module
                for _, value, module in calls
                if torch.equal(value, calls[0][1]) and often[id(module)] == 1 and not getattr(module, "lora_variant", 0)
            ]
            if len(layers) > 1 and any(isinstance(m, FusedLinear4bit) for m in layers):
                stored = _joined([base_of(layer) for layer in layers])
                found += [(layers, stored)] if stored is not None else []
        return found


def _joined(bases: Sequence[Any]) -> Stored | None:
    """Make the packed weights of layers parts of one tensor, scales too; None if their storage differs."""
    kept = [isinstance(base, KeptLinear4bit) for base in bases]
    if any(kept):
        return ([base.kept for base in bases], [], 0, 0, "") if all(kept) else None
    states = [base.weight.quant_state for base in bases]
    kinds = {(s.blocksize, s.quant_type, s.nested and s.state2.blocksize, b.compute_dtype, b.weight.dtype)
             for s, b in zip(states, bases, strict=True)}  # fmt: skip
    uneven = any(s.shape.numel() % s.blocksize or (s.nested and s.absmax.numel() % s.state2.blocksize)
                 for s in states[:-1])  # fmt: skip
    if len(kinds) > 1 or uneven:
        return None
    weight, absmax, first = _join([b.weight for b in bases], "data"), _join(states, "absmax"), states[0]
    if not first.nested:
        return packed(weight, absmax, first)
    return packed(
        weight, absmax, first, torch.stack([s.offset for s in states]), _join([s.state2 for s in states], "absmax")
    )


def _join(holders: Sequence[Any], name: str) -> torch.Tensor:
    parts = [getattr(holder, name) for holder in holders]
    whole = torch.cat(parts)
    for holder, part in zip(holders, whole.split([len(p) for p in parts]), strict=True):
        setattr(holder, name, part)
    return whole


def _outcome(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:  # noqa: ANN401
    """Logits and gradients by name."""
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=ids, use_cache=False).logits
    (logits.float().square().sum() / TRIED_TOKENS).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


def _difference(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> str | None:
    """What differs by more than rounding, or None."""
    if first.keys() != second.keys():
        return f"{len(first.keys() ^ second.keys())} gradients are missing"
    for name, expected in first.items():
        off = float((second[name].float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30))
        if not off <= SAME.get(first["logits"].dtype, SAME_16):
            return f"{name} is {off:.0%} off"
    return None
