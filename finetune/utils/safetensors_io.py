"""Safetensors one tensor at a time: read a folder lazily, write shards straight to file.

The format (https://github.com/huggingface/safetensors#format) is eight bytes of header length, a JSON header and raw
bytes, so both directions need no more than one tensor of memory. Tensors are read into memory rather than mapped: a
private mapping of a 14 GB file counts against the commit limit, and a 12.7 GB machine refuses it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import FinetuneError, InputError
from finetune.utils.files import canonical_json, read_json, write_json
from finetune.utils.limits import reading
from finetune.utils.synced_file import SyncedFile, forget_pages

if TYPE_CHECKING:
    import torch

ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
TORCH_NAMES = {
    "F64": "float64", "I64": "int64", "U64": "uint64", "F32": "float32", "I32": "int32", "U32": "uint32",
    "F16": "float16", "BF16": "bfloat16", "I16": "int16", "U16": "uint16", "I8": "int8", "U8": "uint8",
    "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
CODES = {name: code for code, name in TORCH_NAMES.items()}
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class TensorShape:
    """Name, dtype and shape of a tensor."""

    name: str
    dtype: str  # safetensors code: "BF16", "F32", …
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class TensorRef(TensorShape):
    """Position of one tensor in a file; nothing is read before `load`."""

    file: Path
    offset: int  # bytes from the start of the file

    def load(self) -> torch.Tensor:
        """Return a copy of the tensor on the CPU, in the dtype of the file."""
        import torch

        raw = torch.empty(self.size_bytes, dtype=torch.uint8)
        self.read_into(raw)
        return raw.view(torch_dtype(self.dtype)).reshape(self.shape)

    def read_into(self, raw: torch.Tensor, start: int = 0, *, once: bool = False) -> None:
        """Fill `raw` (uint8) with the tensor's bytes from `start` on.

        With `once` the pages are dropped from the page cache after reading. Otherwise a large model evicts everything
        else, and on a virtual machine each new page costs many times the copy itself.
        """
        if not len(raw):
            return
        with self.file.open("rb") as file:
            begin = self.offset + start
            file.seek(begin)
            if file.readinto(raw.numpy().data) != len(raw):
                raise InputError(f"{self.file}: ended early: the file was truncated while it was read")
            if once:
                forget_pages(file.fileno(), begin, len(raw))


@dataclass(frozen=True, slots=True)
class GrownRef(TensorRef):
    """A tensor with more rows than the `stored_rows` that the file has; the additional rows are zeros."""

    stored_rows: int

    def read_into(self, raw: torch.Tensor, start: int = 0, *, once: bool = False) -> None:
        """As for a tensor that is stored whole."""
        stored = self.stored_rows * prod(self.shape[1:]) * ITEM_BYTES[self.dtype]
        there = min(len(raw), max(0, stored - start))
        TensorRef.read_into(self, raw[:there], start, once=once)
        raw[there:] = 0

    @classmethod
    def of(cls, ref: TensorRef, rows: int) -> GrownRef:
        """Return `ref` with `rows` rows."""
        return cls(ref.name, ref.dtype, (rows, *ref.shape[1:]), ref.file, ref.offset, ref.shape[0])


def torch_dtype(code: str) -> torch.dtype:
    """Return the torch dtype of a safetensors code ("BF16") or of a plain name ("bfloat16")."""
    import torch

    dtypes: dict[str, torch.dtype] = {name: vars(torch)[name] for name in CODES}
    return dtypes[TORCH_NAMES.get(code, code)]


def dtype_code(name: str) -> str:
    """Return the safetensors code of a plain dtype name: "bfloat16" → "BF16"."""
    return CODES[name.removeprefix("torch.")]


def read_file(path: Path) -> dict[str, TensorRef]:
    """Return the tensors of one safetensors file by name, in the file's order.

    Raises InputError if the file is truncated, is not a safetensors file, or holds an unsupported dtype.
    """
    with reading(f"{path}: its safetensors header is damaged; download it again"):
        return _read_header(path)


def _read_header(path: Path) -> dict[str, TensorRef]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise InputError(f"{path}: not a safetensors file, or cut short ({size} bytes); download it again")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
        except ValueError as error:
            raise InputError(f"{path}: the safetensors header is not JSON ({error}); download it again") from error
    header.pop("__metadata__", None)
    refs = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in ITEM_BYTES:
            raise InputError(f"{path}: tensor {name} has dtype {entry['dtype']}; known are {', '.join(ITEM_BYTES)}")
        begin, end = entry["data_offsets"]
        numbers = (begin, end, *entry["shape"])
        if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 62 for n in numbers):
            raise InputError(f"{path}: tensor {name} has a shape or a place that is none; download it again")
        ref = TensorRef(name, entry["dtype"], tuple(entry["shape"]), path, 8 + length + begin)
        if end - begin != ref.size_bytes or ref.offset + ref.size_bytes > size:
            raise InputError(
                f"{path}: tensor {name} {ref.dtype}{list(ref.shape)} needs {ref.size_bytes} bytes at {ref.offset}, "
                f"the file has {size} bytes in all; it was cut short, download it again"
            )
        refs[name] = ref
    return refs


def read_folder(folder: Path) -> dict[str, TensorRef]:
    """Return all tensors of a model folder by name: those of its index if it has one, else of every `*.safetensors`.

    `consolidated*.safetensors` (the same weights under other names, in Mistral's repositories) is skipped. Raises
    InputError if there are no weights, a shard is missing, or two files hold the same name.
    """
    index = folder / "model.safetensors.index.json"
    weight_map: dict[str, str] = {}
    if index.exists():
        with reading(f"{index} is not an index of weights; download it again"):
            weight_map = {str(name): str(file) for name, file in read_json(index)["weight_map"].items()}
    names = sorted(set(weight_map.values())) or sorted(
        p.name for p in folder.glob("*.safetensors") if not p.name.startswith("consolidated")
    )
    if not names:
        raise InputError(f"{folder}: no *.safetensors here; the model must be in safetensors form")
    refs: dict[str, TensorRef] = {}
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"{index}: names {name}, which is not in the folder; download it again")
        for key, ref in read_file(folder / name).items():
            if key in refs:
                raise InputError(f"{folder}: {key} is in {refs[key].file.name} and in {name}; keep one of them")
            refs[key] = ref
    if weight_map and (missing := sorted(set(weight_map) ^ set(refs))):
        raise InputError(f"{index}: the index and the shards differ in {missing[0]} ({len(missing)} names in all)")
    return refs


@dataclass(frozen=True, slots=True)
class Shard:
    """One file to be written, its tensors in the order of their bytes."""

    file: str
    tensors: tuple[TensorShape, ...]

    def header(self) -> bytes:
        """Length and JSON header, padded so that the data begins at a multiple of 8."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for tensor in self.tensors:
            end = begin + tensor.size_bytes
            entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
            begin = end
        text = canonical_json(entries).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """All files of a checkpoint, planned from shapes alone."""

    shards: tuple[Shard, ...]

    @property
    def total_size(self) -> int:
        """Bytes of all tensors' data (the index's `total_size`)."""
        return sum(t.size_bytes for t in self.tensors)

    @property
    def file_bytes(self) -> int:
        """Bytes of all safetensors files, headers included."""
        return self.total_size + sum(len(s.header()) for s in self.shards)

    @property
    def tensors(self) -> Iterator[TensorShape]:
        """Yield every tensor in the order in which it is written."""
        return (t for shard in self.shards for t in shard.tensors)


def plan_shards(tensors: Iterable[TensorShape], max_shard_bytes: int) -> ShardPlan:
    """Assign tensors to files of at most `max_shard_bytes` of data, layers in numeric order, with the Hub's file names.

    A larger tensor gets its own file. The result depends only on the set of tensors, not on its order.
    """
    groups: list[list[TensorShape]] = [[]]
    room = max_shard_bytes
    for tensor in sorted(tensors, key=lambda t: _natural(t.name)):
        if groups[-1] and tensor.size_bytes > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(tensor)
        room -= tensor.size_bytes
    count = len(groups)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    return ShardPlan(
        tuple(
            # widest items first: every tensor then begins at a multiple of its item size
            Shard(name, tuple(sorted(group, key=lambda t: -ITEM_BYTES[t.dtype])))
            for name, group in zip(names if count > 1 else ["model.safetensors"], groups, strict=True)
        )
    )


def write_shards(folder: Path, plan: ShardPlan, pieces: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """Write tensors, whole or a few rows at a time, in the order of `plan.tensors`; synced to disk.

    `pieces` may overwrite the memory of a piece as soon as the next one is requested. Returns each safetensors file's
    xxh3-128. Raises FinetuneError if a piece does not match the planned tensor (name, dtype, shape), or if there are
    too few or too many pieces.
    """
    stream = iter(pieces)
    digests = {}
    for shard in plan.shards:
        with SyncedFile(folder / shard.file) as file:
            file.write(memoryview(shard.header()))
            for planned in shard.tensors:
                _write_tensor(file, planned, stream)
        digests[shard.file] = file.digest()
    for name, _ in stream:
        raise FinetuneError(f"the merge yields {name}, which is not planned; this is a bug in finetune")
    if len(plan.shards) > 1:
        weight_map = {t.name: shard.file for shard in plan.shards for t in shard.tensors}
        write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": plan.total_size}, "weight_map": weight_map},
        )
    return digests


def _write_tensor(file: SyncedFile, planned: TensorShape, stream: Iterator[tuple[str, torch.Tensor]]) -> None:
    rows = 0
    while True:
        name, tensor = next(stream, ("", None))
        if tensor is None:
            raise FinetuneError(f"the merge ended before {planned.name} was written")
        shape = tuple(tensor.shape)
        rows += shape[0] if shape else 0
        written = TensorShape(name, dtype_code(str(tensor.dtype)), (rows, *shape[1:]) if shape else ())
        fits = replace(written, shape=planned.shape) == planned and len(shape) == len(planned.shape)
        if not fits or written.shape[1:] != planned.shape[1:] or (shape and rows > planned.shape[0]):
            raise FinetuneError(f"the merge yields {written}, planned is {planned}; this is a bug in finetune")
        file.write(_bytes_of(tensor))
        if written.shape == planned.shape:
            return


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the tensor's own memory, if it is on the CPU and contiguous; else that of a copy."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _natural(name: str) -> tuple[tuple[int, str], ...]:
    """Sort key that puts layer 2 before layer 10."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name))
