"""Write a quantised copy of a merged folder, a few rows of one tensor at a time.

Every linear layer that bitsandbytes would quantise is stored in the format, everything else as it is. Weights are
rounded to the nearest value that the format has; no data is used. A weight is read once for each tensor that replaces
it (its values, its scales), so that memory holds no more than one block of rows, in fp32.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from finetune.context import Context
from finetune.errors import InputError
from finetune.merge.nf4_round_trip import quantize_nf4
from finetune.models.loading import copy_clean, more_templates
from finetune.models.skeleton import read_skeleton
from finetune.quantized import formats
from finetune.quantized.formats import GROUP, Stored
from finetune.recipe.outlets import HfKind
from finetune.utils.files import read_json, write_json
from finetune.utils.limits import require_space
from finetune.utils.safetensors_io import (
    ITEM_BYTES,
    TensorRef,
    TensorShape,
    plan_shards,
    read_folder,
    torch_dtype,
    write_shards,
)

BLOCK_ELEMENTS = 1 << 20  # 4 MB in fp32
SHARD_BYTES = 5_000_000_000
FP8_MAX, INT4_HALF = 448.0, 7.5  # largest float8_e4m3fn; half the range of -8 … 7, as compressed-tensors takes it
NOT_COPIED = ("manifest.json", "building.json", "certificate.json", "model.safetensors.index.json")
SPARE_BYTES = 64_000_000  # tokenizer and configurations beside the weights


@dataclass(frozen=True)
class Plan:
    """The tensors of a folder: `parts` maps the name of each written tensor to its source and form.

    `quantized` are the weights, by name in the files; `kept` the linear modules that stay as they are.
    """

    kind: HfKind
    parts: Mapping[str, tuple[TensorRef, Stored | None]]
    quantized: tuple[str, ...]
    kept: tuple[str, ...]

    @property
    def shapes(self) -> list[TensorShape]:
        """Return the tensors to be written."""
        return [
            TensorShape(name, part.dtype if part else ref.dtype, part.shape if part else ref.shape)
            for name, (ref, part) in self.parts.items()
        ]


def plan(folder: Path, kind: HfKind) -> Plan:
    """Plan the quantised copy of the merged model in `folder` from its headers and config.json.

    Raises InputError for a model that has no such format.
    """
    config = read_json(folder / "config.json")
    if why := formats.problem(config, [kind]):
        raise InputError(f"export.hf: {why}")
    refs = read_folder(folder)
    skeleton = read_skeleton(folder, refs)
    if skeleton.stored.made_of:
        raise InputError(f"export.hf: {config['model_type']} stores its weights in another form than it computes with")
    linear = {n for n, k in skeleton.kinds.items() if k == "linear"}
    if odd := sorted(skeleton.quantized - linear):
        raise InputError(f"export.hf: {odd[0]} is a {skeleton.kinds[odd[0]]}; only linear layers are written")
    names = {skeleton.stored.in_file(f"{module}.weight") for module in skeleton.quantized}
    parts: dict[str, tuple[TensorRef, Stored | None]] = {}
    for name, ref in refs.items():
        if name not in names:
            parts[name] = ref, None
            continue
        rows, width = ref.shape
        if why := next(formats.width_problems({name: width}, [kind]), None):
            raise InputError(f"export.hf: {why}")
        for part in formats.stored(kind, (rows, width), ref.dtype):
            parts[name + part.suffix] = ref, part
    return Plan(kind, parts, tuple(n for n in refs if n in names), tuple(sorted(linear - skeleton.quantized)))


def write(folder: Path, out: Path, planned: Plan, ctx: Context) -> int:
    """Write the planned copy of `folder` to the new folder `out`, synced to disk; return the bytes of its weights."""
    out.mkdir()
    shards = plan_shards(planned.shapes, SHARD_BYTES)
    require_space(out, shards.file_bytes + SPARE_BYTES, f"export: {planned.kind}", "ask for fewer formats")
    names = [t.name for t in shards.tensors]
    tracked = ctx.track(names, f"export {planned.kind}", len(names))
    pieces = ((name, piece) for name in tracked for piece in _pieces(planned.kind, *planned.parts[name]))
    for name, digest in write_shards(out, shards, pieces).items():
        ctx.hashed(out / name, digest)
    config = read_json(folder / "config.json")
    dtype = str(config.get("dtype") or config.get("torch_dtype"))
    write_json(
        out / "config.json", config | {"quantization_config": formats.settings(planned.kind, planned.kept, dtype)}
    )
    for path in sorted(folder.iterdir()):
        weights = path.suffix == ".safetensors" or path.name.startswith("lease.")
        if path.is_file() and not weights and path.name not in (*NOT_COPIED, "config.json"):
            shutil.copyfile(path, out / path.name)
    for name in more_templates(folder):
        copy_clean(folder / name, out / name)
    return shards.file_bytes


def _pieces(kind: HfKind, ref: TensorRef, part: Stored | None) -> Iterator[torch.Tensor]:
    """Yield one written tensor in pieces of whole rows."""
    if part is None:
        yield from _rows(ref) if len(ref.shape) == 2 else [ref.load()]
    elif part.suffix == "_shape":
        yield torch.tensor(ref.shape, dtype=torch.int64)
    elif part.suffix == ".quant_map":
        from bitsandbytes.functional import get_4bit_type

        yield get_4bit_type("nf4", device="cpu").float()
    elif part.suffix.startswith(".quant_state"):
        state = formats.nf4_state((ref.shape[0], ref.shape[1]), ref.dtype)
        yield torch.frombuffer(bytearray(state), dtype=torch.uint8)
    else:
        made = {"fp8": _fp8, "w4a16": _int4, "nf4": _nf4}[kind]
        for rows in _rows(ref):
            yield made(rows, part.suffix)


def _rows(ref: TensorRef) -> Iterator[torch.Tensor]:
    """Yield a matrix in blocks of rows, in its own dtype."""
    rows, width = ref.shape
    row_bytes = width * ITEM_BYTES[ref.dtype]
    step = max(1, BLOCK_ELEMENTS // max(1, width))
    for start in range(0, rows, step):
        count = min(step, rows - start)
        raw = torch.empty(count * row_bytes, dtype=torch.uint8)
        ref.read_into(raw, start * row_bytes)
        yield raw.view(torch_dtype(ref.dtype)).view(count, width)


def _scale(highest: torch.Tensor, largest: float, dtype: torch.dtype) -> torch.Tensor:
    """Return the scale that maps `highest` to `largest`, rounded to `dtype`, never 0."""
    return (highest / largest).to(dtype).clamp(min=torch.finfo(dtype).tiny)


def _fp8(rows: torch.Tensor, suffix: str) -> torch.Tensor:
    """float8_e4m3fn with one scale per output channel."""
    values = rows.float()
    scale = _scale(values.abs().amax(dim=1, keepdim=True), FP8_MAX, rows.dtype)
    if suffix == "_scale":
        return scale
    return (values / scale.float()).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def _int4(rows: torch.Tensor, suffix: str) -> torch.Tensor:
    """Integers -8 … 7 with one scale per GROUP inputs; eight per int32, the first in the lowest bits, offset by 8."""
    groups = rows.float().view(len(rows), -1, GROUP)
    scale = _scale(groups.abs().amax(dim=2), INT4_HALF, rows.dtype)
    if suffix == "_scale":
        return scale
    codes = (groups / scale.float().unsqueeze(2)).round_().clamp_(-8, 7).add_(8).view(len(rows), -1, 8)
    shifted = codes.numpy().astype(np.uint32) << np.arange(0, 32, 4, dtype=np.uint32)
    return torch.from_numpy(np.bitwise_or.reduce(shifted, axis=2).view(np.int32))


def _nf4(rows: torch.Tensor, suffix: str) -> torch.Tensor:
    """NF4 as bitsandbytes stores it, with one fp32 scale per 64 weights, without double quantisation."""
    packed, scales = quantize_nf4(rows)
    return packed if suffix == "" else scales
