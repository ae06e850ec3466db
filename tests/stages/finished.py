"""Finished stage folders as certify and merge find them: base, render and train, on a tiny random model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetune.context import Context
from finetune.data.records import write_table
from finetune.recipe import Runtime, Tracking
from finetune.utils.files import write_json
from tests.helpers.tiny_models import VOCABULARY, save_adapter, save_tiny

TERMINATORS = [2, 7]


def context(scratch: Path) -> Context:
    """A context that says nothing and works on the CPU."""
    return Context(scratch=scratch, runtime=Runtime(), tracking=Tracking(), device="cpu")


def write_rows(path: Path, rows: Sequence[Sequence[int]], prompt: int = 4) -> None:
    """Write rendered rows whose first `prompt` tokens are not supervised."""
    import pyarrow as pa

    masks = [[0] * prompt + [1] * (len(r) - prompt) for r in rows]
    write_table(
        path,
        {
            "id": [f"rows:{i}" for i in range(1, len(rows) + 1)],
            "input_ids": [list(map(int, r)) for r in rows],
            "mask": masks,
            "length": [len(r) for r in rows],
            "supervised": [sum(m) for m in masks],
            "truncated": [False] * len(rows),
        },
        {"input_ids": pa.list_(pa.int32()), "mask": pa.list_(pa.uint8())},
    )


def random_rows(count: int = 12, seed: int = 0) -> list[list[int]]:
    """Rows of 8 to 40 random tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCABULARY, rng.integers(8, 41)).tolist() for _ in range(count)]


def finish(
    root: Path, kind: str = "mistral", dtype: str = "bfloat16", config: dict[str, Any] | None = None, **lora: Any
) -> dict[str, Path]:
    """Write base, render and train under `root`; what `inputs` holds, certify being off."""
    base = save_tiny(root / "base", kind, dtype=dtype, **(config or {}))
    write_json(base / "base.json", {"id": "builtin:tiny-mistral", "kind": "builtin", "revision": None, "dtype": dtype})
    (base / "tokenizer.json").write_text('{"from": "base"}')
    (base / "tokenizer.model").write_bytes(b"sentencepiece")
    write_json(base / "tokenizer_config.json", {"chat_template": "old", "bos_token": "<s>", "name_or_path": "/home/me"})
    write_json(base / "generation_config.json", {"_from_model_config": True, "eos_token_id": 2, "temperature": 0.7})
    settings = json.loads((base / "config.json").read_text())
    write_json(base / "config.json", {**settings, "use_cache": False, "_name_or_path": "/home/me/model"})
    adapter = root / "train" / "adapter"
    save_adapter(base, adapter, **lora)
    (adapter / "tokenizer.json").write_text('{"from": "adapter"}')
    write_json(adapter / "tokenizer_config.json", {"chat_template": "old", "bos_token": "<s>", "pad_token": "<unk>"})
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    (adapter / "template").mkdir()
    write_json(adapter / "template" / "template.json", {"name": "mistral", "terminators": TERMINATORS, "sha256": "0"})
    (root / "render").mkdir()
    write_rows(root / "render" / "eval.parquet", random_rows())
    train = root / "train"
    return {"base": base, "render": root / "render", "train": train, "certify": train}
