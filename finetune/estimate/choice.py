"""Choose the fastest micro-batch and checkpointing policy that fit a GPU, and predict the speed.

A step's time is its arithmetic at a share of the datasheet's rate plus memory traffic: every micro-batch dequantises
the base once per pass and launches every kernel, so fewer and larger micro-batches are faster.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from finetune.estimate import memory as estimate_memory
from finetune.estimate.activations import POLICIES, Policy
from finetune.estimate.memory import GROUPED, Attention, Training
from finetune.estimate.shapes import Shapes, trained_tensors

GIB = 1 << 30
PADDED_ROWS = 4  # most per micro-batch: with more, padding grows
ASSUMED_UTILISATION = 0.35
LAYER_SECONDS = 0.010  # least time of a layer per micro-batch: kernel launches (0.34 s for a 7B's 32 layers on an H200)
HOST_BANDWIDTH = 12e9  # assumed: bytes/s between GPU and pinned RAM, PCIe 3
MARGIN = 0.05  # share of the memory left free if there is a choice
COMPILE_SECONDS = 80.0  # a graph for the first length and one for any: 31 s each (7B on an H200)
COMPILED_SHARE = 0.2  # of a step that compiled layers save where adapters are fused (0.963 s of 1.218 there)
LONGEST_ON = ("rtx3070", "t4", "rtx3090", "a100-80")  # 8, 15, 24 and 80 GB
ROW_UNIT = 128  # tokens
VARLEN_TOKENS = 65_536  # per micro-batch: more gains nothing


@dataclass(frozen=True)
class Device:
    """Usable memory in bytes, datasheet rates (dense 16-bit FLOP/s, memory bytes/s), and whether it is ≥ sm80."""

    memory_bytes: int
    flops: float
    bandwidth: float
    ampere: bool = True


DEVICES = {
    "rtx3070": Device(int(7.6 * GIB), 40.6e12, 448e9),
    "t4": Device(int(14.7 * GIB), 65e12, 320e9, ampere=False),
    "l4": Device(int(22.0 * GIB), 121e12, 300e9),
    "a10g": Device(int(22.0 * GIB), 70e12, 600e9),
    "rtx3090": Device(int(23.6 * GIB), 71e12, 936e9),
    "rtx4090": Device(int(23.6 * GIB), 165e12, 1008e9),
    "a100-40": Device(int(39.4 * GIB), 312e12, 1555e9),
    "a100-80": Device(int(79.2 * GIB), 312e12, 2039e9),
    "h100": Device(int(79.2 * GIB), 989e12, 3350e9),
    "h200": Device(int(139.8 * GIB), 989e12, 4800e9),
}


def device_like(name: str, memory_bytes: int, ampere: bool) -> Device:
    """Return the device of this driver name with its actual memory; an unknown one gets an A10G's rates."""
    plain = name.lower().replace(" ", "")
    keys = sorted(DEVICES, key=len, reverse=True)
    words = {key: key.partition("-")[0] for key in keys}
    known = next((DEVICES[key] for key in keys if words[key] in plain), DEVICES["a10g"])
    return replace(known, memory_bytes=memory_bytes, ampere=ampere)


@dataclass(frozen=True)
class Choice:
    """One way to train, with its memory and speed."""

    rows: int
    policy: Policy
    parts: Mapping[str, int]  # bytes by use
    tokens_per_second: float
    fits: bool
    budget_bytes: int

    @property
    def total(self) -> int:
        """Return the peak in bytes."""
        return sum(self.parts.values())

    def describe(self) -> str:
        """Return a one-line description."""
        rows = f"{self.rows} row{'s' if self.rows > 1 else ''} at once"
        how = "" if self.fits else ", too few"
        return (
            f"{rows} and checkpointing {self.policy}: {self.total / 1e9:.1f} GB predicted at the peak of the "
            f"{self.budget_bytes / 1e9:.1f} GB there are{how}"
        )


