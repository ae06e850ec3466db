"""Safetensors: what we write others read, what others write we read, and damage is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune.errors import FinetuneError, InputError
from finetune.utils import synced_file
from finetune.utils.files import hash_file
from finetune.utils.safetensors_io import (
    TensorShape,
    dtype_code,
    plan_shards,
    read_file,
    read_folder,
    write_shards,
)


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "model.layers.10.w": torch.randn(3, 5).bfloat16(),
        "model.layers.2.w": torch.randn(5, 7),
        "scalar": torch.tensor(3.5),
        "ints": torch.arange(9),
        "flags": torch.tensor([True, False, True]),
        "half": torch.randn(4).half(),
        "empty": torch.empty(0, 4),
    }


def shape(name: str, tensor: torch.Tensor) -> TensorShape:
    return TensorShape(name, dtype_code(str(tensor.dtype)), tuple(tensor.shape))


def write(folder: Path, tensors: dict[str, torch.Tensor], limit: int = 10**9) -> None:
    plan = plan_shards([shape(n, t) for n, t in tensors.items()], limit)
    write_shards(folder, plan, ((t.name, tensors[t.name]) for t in plan.tensors))


def test_one_file_is_read_back_by_the_library(tmp_path: Path) -> None:
    tensors = some_tensors()
    write(tmp_path, tensors)
    back = load_file(tmp_path / "model.safetensors")
    assert set(back) == set(tensors)
    assert all(torch.equal(back[n], tensors[n]) and back[n].dtype == tensors[n].dtype for n in tensors)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors"]


def test_shards_and_index(tmp_path: Path) -> None:
    tensors = {f"model.layers.{i}.w": torch.full((10, 10), float(i)) for i in range(12)}
    write(tmp_path, tensors, limit=1000)  # 400 bytes each: two to a file
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 12 * 400
    assert index["weight_map"]["model.layers.11.w"] == "model-00006-of-00006.safetensors"
    assert index["weight_map"]["model.layers.2.w"] == "model-00002-of-00006.safetensors"
    for file in sorted(set(index["weight_map"].values())):
        assert sum(t.numel() * 4 for t in load_file(tmp_path / file).values()) <= 1000
    back = read_folder(tmp_path)
    assert {n: r.load().tolist() for n, r in back.items()} == {n: t.tolist() for n, t in tensors.items()}


def test_transformers_loads_what_we_shard(tmp_path: Path) -> None:
    from tests.helpers.tiny_models import load, save_tiny

    base = save_tiny(tmp_path / "base")
    refs = read_folder(base)
    plan = plan_shards([TensorShape(r.name, r.dtype, r.shape) for r in refs.values()], 100_000)
    assert len(plan.shards) > 2
    out = tmp_path / "out"
    out.mkdir()
    write_shards(out, plan, ((t.name, refs[t.name].load()) for t in plan.tensors))
    (out / "config.json").write_bytes((base / "config.json").read_bytes())
    assert sum(p.stat().st_size for p in out.glob("*.safetensors")) == plan.file_bytes
    for a, b in zip(load(base).parameters(), load(out).parameters(), strict=True):
        assert torch.equal(a, b)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(40, 400), st.randoms())
def test_the_plan_holds_every_tensor_once_whatever_the_order(sizes: list[int], limit: int, random: object) -> None:
    shapes = [TensorShape(f"w.{i}", "F16" if size % 2 else "F32", (size,)) for i, size in enumerate(sizes)]
    plan = plan_shards(shapes, limit)
    shuffled = list(shapes)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert plan == plan_shards(shuffled, limit)
    assert sorted(t.name for t in plan.tensors) == sorted(s.name for s in shapes)
    assert all(len(s.tensors) == 1 or sum(t.size_bytes for t in s.tensors) <= limit for s in plan.shards)
    for shard in plan.shards:  # aligned, so that readers may map the file
        entries = json.loads(shard.header()[8:])
        assert len(shard.header()) % 8 == 0
        assert all(entries[t.name]["data_offsets"][0] % (2 if t.dtype == "F16" else 4) == 0 for t in shard.tensors)


def test_the_same_tensors_are_the_same_bytes(tmp_path: Path) -> None:
    tensors = some_tensors()
    for name, order in (("a", list(tensors)), ("b", list(reversed(tensors)))):
        (tmp_path / name).mkdir()
        write(tmp_path / name, {n: tensors[n] for n in order})
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_a_tensor_other_than_planned_is_refused(tmp_path: Path) -> None:
    plan = plan_shards([TensorShape("w", "F32", (2, 3))], 10**6)
    for stream, words in (
        ([("w", torch.zeros(3, 2))], "planned is"),
        ([("w", torch.zeros(2, 3).half())], "planned is"),
        ([("v", torch.zeros(2, 3))], "planned is"),
        ([], "ended before w"),
        ([("w", torch.zeros(2, 3)), ("x", torch.zeros(1))], "yields x"),
        ([("w", torch.zeros(1, 3))], "ended before w"),
        ([("w", torch.zeros(1, 3)), ("v", torch.zeros(1, 3))], "planned is"),
        ([("w", torch.zeros(1, 3)), ("w", torch.zeros(2, 3))], "planned is"),
        ([("w", torch.zeros(6))], "planned is"),
    ):
        with pytest.raises(FinetuneError, match=words):
            write_shards(tmp_path, plan, iter(stream))


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(some_tensors(), path)
    content = path.read_bytes()
    for size in (4, 40, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(InputError, match=r"model.safetensors: .*(cut short|not a safetensors file)"):
            read_file(path)


def test_folders_that_do_not_hold_together(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no \*.safetensors"):
        read_folder(tmp_path)
    save_file({"w": torch.zeros(1)}, tmp_path / "a.safetensors")
    save_file({"w": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    assert list(read_folder(tmp_path)) == ["w"]
    save_file({"w": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(InputError, match=r"w is in a.safetensors and in b.safetensors"):
        read_folder(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "c.safetensors"}}))
    with pytest.raises(InputError, match=r"names c\.safetensors"):
        read_folder(tmp_path)
    index.write_text(json.dumps({"weight_map": {"w": "a.safetensors", "v": "a.safetensors"}}))
    with pytest.raises(InputError, match="differ in v"):
        read_folder(tmp_path)


def test_pieces_of_rows_are_the_same_file_and_the_digests_are_those_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synced_file, "SYNC_BYTES", 100)
    tensors = some_tensors()
    plan = plan_shards([shape(n, t) for n, t in tensors.items()], 80)
    assert len(plan.shards) > 1
    for folder, step in (("whole", 100), ("rows", 2)):
        (tmp_path / folder).mkdir()
        pieces = (
            (t.name, part)
            for t in plan.tensors
            for part in (tensors[t.name].split(step) if tensors[t.name].dim() else [tensors[t.name]])
        )
        digests = write_shards(tmp_path / folder, plan, pieces)
        assert digests == {s.file: hash_file(tmp_path / folder / s.file) for s in plan.shards}
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "rows" / path.name).read_bytes()


def test_part_of_a_tensor_is_read(tmp_path: Path) -> None:
    write(tmp_path, some_tensors())
    ref = read_folder(tmp_path)["model.layers.2.w"]
    raw = torch.empty(2 * 7 * 4, dtype=torch.uint8)
    ref.read_into(raw, start=3 * 7 * 4, once=True)
    assert torch.equal(raw.view(torch.float32).view(2, 7), ref.load()[3:])
