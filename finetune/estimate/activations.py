"""Predict peak bytes of one micro-batch's forward and backward by a dry run of its operators.

Follows transformers' Mistral/Llama/Qwen2 decoder layer, peft's `lora.Linear4bit`, bitsandbytes' `MatMul4Bit`, torch's
non-reentrant `checkpoint` and TRL's chunked log-probabilities, operator by operator in execution order; tests compare
it with the storages alive in a real step. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

from finetune.estimate.operators import BOOL, FP32, Linear, Operators
from finetune.estimate.tape import Block, Slot, Value

Policy = Literal["none", "every_2", "every_4", "selective", "full", "offload"]
POLICIES: tuple[Policy, ...] = ("none", "every_4", "every_2", "selective", "full", "offload")
# Layer inputs that the GPU holds while they are on their way to RAM and back (train/activation_checkpointing.py).
OFFLOAD_BUFFERS = 2
HEAD_TOKENS, HEAD_WIDTH = (
    4096,
    32768,
)  # TRL multiplies hidden states by lm_head in tiles of this many tokens and vocabulary entries


@dataclass(frozen=True)
class Decoder:
    """Properties of base and adapter that determine activations. `layers` are the matrices by name, layer by layer."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    layers: tuple[Mapping[str, Linear], ...]
    dropout: bool = False
    quantized: bool = True


@dataclass(frozen=True)
class MicroBatch:
    """Size and kernels of one micro-batch.

    `mask`: SDPA needs a dense (length x length) mask, as for packed or padded rows. Packed rows are one row of `length`
    tokens. `held`: the adapter's gradients already exist from an earlier micro-batch and are not counted.
    `scores`: no fused kernel supports the call, so torch computes the (length x length) scores in fp32.
    `fused`: adapters run inside their 4-bit layers.
    """

    rows: int
    length: int
    mask: bool
    half: bool  # bf16 or fp16 under autocast; else fp32
    cuda: bool
    policy: Policy = "none"
    held: bool = False
    scores: bool = False
    fused: bool = False


def peak(decoder: Decoder, batch: MicroBatch) -> dict[str, int]:
    """Return peak bytes of forward and backward by kind; memory allocated before is not counted.

    Kinds: activations, layer_inputs, mask, scores, dequantized (one matrix at a time, or those of one
    input), logits, gradients.
    """
    step = _Step(decoder, batch)
    step.run()
    return {kind: size for kind, size in step.ops.ledger.at_peak.items() if size}


