"""The certificate of a merge of Mistral-7B's shape: seconds, and peak memory, which must stay under 4 GB.

    .venv/bin/python scripts/bench/certify.py --scratch DIR [--size 7b] [--tokens 512] [--out certify.json]

Makes a random bf16 checkpoint and an adapter (r 64, all linear modules) in DIR and runs the certify stage over one
held-out row of that many tokens, in a process of its own: the model as trained (NF4 base and adapter), merged into the
original base, and merged into the dequantised base, layer by layer side by side. The pages of the base are dropped from
the page cache first. Memory is read from /proc/PID/status every 10 ms: RssAnon is what the machine must really hold.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import random_model
from merge import forget, memory

LIMIT_BYTES = 4_000_000_000


def certify(root: Path, tokens: int, precision: str) -> None:
    """The certify stage itself; its certificate on standard output."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from finetune.context import Context
    from finetune.recipe import Recipe, Runtime, Tracking
    from finetune.stages import certify as stage

    ids = np.random.default_rng(0).integers(3, 2000, tokens).tolist()
    row = {"id": ["a"], "input_ids": [ids], "mask": [[1] * tokens], "length": [tokens], "truncated": [False]}
    row |= {"supervised": [tokens]}
    types = {"input_ids": pa.list_(pa.int32()), "mask": pa.list_(pa.uint8())}
    (root / "render").mkdir(exist_ok=True)
    table = pa.table({n: pa.array(v, types.get(n)) for n, v in row.items()})
    pq.write_table(table, root / "render/eval.parquet")
    recipe = Recipe.model_validate(
        {
            "name": "bench",
            "model": "builtin:tiny-mistral",
            "data": [{"source": "pydoc"}],
            "train": {"precision": precision},
            "certify": {"tokens": tokens, "min_agreement": 0, "max_perplexity_ratio": 10},
        }
    )
    spec = stage.spec(recipe)
    assert spec is not None
    out = root / "out"
    out.mkdir()
    ctx = Context(scratch=root, runtime=Runtime(), tracking=Tracking())
    stage.run(spec, {"base": root / "base", "train": root / "train", "render": root / "render"}, out, ctx)
    print(json.dumps(json.loads((out / "certificate.json").read_text())["candidates"]))


def main() -> None:
    """Make the files, certify, print the figures; status 1 where memory went over the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--size", choices=random_model.SHAPES, default="7b")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: fp32 on a CPU")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        certify(options.scratch, options.tokens, options.precision)
        return
    options.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="certify-bench-") as folder:
        need = 1.2 * random_model.bytes_of(options.size) + 1e9
        if (free := shutil.disk_usage(folder).free) < need:
            raise SystemExit(f"{options.scratch} needs {need / 1e9:.0f} GB free and has {free / 1e9:.0f} GB")
        root = Path(folder) / "model"
        size = random_model.make(root, options.size)
        forget(root)
        load, begun = os.getloadavg(), datetime.now(UTC).isoformat(timespec="seconds")
        command = [sys.executable, __file__, "--inside", "--scratch", str(root)]
        command += ["--tokens", str(options.tokens), "--precision", options.precision]
        start = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        anon = total = 0
        while process.poll() is None:
            now = memory(process.pid)
            anon, total = max(anon, now.get("RssAnon", 0)), max(total, now.get("VmRSS", 0))
            time.sleep(0.01)
        seconds = time.monotonic() - start
        said = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"certify ended with status {process.returncode}")
    print(f"{options.size}: {size / 1e9:.2f} GB, from {begun}, load before {load}, {os.cpu_count()} cores\n")
    print("| tokens | precision | seconds | peak RssAnon GB | peak RSS GB |\n|---|---|---|---|---|")
    print(f"| {options.tokens} | {options.precision} | {seconds:.1f} | {anon / 1e9:.2f} | {total / 1e9:.2f} |")
    found = {"seconds": seconds, "peak_anon_bytes": anon, "peak_rss_bytes": total, "candidates": json.loads(said)}
    if options.out:
        about = {"size": options.size, "tokens": options.tokens, "begun": begun, "load": load}
        options.out.write_text(json.dumps({**about, **found}, indent=1))
    if anon > LIMIT_BYTES:
        raise SystemExit(f"peak RssAnon {anon / 1e9:.2f} GB is over {LIMIT_BYTES / 1e9:.0f} GB")


if __name__ == "__main__":
    main()
