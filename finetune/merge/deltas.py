"""Read a peft adapter as changes to named tensors of its base, or refuse it by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from finetune.errors import InputError
from finetune.merge.adapter_config import AdapterConfig
from finetune.utils.files import read_json
from finetune.utils.safetensors_io import FLOATS, TensorRef

if TYPE_CHECKING:
    import torch

    from finetune.models.skeleton import Skeleton

PREFIX = "base_model.model."
SUFFIXES = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_B.bias": "b_bias",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".base_layer.weight": "weight",
    ".base_layer.bias": "bias",
    ".token_adapter.trainable_tokens_delta": "tokens",
}
INITS = (True, False, "gaussian", "eva")  # initialisations that do not change the base
REFUSED_FIELDS = (
    "target_parameters", "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config",
    "kasa_config", "velora_config", "monteclora_config", "megatron_config", "loftq_config", "corda_config",
    "lora_ga_config", "ensure_weight_tying",
)  # fmt: skip
Parts = dict[str, dict[str, TensorRef]]


Layout = Literal["linear", "conv1d", "embedding"]
Edit = Callable[["torch.Tensor", slice], None]
"""Function that changes in place an fp32 tensor with the given rows (a slice with start and stop) of a weight."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """W + scale·BA; with a magnitude m (DoRA, arXiv:2402.09353) m / ‖W + scale·BA‖ · (W + scale·BA).

    W is (out, in), Conv1D (in, out), embedding (vocabulary, d).
    """

    a: TensorRef  # (r, in); embedding: (r, vocabulary)
    b: TensorRef  # (out, r); embedding: (d, r)
    scale: float
    layout: Layout
    magnitude: TensorRef | None = None

    @property
    def by_rows(self) -> bool:
        """Whether the rows of W are independent: norms of a stored transpose are along the columns."""
        return self.layout == "linear" or self.magnitude is None

    def loaded(self, device: str) -> Edit:
        """Load both factors in fp32 on `device`; return a function that changes rows of W."""
        import torch

        a, b = (ref.load().to(device, torch.float32) for ref in (self.a, self.b))
        straight = self.layout == "linear"
        left, right = (b, a) if straight else (a.T, b.T)
        magnitude = None if self.magnitude is None else self.magnitude.load().to(device, torch.float32).reshape(-1)

        def edit(part: torch.Tensor, rows: slice) -> None:
            part.addmm_(left[rows], right, alpha=self.scale)
            if magnitude is not None and straight:
                part.mul_((magnitude[rows] / torch.linalg.vector_norm(part, dim=1)).unsqueeze(1))
            elif magnitude is not None:
                part.mul_(magnitude / torch.linalg.vector_norm(part, dim=0))

        return edit


@dataclass(frozen=True, slots=True)
class AddBias:
    """b + scale·(bias of LoRA's B)."""

    bias: TensorRef
    scale: float
    by_rows: ClassVar[bool] = True

    def loaded(self, device: str) -> Edit:
        """Load the bias in fp32 on `device`; return a function that changes elements of b (out,)."""
        bias = self.bias.load().to(device).float()

        def edit(part: torch.Tensor, rows: slice) -> None:
            part.add_(bias[rows], alpha=self.scale)

        return edit


@dataclass(frozen=True, slots=True)
class Replace:
    """Replace the base's tensor by the trained one."""

    value: TensorRef
    by_rows: ClassVar[bool] = True

    def loaded(self, device: str) -> Edit:
        """Load the trained tensor on `device`; return a function that writes its rows."""
        value = self.value.load().to(device)

        def edit(part: torch.Tensor, rows: slice) -> None:
            part.copy_(value[rows])

        return edit


@dataclass(frozen=True, slots=True)
class ReplaceRows:
    """Replace some rows of the base's tensor by trained ones."""

    value: TensorRef
    rows: tuple[int, ...]
    by_rows: ClassVar[bool] = True

    def loaded(self, device: str) -> Edit:
        """Load the trained rows on `device`; return a function that writes those within a part of W (vocabulary, d)."""
        import torch

        value = self.value.load().to(device).float()
        places = torch.tensor(self.rows, device=device)

        def edit(part: torch.Tensor, rows: slice) -> None:
            here = (places >= rows.start) & (places < rows.stop)
            part[places[here] - rows.start] = value[here]

        return edit


Change = LowRank | AddBias | Replace | ReplaceRows


def read_changes(
    tensors: Mapping[str, TensorRef], adapter: Path, skeleton: Skeleton, base: Mapping[str, TensorRef]
) -> dict[str, tuple[Change, ...]]:
    """Return base tensor → changes by the adapter.

    `tensors` are those of adapter_model.safetensors, `base` those of the base. Raises InputError with the field or
    tensor that cannot be merged exactly, is missing, or has the wrong shape.
    """
    raw = read_json(adapter / "adapter_config.json")
    _refuse_unsupported(raw, adapter)
    config = AdapterConfig.of(raw)
    parts = _group(tensors, skeleton)
    _refuse_incomplete(parts, config, skeleton, base)
    changes: dict[str, list[Change]] = {}
    for module, refs in parts.items():
        here = {f"{module}.{leaf}": Replace(refs[leaf]) for leaf in ("weight", "bias") if leaf in refs}
        for name, change in here.items():
            changes.setdefault(name, []).append(change)
        if "tokens" in refs:
            rows = _rows(module, config, skeleton, refs["tokens"])
            changes.setdefault(f"{module}.weight", []).append(ReplaceRows(refs["tokens"], rows))
        if low_rank := _low_rank(module, refs, config, skeleton):
            changes.setdefault(f"{module}.weight", []).append(low_rank)
            if "b_bias" in refs:
                changes.setdefault(f"{module}.bias", []).append(AddBias(refs["b_bias"], low_rank.scale))
    for name, made in changes.items():
        _check_shapes(name, made, base, skeleton)
    return {name: tuple(made) for name, made in changes.items()}


def _refuse_unsupported(raw: dict[str, Any], adapter: Path) -> None:
    where = f"{adapter}/adapter_config.json"
    if raw.get("peft_type") != "LORA":
        raise InputError(f"{where}: peft_type is {raw.get('peft_type')!r}; only 'LORA' can be merged")
    init = raw.get("init_lora_weights", True)
    if init not in INITS:
        raise InputError(
            f"{where}: init_lora_weights is {init!r}, which may change the base weights, so the base on the Hub is "
            f"not the one that was trained; allowed: {', '.join(map(repr, INITS))}"
        )
    for name in REFUSED_FIELDS:
        if raw.get(name):
            raise InputError(f"{where}: {name} is set ({raw[name]!r}); merging it is not supported")
    if raw.get("use_dora") and raw.get("lora_bias"):
        raise InputError(f"{where}: use_dora with lora_bias is not supported")


def _group(tensors: Mapping[str, TensorRef], skeleton: Skeleton) -> Parts:
    """Return module → part → tensor; every adapter tensor is used exactly once."""
    parts: Parts = {}
    for key, ref in tensors.items():
        if ref.dtype not in FLOATS:
            raise InputError(
                f"{ref.file}: the adapter tensor {key} is {ref.dtype}; allowed are {', '.join(sorted(FLOATS))}"
            )
        name = key.removeprefix(PREFIX)
        suffix = next((s for s in SUFFIXES if name.endswith(s)), None)
        module, part = (name.removesuffix(suffix), SUFFIXES[suffix]) if suffix else (name.rpartition(".")[0], "")
        if not suffix and (name in skeleton.parameters or name in skeleton.tied):
            part = name.rpartition(".")[2]
        if not key.startswith(PREFIX) or not part or module not in skeleton.kinds:
            raise InputError(
                f"{ref.file}: the base has no module for the adapter tensor {key}; was the adapter made for "
                "another base?"
            )
        if part in parts.setdefault(module, {}):
            raise InputError(f"{ref.file}: {key} defines a part of {module} a second time")
        parts[module][part] = ref
    return parts


def _refuse_incomplete(parts: Parts, config: AdapterConfig, skeleton: Skeleton, base: Iterable[str]) -> None:
    """Raise InputError unless exactly the modules of the configuration have tensors."""
    named = {module for module, kind in skeleton.kinds.items() if kind != "other" and config.targets(module)}
    low_rank = {"a", "b", "b_bias", "magnitude", "embedding_a", "embedding_b"}
    carried = {module for module, tensors in parts.items() if low_rank & set(tensors)}
    if odd := sorted(named ^ carried):
        words = "has no tensors in the adapter" if odd[0] in named else "has tensors that target_modules does not name"
        raise InputError(f"adapter: {odd[0]} {words} ({len(odd)} such modules); the adapter is incomplete or mixed up")
    for module in sorted(named):
        is_embedding = skeleton.kinds[module] == "embedding"
        needed = {"embedding_a", "embedding_b"} if is_embedding else {"a", "b"}
        needed |= ({"magnitude"} if config.use_dora else set()) | ({"b_bias"} if config.lora_bias else set())
        if config.bias != "none" and f"{module}.bias" in base:
            needed.add("bias")
        there = set(parts[module])
        missing, extra = needed - there, (low_rank & there) - needed
        if missing or extra:
            odd = sorted(missing | extra)
            raise InputError(f"adapter: {module} needs {sorted(needed)}, found {sorted(there)} (see {odd})")
    for saved in config.modules_to_save or ():
        holders = [m for m in skeleton.kinds if m == saved or m.endswith(f".{saved}")]
        names = {p for p in (*base, *skeleton.tied) if any(p.startswith(f"{m}.") for m in holders)}
        given = {f"{m}.{part}" for m, tensors in parts.items() for part in tensors}
        if not names or not names <= given:
            raise InputError(f"adapter: modules_to_save names {saved}, but its tensors are not all in the adapter")


def _low_rank(module: str, tensors: dict[str, TensorRef], config: AdapterConfig, skeleton: Skeleton) -> LowRank | None:
    kind = "embedding_" if "embedding_a" in tensors else ""
    if f"{kind}a" not in tensors:
        return None
    a, b = tensors[f"{kind}a"], tensors[f"{kind}b"]
    rank = config.rank(module)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise InputError(
            f"adapter: {module} has A {list(a.shape)} and B {list(b.shape)}; with rank {rank} they must be "
            f"({rank}, in) and (out, {rank})"
        )
    layout = cast("Layout", skeleton.kinds[module])
    return LowRank(a, b, config.scale(module), layout, tensors.get("magnitude"))


def _rows(module: str, config: AdapterConfig, skeleton: Skeleton, delta: TensorRef) -> tuple[int, ...]:
    indices = config.trainable_token_indices
    if isinstance(indices, dict):
        rows = next((v for k, v in indices.items() if module == k or module.endswith(f".{k}")), None)
    else:
        rows = indices if module == skeleton.input_embedding else None
    if rows is None or len(rows) != delta.shape[0] or len(set(rows)) != len(rows):
        raise InputError(f"adapter: {module} carries {delta.shape[0]} trained tokens, adapter_config.json names {rows}")
    return tuple(rows)


def _check_shapes(name: str, changes: list[Change], base: Mapping[str, TensorRef], skeleton: Skeleton) -> None:
    if made_of := skeleton.stored.made_of.get(name):
        raise InputError(
            f"adapter: changes {name}, which transformers converts on load (from {made_of[0]}), so it cannot be merged "
            "tensor by tensor; set merge: null and publish the adapter"
        )
    source = name if name in base else skeleton.tied.get(name, name)
    if source not in base:
        raise InputError(f"adapter: changes {name}, which neither the base nor the merged model has")
    shape = base[source].shape
    if sum(not isinstance(c, Replace) for c in changes) > 1:
        raise InputError(f"adapter: {name} is changed in two ways; merging that is not supported")
    for change in changes:
        if isinstance(change, LowRank):
            made: tuple[int, ...] = (change.b.shape[0], change.a.shape[1])
            made = made if change.layout == "linear" else made[::-1]
            size = change.b.shape[0]
            if change.magnitude and change.magnitude.shape not in ((size,), (1, size), (size, 1)):
                raise InputError(f"adapter: {name} has a magnitude {list(change.magnitude.shape)}, expected [{size}]")
        elif isinstance(change, ReplaceRows):
            made = (shape[0], *change.value.shape[1:])
            if max(change.rows) >= shape[0]:
                raise InputError(f"adapter: trains token {max(change.rows)}, {name} has {shape[0]} rows")
        else:
            made = change.bias.shape if isinstance(change, AddBias) else change.value.shape
        if made != shape:
            raise InputError(
                f"adapter: the change of {name} has shape {list(made)}, the base {list(shape)}; is it the right base, "
                "and was the vocabulary resized?"
            )
