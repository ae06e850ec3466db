"""A dry run of autograd: what is made, saved, recomputed and freed in a step, counted in bytes, with nothing computed.

What is counted (activations.py) is written as the model's own code is, on blocks instead of tensors. As in torch, a
block lives as long as something holds it (a local name, the tape, a gradient), so what is alive at the peak follows
from the order of the operators alone. Pure arithmetic: no torch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence


class Ledger:
    """Bytes alive now, by kind and in all, and at the highest moment."""

    def __init__(self) -> None:
        self.live = 0
        self.peak = 0
        self.kinds: dict[str, int] = {}
        self._at_peak: dict[str, int] | None = None

    def new(self, size: int, kind: str = "activations") -> Block:
        """A block of `size` bytes, which counts until the last who holds it lets go."""
        self.live += size
        self.kinds[kind] = self.kinds.get(kind, 0) + size
        if self.live > self.peak:
            self.peak = self.live
            self._at_peak = None  # taken down when it is left: most new peaks are passed at once
        return Block(self, size, kind)

    def free(self, size: int, kind: str) -> None:
        """What a block's end calls."""
        if self._at_peak is None:
            self._at_peak = dict(self.kinds)
        self.live -= size
        self.kinds[kind] -= size

    @property
    def at_peak(self) -> dict[str, int]:
        """What was alive at the highest moment, by kind."""
        return dict(self.kinds) if self._at_peak is None else self._at_peak


class Block:
    """One storage."""

    __slots__ = ("kind", "ledger", "size")

    def __init__(self, ledger: Ledger, size: int, kind: str) -> None:
        self.ledger, self.size, self.kind = ledger, size, kind

    def __del__(self) -> None:
        self.ledger.free(self.size, self.kind)


class Slot:
    """Where the gradient of a result gathers until its operator's backward runs."""

    __slots__ = ("grad",)

    def __init__(self) -> None:
        self.grad: Block | None = None

    def add(self, block: Block) -> None:
        """The first contribution is kept as it is, a further one is added to it into a new block."""
        if self.grad is None:
            self.grad = block
        else:
            self.grad = block.ledger.new(block.size)

    def take(self) -> Block | None:
        """The gradient, which is the caller's from here on."""
        grad, self.grad = self.grad, None
        return grad


class Value:
    """A result: its storage, and its gradient's slot (None where it needs no gradient)."""

    __slots__ = ("block", "slot")

    def __init__(self, block: Block, slot: Slot | None) -> None:
        self.block, self.slot = block, slot


class Holder:
    """What an operator saved for its backward; empty inside a checkpoint until that is recomputed."""

    __slots__ = ("__weakref__", "block", "frame")

    def __init__(self, block: Block | None, frame: Frame | None) -> None:
        self.block, self.frame = block, frame

    def get(self) -> Block:
        """The block; recomputes the checkpoint it lies in, if need be."""
        if self.block is None and self.frame is not None:
            self.frame.recompute()
        assert self.block is not None  # noqa: S101 - what was recomputed saves what was computed
        return self.block


class Frame:
    """A checkpointed section: it keeps its input (on the host, where that is offloaded) and what it need not redo."""

    def __init__(self, tape: Tape, section: Callable[[Value], Value], given: Value, *, offload: bool) -> None:
        self.tape, self.section = tape, section
        self.given = None if offload else given.block
        self.size = given.block.size
        self.holders: list[weakref.ref[Holder]] = []  # weak: it ends with the operators that saved
        self.kept: list[tuple[Block, ...]] = []
        self.refilled = -1  # how many holders the recomputation has filled; below 0 there is none under way

    def recompute(self) -> None:
        """Run the section again, as far as the last thing it saves (torch's early stop)."""
        outer, self.tape.frame, self.refilled = self.tape.frame, self, 0
        given = self.given or self.tape.ledger.new(self.size)
        try:
            self.section(Value(given, Slot()))
        except _Stop:
            pass
        finally:
            self.tape.frame, self.refilled = outer, -1


class _Stop(Exception):
    """Everything that was saved has been recomputed."""


Backward = Callable[[Block, list[Block]], Sequence[tuple[Slot | None, Block]]]


class Tape:
    """The operators in the order they ran, each with what it saved and what its backward makes."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.frame: Frame | None = None
        self._entries: list[tuple[Slot, list[Holder], Backward]] = []

    @property
    def recomputing(self) -> bool:
        """Whether a checkpoint is being run for the second time."""
        return self.frame is not None and self.frame.refilled >= 0

    def record(
        self, results: Callable[[], Block], inputs: Sequence[Slot | None], saved: Sequence[Block], backward: Backward
    ) -> Value:
        """Run one operator: save, then make its result. With no input that needs a gradient nothing is saved."""
        if not any(slot is not None for slot in inputs):
            return Value(results(), None)
        holders = [self._save(block) for block in saved]
        slot = Slot()
        if not self.recomputing:
            self._entries.append((slot, holders, backward))
        return Value(results(), slot)

    def _save(self, block: Block) -> Holder:
        if self.frame is None:
            return Holder(block, None)
        if not self.recomputing:
            empty = Holder(None, self.frame)
            self.frame.holders.append(weakref.ref(empty))
            return empty
        holder = self.frame.holders[self.frame.refilled]() or Holder(None, None)
        holder.block = block
        self.frame.refilled += 1
        if self.frame.refilled == len(self.frame.holders):
            raise _Stop
        return holder

    def checkpoint(self, section: Callable[[Value], Value], given: Value, *, offload: bool = False) -> Value:
        """Run `section` without keeping what it saves (Chen et al. 2016, arXiv:1604.06174)."""
        self.frame = Frame(self, section, given, offload=offload)
        try:
            return section(given)
        finally:
            self.frame = None

    def backward(self, result: Value, gradient: Block) -> None:
        """The gradients of everything `result` came of, each operator's saved blocks being freed after it."""
        assert result.slot is not None  # noqa: S101
        result.slot.add(gradient)
        del gradient, result
        while self._entries:
            made = list(self._run())
            while made:
                slot, block = made.pop(0)
                if slot is not None:
                    slot.add(block)
                del block

    def _run(self) -> Sequence[tuple[Slot | None, Block]]:
        slot, holders, backward = self._entries.pop()
        gradient = slot.take()
        if gradient is None:
            return ()
        # `gradient` and what was saved end here, before the results meet those of other operators
        return backward(gradient, [holder.get() for holder in holders])
