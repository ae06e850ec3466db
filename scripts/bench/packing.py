"""Bins that `pack` needs against the lower bound L2, beside TRL's call as it is.

    .venv/bin/python scripts/bench/packing.py DATA.jsonl.gz… [--tokenizer v3] [--lengths 1024 2048] [--out packing.json]

Rows are rendered by the template of the tokenizer's family and cut at the length, as the render stage does. `ours` is
finetune.tokenization.packing.pack (with its proof of what came out), `trl` is `pack_dataset` with its default batches
of 1,000 rows. Counting bins needs no clock; the seconds are one run each and only tell the scale.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import numpy as np
import pyarrow as pa
import real_rows
from numpy.typing import NDArray

from finetune.tokenization.chat_template import JinjaRenderer, template_text
from finetune.tokenization.packing import lower_bound, pack


def rendered_sizes(data: Path, version: str) -> NDArray[np.int64]:
    """Tokens of each row as its template writes it, not yet cut."""
    tokenizer = real_rows.tokenizer(version)
    render = JinjaRenderer(template_text(real_rows.TEMPLATES[version], None), tokenizer.special_tokens_map)
    sizes: list[int] = []
    rows = real_rows.read(data)
    for i in range(0, len(rows), 2048):
        chats = ([{"role": m.role, "content": m.content} for m in row.messages] for row in rows[i : i + 2048])
        texts = [render(chat)[0] for chat in chats]
        sizes += map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])
    return np.array(sizes, np.int64)


def documents(sizes: NDArray[np.int64]) -> tuple[pa.ListArray, pa.ListArray]:
    """Documents of these sizes: ids that differ, every token but the first of each supervised."""
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    mask = np.ones(offsets[-1], np.uint8)
    mask[offsets[:-1]] = 0
    ids = np.arange(offsets[-1], dtype=np.int32)
    edges = pa.array(offsets, pa.int32())
    return pa.ListArray.from_arrays(edges, pa.array(ids)), pa.ListArray.from_arrays(edges, pa.array(mask))


def ours(sizes: NDArray[np.int64], length: int) -> int:
    """Bins of the pack stage."""
    return len(pack(*documents(sizes), length).documents)


def trl(sizes: NDArray[np.int64], length: int) -> int:
    """Bins of TRL's function as SFTTrainer calls it."""
    from datasets import Dataset, disable_progress_bars
    from trl.data_utils import pack_dataset

    disable_progress_bars()
    ids, _ = documents(sizes)
    kept = {"keep_in_memory": True, "load_from_cache_file": False}
    return len(pack_dataset(Dataset(pa.table({"input_ids": ids})), length, "bfd", map_kwargs=kept))


def compare(sizes: NDArray[np.int64], length: int) -> dict[str, float]:
    """Every count for one data set at one length."""
    cut = np.minimum(sizes, length)
    bound = lower_bound(cut, length)
    found: dict[str, float] = {"length": length, "documents": len(cut), "tokens": int(cut.sum()), "bound": bound}
    found["cut_documents"] = int((sizes > length).sum())
    for name, method in (("ours", ours), ("trl", trl)):
        start = time.perf_counter()
        bins = method(cut, length)
        found |= {name: bins, f"{name}_over_bound": bins / bound, f"{name}_seconds": time.perf_counter() - start}
    return found


def main() -> None:
    """Print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--tokenizer", choices=sorted(real_rows.TEMPLATES), default="v3")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    report = []
    print(f"{'data':22} {'length':>6} {'rows':>7} {'tokens':>11} {'bound':>6} {'ours':>6} {'×':>7} {'TRL':>6} {'×':>7}")
    for data in asked.data:
        sizes = rendered_sizes(data, asked.tokenizer)
        for length in asked.lengths:
            found = compare(sizes, length)
            report.append({"data": data.name, "tokenizer": asked.tokenizer, **found})
            print(
                f"{data.name:22} {length:6} {len(sizes):7,} {found['tokens']:11,} {found['bound']:6} {found['ours']:6} "
                f"{found['ours_over_bound']:7.4f} {found['trl']:6} {found['trl_over_bound']:7.4f}",
                flush=True,
            )
    if asked.out:
        asked.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
