"""Operators of a decoder layer for the ledger: the blocks that each allocates, saves, and allocates in backward.

Widths are elements per token; a block is tokens x width x element bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.estimate.tape import Backward, Block, Ledger, Slot, Tape, Value

FP32, BOOL = 4, 1


@dataclass(frozen=True)
class Linear:
    """One matrix of a decoder layer: its widths, and the rank of its adapter (0: no adapter)."""

    inner: int
    outer: int
    rank: int = 0


class Operators:
    """Operators of one micro-batch of `tokens`, with 16-bit autocast (`half`) or in fp32."""

    def __init__(
        self, tokens: int, *, half: bool, cuda: bool, dropout: bool, quantized: bool, held: bool, fused: bool = False
    ) -> None:
        self.ledger = Ledger()
        self.tape = Tape(self.ledger)
        self.tokens, self.half, self.cuda, self.dropout, self.quantized = tokens, half, cuda, dropout, quantized
        self.element = 2 if half else FP32
        # peft casts inputs to the adapter's fp32 unless autocast is on, and it checks CUDA's autocast only
        self.casts = half and not cuda
        self.held, self.fused = held, fused
        self.gradients: dict[str, Block] = {}
        self.autocast: dict[str, Block] = {}

    def new(self, width: int, element: int | None = None, kind: str = "activations") -> Block:
        """Allocate a block of tokens x width elements."""
        return self.ledger.new(self.tokens * width * (self.element if element is None else element), kind)

    def run(self, width: int, inputs: Sequence[Value], saved: Sequence[Block], backward: Backward) -> Value:
        """Record an operator with one result in the step's dtype."""
        return self.tape.record(lambda: self.new(width), [i.slot for i in inputs], saved, backward)

    def to(self, x: Value, width: int, element: int, back: int) -> Value:
        """Copy to `element` bytes per element; the gradient is copied back."""
        slot = x.slot
        return self.tape.record(
            lambda: self.new(width, element), [slot], [], lambda g, _: [(slot, self.new(width, back))]
        )

    def add(self, first: Value, second: Value, width: int, kind: str = "activations") -> Value:
        """Sum; both inputs share the gradient."""
        slots = (first.slot, second.slot)
        return self.tape.record(
            lambda: self.new(width, kind=kind), slots, [], lambda g, _: [(slot, g) for slot in slots]
        )

    def scale(self, x: Value, width: int) -> Value:
        """Multiply by a number or a frozen vector: no block of this size is saved."""
        slot = x.slot
        return self.run(width, [x], [], lambda g, _: [(slot, self.new(width))])

    def clone(self, x: Value, width: int) -> Value:
        """Copy; the gradient passes through."""
        slot = x.slot
        return self.run(width, [x], [], lambda g, _: [(slot, g)])

    def norm(self, x: Value, width: int) -> Value:
        """RMSNorm with a frozen weight, in fp32 inside: h · rsqrt(mean(h²)), then the weight."""
        h = self.to(x, width, FP32, self.element) if self.half else x
        slot = h.slot
        squares = self.new(width, FP32)
        del squares

        def mean_back(g: Block, saved: list[Block]) -> list[tuple[Slot | None, Block]]:
            spread, again, twice, product = (self.new(width, FP32) for _ in range(4))
            del spread, again, twice
            return [(slot, product)]

        root = self.tape.record(lambda: self.new(1, FP32), [slot], [h.block], mean_back)
        root_slot = root.slot

        def product_back(g: Block, saved: list[Block]) -> list[tuple[Slot | None, Block]]:
            of_root, of_h = self.new(width, FP32), self.new(width, FP32)
            summed = self.new(1, FP32)
            del of_root
            return [(slot, of_h), (root_slot, summed)]

        h = self.tape.record(lambda: self.new(width, FP32), [slot, root_slot], [h.block, root.block], product_back)
        y = self.to(h, width, self.element, FP32) if self.half else h
        return self.scale(y, width)

    def rotate(self, x: Value, width: int) -> Value:
        """RoPE: x·cos + rotate_half(x)·sin. The angles are shared by all layers and not counted here."""
        by_cosine = self.new(width)
        negated = self.new(width // 2)
        turned = self.new(width)
        del negated
        by_sine = self.new(width)
        del turned
        slot = x.slot

        def back(g: Block, saved: list[Block]) -> list[tuple[Slot | None, Block]]:
            by_sine = self.new(width)
            negated = self.new(width // 2)
            first = self.new(width)
            del negated
            second = self.new(width)
            del by_sine
            both = self.new(width)
            del first, second
            by_cosine = self.new(width)
            return [(slot, both), (slot, by_cosine)]

        result = self.run(width, [x], [], back)
        del by_cosine, by_sine
        return result

    def times(self, first: Value, second: Value, width: int) -> Value:
        """Elementwise product; saves both inputs."""
        one, two = first.slot, second.slot
        return self.run(
            width, [first, second], [first.block, second.block],
            lambda g, saved: [(two, self.new(width)), (one, self.new(width))],
        )  # fmt: skip

    def silu(self, x: Value, width: int) -> Value:
        """SiLU; saves its input."""
        slot = x.slot
        return self.run(width, [x], [x.block], lambda g, saved: [(slot, self.new(width))])

    def linear(self, name: str, x: Value, linear: Linear, beside: Sequence[Linear] = ()) -> Value:
        """`lora.Linear4bit.forward`: the base's product, a copy of it, dropout, A, B, the scaling, their sum.

        `beside` are further layers that receive `x`: without dropout a fused one is dequantised together with them.
        """
        if self.fused and linear.rank:
            return self._fused(name, x, linear, () if self.dropout else beside)
        base = self.frozen(x, linear)
        if not linear.rank:
            return base
        result = self.clone(base, linear.outer)
        del base
        inner = self.to(x, linear.inner, FP32, self.element) if self.casts else x
        dropped = self._dropped(inner, linear.inner) if self.dropout else inner
        if self.casts:
            dropped = self.to(dropped, linear.inner, self.element, FP32)
        low = self._product(f"{name}.A", dropped, linear.inner, linear.rank)
        del dropped
        output = self._product(f"{name}.B", low, linear.rank, linear.outer)
        del low
        output = self.scale(output, linear.outer)
        return self.add(result, output, linear.outer)

    def _fused(self, name: str, x: Value, linear: Linear, beside: Sequence[Linear]) -> Value:
        """lora/fused_linear.py: saves its input, x·Aᵀ and both factors as cast for this call.

        The matrix is dequantised within the operator, which is visible on a GPU only.
        """
        dropped = self._dropped(x, linear.inner) if self.dropout else None
        outer = linear.outer + sum(other.outer for other in beside)
        size = linear.inner * outer * self.element if self.quantized and self.cuda else 0
        counts = {"A": linear.rank * linear.inner, "B": linear.rank * linear.outer}
        factors = [self.ledger.new(n * self.element if self.half else 0) for n in counts.values()]
        slot, apart = x.slot, dropped.slot if dropped else None

        def make() -> Block:
            matrix = self.ledger.new(size, "dequantized")
            out = self.new(linear.outer)
            del matrix
            return out

        def back(g: Block, saved: list[Block]) -> list[tuple[Slot | None, Block]]:
            low = self.new(linear.rank)
            made: list[tuple[Slot | None, Block]] = []
            if slot is not None:
                matrix = self.ledger.new(size, "dequantized")
                made.append((slot, self.new(linear.inner)))
                del matrix
            if apart is not None:
                made.append((apart, self.new(linear.inner)))
            own = [self.ledger.new(n * self.element, "gradients") for n in counts.values()]
            del g, saved, low
            for key, count in counts.items():
                whole = self.ledger.new(count * FP32, "gradients") if self.half else own[0]
                if not self.held:
                    self.gradients.setdefault(f"{name}.{key}", whole)
                del own[0], whole
            return made

        low = self.new(linear.rank)
        given = dropped or x
        return self.tape.record(make, [slot, Slot()], [given.block, low, *factors], back)

    def frozen(self, x: Value, linear: Linear) -> Value:
        """`MatMul4Bit`: dequantises the matrix in forward (inside a kernel, visible on a GPU only) and in backward."""
        slot, size = x.slot, linear.inner * linear.outer * self.element if self.quantized else 0

        def back(g: Block, saved: list[Block]) -> list[tuple[Slot | None, Block]]:
            matrix = self.ledger.new(size, "dequantized")
            gradient = self.new(linear.inner)
            del matrix
            return [(slot, gradient)]

        matrix = self.ledger.new(size if self.cuda else 0, "dequantized")
        result = self.run(linear.outer, [x], [], back)
        del matrix
        return result

    def _dropped(self, x: Value, width: int) -> Value:
        """Dropout: a CPU saves the noise in the input's dtype (fp32, from peft), a GPU saves booleans."""
        element = self.element if self.cuda or self.fused else FP32
        noise, slot = self.new(width, BOOL if self.cuda else element), x.slot
        return self.tape.record(
            lambda: self.new(width, element), [slot], [noise], lambda g, saved: [(slot, self.new(width, element))]
        )

    def _product(self, key: str, x: Value, inner: int, outer: int) -> Value:
        """Product with a matrix of the adapter; saves both. Backward computes the matrix's gradient first."""
        weight, slot = self._cast(key, inner * outer), x.slot

        def back(g: Block, saved: list[Block]) -> list[tuple[Slot | None, Block]]:
            own = self.ledger.new(inner * outer * self.element, "gradients")
            made: list[tuple[Slot | None, Block]] = [] if slot is None else [(slot, self.new(inner))]
            del g, saved
            if self.half:
                own = self.ledger.new(inner * outer * FP32, "gradients")
            if not self.held:
                self.gradients.setdefault(key, own)
            return made

        saved = [x.block] if weight is None else [x.block, weight]
        return self.tape.record(lambda: self.new(outer), [slot, Slot()], saved, back)

    def _cast(self, key: str, count: int) -> Block | None:
        """Autocast's 16-bit copy of a matrix, kept until the end of the forward."""
        if not self.half:
            return None
        cast = self.ledger.new(count * self.element)
        if not self.tape.recomputing:
            self.autocast[key] = cast
        return cast