class _Step:
    """Forward and backward of one micro-batch."""

    def __init__(self, model: Decoder, batch: MicroBatch) -> None:
        self.model, self.batch = model, batch
        self.tokens = batch.rows * batch.length
        self.ops = Operators(
            self.tokens,
            half=batch.half,
            cuda=batch.cuda,
            dropout=model.dropout,
            quantized=model.quantized,
            held=batch.held,
            fused=batch.fused,
        )

    def run(self) -> None:
        """Forward through all layers and the head, and backward."""
        ops, policy = self.ops, self.batch.policy
        checkpointed = policy != "none"
        # with checkpointing the embeddings' output requires a gradient; as a leaf, it is held by autograd
        stream = Value(ops.new(self.model.hidden, kind="layer_inputs"), Slot() if checkpointed else None)
        leaf = stream.block if checkpointed else None
        mask = self._mask()
        angles = ops.ledger.new(2 * self.batch.length * self.model.head_dim * ops.element)
        copied = OFFLOAD_BUFFERS if policy == "offload" and self.batch.cuda else 0
        buffers = [ops.new(self.model.hidden, kind="layer_inputs") for _ in range(copied)]
        every = int(policy.removeprefix("every_")) if policy.startswith("every_") else 1
        for number, linears in enumerate(self.model.layers):
            layer = partial(self._layer, number, linears)
            if checkpointed and number % every == 0:
                stream = ops.tape.checkpoint(layer, stream, offload=policy == "offload")
            else:
                stream = layer(stream)
        stream = ops.norm(stream, self.model.hidden)
        result = self._head(stream)
        del stream
        ops.autocast.clear()
        ops.tape.backward(result, ops.ledger.new(0))
        del mask, angles, leaf, buffers

    def _mask(self) -> Block:
        """(rows, 1, length, length) booleans shared by all layers; two more exist while it is built."""
        size = self.batch.rows * self.batch.length**2 * BOOL if self.batch.mask else 0
        parts = [self.ops.ledger.new(size, "mask") for _ in range(2)]
        mask = self.ops.ledger.new(size, "mask")
        del parts
        return mask

    def _layer(self, number: int, linears: Mapping[str, Linear], x: Value) -> Value:
        """Norm, attention, residual, norm, MLP, residual."""
        ops, width = self.ops, self.model.hidden
        h = ops.norm(x, width)
        h = self._attention(number, linears, h)
        h = ops.add(x, h, width)
        residual = h
        h = ops.norm(h, width)
        h = self._mlp(number, linears, h)
        return ops.add(residual, h, width, kind="layer_inputs")

    def _mlp(self, number: int, linears: Mapping[str, Linear], x: Value) -> Value:
        ops, width = self.ops, linears["gate_proj"].outer
        gate, up_proj = linears["gate_proj"], linears["up_proj"]
        gated = ops.silu(ops.linear(f"{number}.gate", x, gate, [up_proj]), width)
        up = ops.linear(f"{number}.up", x, up_proj, [gate])
        product = ops.times(gated, up, width)
        del gated, up
        return ops.linear(f"{number}.down", product, linears["down_proj"])

    def _attention(self, number: int, linears: Mapping[str, Linear], x: Value) -> Value:
        """Queries, keys and values stay alive until the output projection: local names hold them."""
        ops = self.ops
        wide, narrow = linears["q_proj"].outer, linears["k_proj"].outer
        own = {name: linears[f"{name}_proj"] for name in "qkv"}
        query, key, value = (
            ops.linear(f"{number}.{name}", x, one, [o for other, o in own.items() if other != name])
            for name, one in own.items()
        )
        rotated, key_rotated = ops.rotate(query, wide), ops.rotate(key, narrow)
        query, key = rotated, key_rotated
        del rotated, key_rotated
        mixed = self._attend(query, key, value, wide, narrow)
        return ops.linear(f"{number}.o", mixed, linears["o_proj"])

    def _attend(self, query: Value, key: Value, value: Value, wide: int, narrow: int) -> Value:
        """SDPA (flash or memory-efficient) or variable-length attention: no scores, one log-sum per token and head.

        With a dense mask transformers repeats keys and values for every head, and torch converts the mask to the
        step's dtype.
        """
        ops = self.ops
        if self.batch.mask and wide != narrow:
            key, value = self._repeated(key, wide, narrow), self._repeated(value, wide, narrow)
            narrow = wide
        if self.batch.scores:
            return self._attend_by_scores(query, key, value, wide, narrow)
        slots = (query.slot, key.slot, value.slot)
        mask = ops.ledger.new(self.batch.rows * self.batch.length**2 * ops.element if self.batch.mask else 0, "mask")
        frame = ops.tape.frame if self.batch.policy == "selective" else None
        if frame is not None and ops.tape.recomputing:
            out, sums = frame.kept.pop(0)
        else:
            out, sums = ops.new(wide), ops.new(self.model.heads, FP32)
            if frame is not None:
                frame.kept.append((out, sums))
        # fp32 sums of the queries' gradient, and of keys' and values' for every head: inside the kernel on a GPU
        scratch = (FP32 * wide + (2 * ops.element * wide if wide != narrow else 0)) if self.batch.cuda else 0

        def back(g: Block, saved: list[Block]) -> list[tuple[Slot | None, Block]]:
            made = [ops.new(wide), ops.new(narrow), ops.new(narrow)]
            within = ops.new(scratch, 1)
            del within
            return list(zip(slots, made, strict=True))

        saved = [query.block, key.block, value.block, out, sums, mask]
        return ops.tape.record(lambda: out, slots, saved, back)

    def _attend_by_scores(self, query: Value, key: Value, value: Value, wide: int, narrow: int) -> Value:
        """`_scaled_dot_product_attention_math`: 16-bit inputs as fp32, keys and values for every head, scores, and
        their softmax, which is saved.
        """
        ops, slots = self.ops, (query.slot, key.slot, value.slot)
        size = self.batch.rows * self.model.heads * self.batch.length**2 * FP32
        widened = [ops.new(wide, FP32) for _ in slots]
        scores = ops.ledger.new(size, "scores")
        shares = ops.ledger.new(size, "scores")
        del scores

        def back(g: Block, saved: list[Block]) -> list[tuple[Slot | None, Block]]:
            of_inputs = [ops.new(wide, FP32)]
            of_shares = ops.ledger.new(size, "scores")
            of_scores = ops.ledger.new(size, "scores")
            del of_shares
            of_inputs += [ops.new(wide, FP32) for _ in range(2)]
            del of_scores
            made = [ops.new(wide), ops.new(narrow), ops.new(narrow)]
            del of_inputs
            return list(zip(slots, made, strict=True))

        return ops.tape.record(lambda: ops.new(wide), slots, [*widened, shares], back)

    def _repeated(self, x: Value, wide: int, narrow: int) -> Value:
        slot = x.slot
        return self.ops.run(wide, [x], [], lambda g, _: [(slot, self.ops.new(narrow))])

    def _head(self, x: Value) -> Value:
        """TRL's chunked log-probabilities: one tile of logits, recomputed in backward. Without Triton every position is
        scored, and a tile's fp32 intermediates are alive at the same time.
        """
        ops, hidden, slot = self.ops, self.model.hidden, x.slot
        scored = self.tokens - self.batch.rows  # a row's last token predicts nothing
        tokens, words = min(scored, HEAD_TOKENS), min(self.model.vocabulary, HEAD_WIDTH)
        tile = tokens * HEAD_WIDTH * ops.element
        copied = self.batch.cuda or self.batch.rows > 1
        block = ops.new(hidden) if copied else x.block

        def back(g: Block, saved: list[Block]) -> list[tuple[Slot | None, Block]]:
            gradient = ops.ledger.new(scored * hidden * FP32)
            buffer = ops.ledger.new(tile, "logits")
            if not self.batch.cuda:
                # y, z, log p, p, the gradient, the target as booleans and fp32, their difference
                within = ops.ledger.new(tokens * words * (7 * FP32 + BOOL), "logits")
                del within
                products = ops.ledger.new(FP32 * words * (tokens + hidden) if self.batch.half else 0, "logits")
                del products
            if self.batch.half:
                gradient = ops.ledger.new(scored * hidden * ops.element)
            del buffer, saved
            sliced = ops.new(hidden)
            del gradient
            return [(slot, sliced)]

        sums = ops.new(7, FP32)
        buffer = ops.ledger.new(tile, "logits")
        if not self.batch.cuda:
            within = ops.ledger.new(tokens * words * (3 * FP32 + BOOL), "logits")
            del within
        del buffer
        result = ops.tape.record(lambda: ops.new(4, FP32), [slot], [block], back)
        del sums
        return result