class Options:
    """All combinations of rows per micro-batch and policy, with their bytes."""

    def __init__(self, shapes: Shapes, run: Training, world: int = 1) -> None:
        self.shapes, self.run, self.world = shapes, run, world
        self._parts: dict[tuple[int, Policy, Attention], dict[str, int]] = {}

    def parts(self, rows: int, policy: Policy, attention: Attention) -> dict[str, int]:
        """Return bytes by use."""
        key = rows, policy, attention
        if key not in self._parts:
            self._parts[key] = estimate_memory.training(self.shapes, self.run, rows, policy, attention, self.world)
        return self._parts[key]

    def rows(self, *, varlen: bool) -> list[int]:
        """Return the allowed rows per micro-batch: the recipe's, else divisors of a process's share of the batch."""
        asked, share = self.run.runtime.micro_batch_rows, max(1, self.run.train.batch_rows // self.world)
        if asked != "auto":
            return [int(asked)]
        most = max(1, PADDED_ROWS // self.run.sequences)
        if self.run.packed:  # a dense mask over all packed rows together grows with the square of their tokens
            most = max(1, VARLEN_TOKENS // self.run.row_tokens) if varlen else 1
        return [n for n in range(1, min(most, share) + 1) if share % n == 0]

    def policies(self) -> Sequence[Policy]:
        """Return the allowed policies: the recipe's, or all."""
        asked = self.run.runtime.checkpointing
        every = [p for p in POLICIES if p != "offload" or self.run.runtime.compile is not True]
        return every if asked == "auto" else (asked,)

    def best(self, device: Device, *, varlen: bool | None = None) -> Choice:
        """Return the fastest choice that fits device and runtime.memory_budget_gb with a margin; else the smallest."""
        if varlen is None:
            varlen = device.ampere and self.run.packed and self.run.train.precision != "fp32"
        attention = Attention(varlen=varlen, grouped=device.ampere)
        budget = device.memory_bytes
        if self.run.runtime.memory_budget_gb is not None:
            budget = min(budget, int(self.run.runtime.memory_budget_gb * 1e9))
        ways = [(rows, policy) for rows in self.rows(varlen=varlen) for policy in self.policies()]
        rates = {way: tokens_per_second(self.shapes, self.run, device, *way, attention) for way in ways}
        room, fewest = (1 - MARGIN) * budget, min(rows for rows, _ in ways)
        too_many: dict[Policy, int] = {}  # rows of a policy that do not fit; more rows need more
        for rows, policy in sorted(ways, key=lambda way: -rates[way]):
            for tried in (fewest, rows):  # the fewest rows show whether a policy fits at all
                if tried < too_many.get(policy, tried + 1) and self._total(tried, policy, attention) > room:
                    too_many[policy] = tried
            if rows < too_many.get(policy, rows + 1):
                return self._chosen(rows, policy, attention, rates[rows, policy], budget)
        least = min(self.policies(), key=lambda policy: self._total(fewest, policy, attention))
        return self._chosen(fewest, least, attention, rates[fewest, least], budget)

    def worth_fusing(self, choice: Choice) -> bool:
        """Return whether GPU work, not kernel launches, dominates a micro-batch: a fused adapter has fewer, longer
        kernels but more Python (7 % faster at 16 k tokens on an H200, slower at 2 k; docs/lab-notes.md).
        """
        seconds = choice.rows * self.run.row_tokens / choice.tokens_per_second
        return seconds >= 2 * LAYER_SECONDS * self.shapes.layers

    def worth_compiling(self, choice: Choice, steps: int | None) -> bool:
        """Return whether layers are compiled: as runtime.compile has it; auto, if `steps` save more than it takes.

        `steps` is None if unknown. Only what was measured: plain adapters that are fused, in 16 bits, activations on
        the GPU (a layer that is not fused may keep its dequantised matrix when it is compiled).
        """
        run, asked = self.run, self.run.runtime
        if asked.compile != "auto":
            return asked.compile
        fused = asked.fused_adapters == "on" or (asked.fused_adapters == "auto" and self.worth_fusing(choice))
        if not fused or steps is None or choice.policy == "offload" or run.reference or run.quantization is None:
            return False
        if run.lora.dora or run.train.precision == "fp32":
            return False
        tokens = steps * run.train.batch_rows * run.row_tokens / self.world
        return COMPILED_SHARE * tokens / choice.tokens_per_second > COMPILE_SECONDS

    def _total(self, rows: int, policy: Policy, attention: Attention) -> int:
        return sum(self.parts(rows, policy, attention).values())

    def _chosen(self, rows: int, policy: Policy, attention: Attention, rate: float, budget: int) -> Choice:
        fits = self._total(rows, policy, attention) <= budget
        return Choice(rows, policy, self.parts(rows, policy, attention), rate, fits, budget)


def longest_rows(shapes: Shapes, run: Training, device: Device, most: int) -> tuple[int, Choice] | None:
    """Return the most tokens that a row may have on a device, and how to train them; None if ROW_UNIT are too many.

    In multiples of ROW_UNIT up to `most`: whatever is asked of policy and rows at once, longer rows need more.
    """

    def choice(units: int) -> Choice:
        return Options(shapes, replace(run, row_tokens=ROW_UNIT * units)).best(device)

    units = bisect.bisect_left(range(1, most // ROW_UNIT + 1), x=True, key=lambda n: not choice(n).fits)
    return (ROW_UNIT * units, choice(units)) if units else None


def recomputed(policy: Policy, layers: int) -> tuple[float, float]:
    """Return the shares of the layers' matrix products and of their attention that are recomputed."""
    if policy == "none":
        return 0.0, 0.0
    if policy.startswith("every_"):
        share = -(-layers // int(policy.removeprefix("every_"))) / layers
        return share, share
    return 1.0, 0.0 if policy == "selective" else 1.0


def flops_per_token(
    shapes: Shapes, run: Training, length: int, policy: Policy = "none", *, dense: bool = False
) -> float:
    """Of the layers: forward 2N, backward 2N (the base is frozen: no weight gradients), and what is recomputed. Of
    the head 6N, as its logits are computed again in backward, 8N with rows of new tokens; of the adapter 6N. Attention:
    2 forward, 5 backward, each times heads x head_dim x length (causal; twice that under a dense mask), as in
    FlashAttention-2 (arXiv:2307.08691).
    """
    products, attention = recomputed(policy, shapes.layers)
    head, adapter = shapes.vocabulary * shapes.hidden, sum(trained_tensors(shapes, run.lora))
    scores = shapes.layers * shapes.heads * shapes.head_dim * length * (2 if dense else 1)
    return (
        (4 + 2 * products) * shapes.active_parameters
        + (8 if shapes.new_tokens else 6) * head
        + (6 + 2 * products) * adapter
        + (7 + 2 * attention) * scores
    )


def forward_flops_per_token(shapes: Shapes, length: int) -> float:
    """Of one forward without gradients: layers, head and causal attention; the adapter's share is under 1 %."""
    scores = shapes.layers * shapes.heads * shapes.head_dim * length
    return 2 * (shapes.active_parameters + shapes.vocabulary * shapes.hidden + scores)


def tokens_per_second(
    shapes: Shapes, run: Training, device: Device, rows: int, policy: Policy, attention: Attention = GROUPED
) -> float:
    """Return tokens per second of one GPU if every row has the maximum length."""
    length = run.row_tokens
    batch = estimate_memory.micro_batch(shapes, run, rows, policy, attention, held=True)
    tokens, dense = rows * run.sequences * length, batch.mask or batch.scores
    per_token = flops_per_token(shapes, run, batch.length if batch.mask else length, policy, dense=dense)
    if run.reference:
        per_token += forward_flops_per_token(shapes, length)
    seconds = max(tokens * per_token / (ASSUMED_UTILISATION * device.flops), LAYER_SECONDS * shapes.layers)
    if run.quantization:
        passes = 2 + recomputed(policy, shapes.layers)[0] + (1 if run.reference else 0)
        seconds += passes * 4.5 * shapes.quantized_parameters / device.bandwidth  # read 4 bits, write 16, read them
    if policy == "offload":
        seconds += 2 * 2 * shapes.layers * tokens * shapes.hidden / HOST_BANDWIDTH
    return tokens / seconds


def this_gpu(device: str, world: int) -> tuple[str, int, bool]:
    """Return the GPU's name, the bytes available for training, and whether it is sm80 or newer.

    Available are the free bytes plus those of this process's context; with several processes all of the GPU, so that
    they make the same choice.
    """
    import torch

    from finetune.estimate.memory import CONTEXT_BYTES
    from finetune.models.device import gpu_index

    index = gpu_index(device)
    free, total = torch.cuda.mem_get_info(index)
    room = total if world > 1 else min(total, free + CONTEXT_BYTES)
    return torch.cuda.get_device_name(index), room, torch.cuda.get_device_capability(index) >= (8, 0)
