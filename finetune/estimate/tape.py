"""Dry run of autograd: bytes allocated, saved, recomputed and freed in a step, without computing anything.

The model (activations.py) is written like the real code, with blocks instead of tensors. As in torch, a block is alive
as long as something references it (a local name, the tape, a gradient), so the peak follows from the order of the
operators alone. Pure arithmetic: no torch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence


class Ledger:
    """Bytes alive now, by kind and in total, and at the peak."""

    def __init__(self) -> None:
        self.live = 0
        self.peak = 0
        self.kinds: dict[str, int] = {}
        self._at_peak: dict[str, int] | None = None

    def new(self, size: int, kind: str = "activations") -> Block:
        """Return a block of `size` bytes, counted until its last reference is gone."""
        self.live += size
        self.kinds[kind] = self.kinds.get(kind, 0) + size
        if self.live > self.peak:
            self.peak = self.live
            self._at_peak = None  # recorded when the peak ends: most new peaks are exceeded immediately
        return Block(self, size, kind)

    def free(self, size: int, kind: str) -> None:
        """Subtract a freed block."""
        if self._at_peak is None:
            self._at_peak = dict(self.kinds)
        self.live -= size
        self.kinds[kind] -= size

    @property
    def at_peak(self) -> dict[str, int]:
        """Return the bytes alive at the peak, by kind."""
        return dict(self.kinds) if self._at_peak is None else self._at_peak


class Block:
    """One storage; its bytes are freed in the ledger once nothing refers to it."""

    __slots__ = ("__weakref__", "kind", "ledger", "size")

    def __init__(self, ledger: Ledger, size: int, kind: str) -> None:
        self.ledger, self.size, self.kind = ledger, size, kind
        weakref.finalize(self, ledger.free, size, kind).atexit = False


class Slot:
    """Accumulator for the gradient of a result until its operator's backward runs."""

    __slots__ = ("grad",)

    def __init__(self) -> None:
        self.grad: Block | None = None

    def add(self, block: Block) -> None:
        """Keep the first contribution; add a further one into a new block."""
        if self.grad is None:
            self.grad = block
        else:
            self.grad = block.ledger.new(block.size)

    def take(self) -> Block | None:
        """Return the gradient and drop the reference to it."""
        grad, self.grad = self.grad, None
        return grad


class Value:
    """A result: its storage, and its gradient's slot (None if it needs no gradient)."""

    __slots__ = ("block", "slot")

    def __init__(self, block: Block, slot: Slot | None) -> None:
        self.block, self.slot = block, slot


class Holder:
    """A block that an operator saved for backward; empty inside a checkpoint until that is recomputed."""

    __slots__ = ("__weakref__", "block", "frame")

    def __init__(self, block: Block | None, frame: Frame | None) -> None:
        self.block, self.frame = block, frame

    def get(self) -> Block:
        """Return the block; recompute its checkpoint if necessary."""
        if self.block is None and self.frame is not None:
            self.frame.recompute()
        assert self.block is not None  # noqa: S101 - the recomputation saves the same blocks
        return self.block


class Frame:
    """A checkpointed section: keeps its input (on the host if offloaded) and the blocks it does not recompute."""

    def __init__(self, tape: Tape, section: Callable[[Value], Value], given: Value, *, offload: bool) -> None:
        self.tape, self.section = tape, section
        self.given = None if offload else given.block
        self.size = given.block.size
        self.holders: list[weakref.ref[Holder]] = []  # weak: a holder ends with the operator that saved it
        self.kept: list[tuple[Block, ...]] = []
        self.refilled = -1  # holders filled by the recomputation; negative if none is running

    def recompute(self) -> None:
        """Run the section again up to its last saved block (torch's early stop)."""
        outer, self.tape.frame, self.refilled = self.tape.frame, self, 0
        given = self.given or self.tape.ledger.new(self.size)
        try:
            self.section(Value(given, Slot()))
        except _Stop:
            pass
        finally:
            self.tape.frame, self.refilled = outer, -1


class _Stop(Exception):
    """All saved blocks have been recomputed."""


Backward = Callable[[Block, list[Block]], Sequence[tuple[Slot | None, Block]]]


class Tape:
    """The operators in execution order, each with its saved blocks and the function of its backward."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.frame: Frame | None = None
        self._entries: list[tuple[Slot, list[Holder], Backward]] = []

    @property
    def recomputing(self) -> bool:
        """Return whether a checkpoint is being recomputed."""
        return self.frame is not None and self.frame.refilled >= 0

    def record(
        self, results: Callable[[], Block], inputs: Sequence[Slot | None], saved: Sequence[Block], backward: Backward
    ) -> Value:
        """Run one operator: save, then allocate its result. Nothing is saved if no input needs a gradient."""
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
        """Run backward from `result`; each operator's saved blocks are freed after it."""
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
        # `gradient` and the saved blocks end here, before the results are added to those of other operators
        return backward(gradient, [holder.get() for holder in holders])
