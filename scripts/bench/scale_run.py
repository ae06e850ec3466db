"""From a file of rows to packed rows at size: seconds a stage, with workers or on Ray, and what 100 M rows would take.

    .venv/bin/python scripts/bench/scale_run.py --data ../shared/data --scratch DIR --rows 100000 --engine local ray \
        [--workers 1 2]
    .venv/bin/python scripts/bench/scale_run.py --scratch DIR --table

The rows are those of `scale.py`, recombined real ones, as instruction and output; the built-in base counts their tokens
(about three times as many as Mistral's tokenizer). Every run is a process of its own (`finetune run --until pack`) on
artifacts that hold the base alone, so its seconds include the start of Python, of the workers and of Ray. Results are
appended to DIR/scale-runs.jsonl; `scale.py` appends to DIR/scale-results.jsonl. --table reads both and extrapolates.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from curation_checks import read
from recombined import recombined, sentences
from scale import FILES, real_groups

from finetune.dedup.cells import MOST_CELLS, ROWS_PER_CELL

PARTITIONED = ("filter", "embed", "render", "pack")
STAGES = ("ingest", *PARTITIONED[:2], "dedup", "split", *PARTITIONED[2:])
TARGET_ROWS = 100_000_000
RECIPE = """schema: 1
name: scale
model: builtin:tiny-mistral
data: [{{source: local, path: {path}}}]
filter: {{max_length_tokens: 2048}}
dedup: {{embedding: lsa, threshold: 0.95}}
split: {{group_threshold: 0.9}}
render: {{max_length_tokens: 2048}}
"""


def rows_of(args: argparse.Namespace, count: int) -> Path:
    """A file of `count` recombined rows, made once."""
    path: Path = args.scratch / f"rows-{count}.jsonl"
    if not path.exists():
        real = [row for name in FILES for row in read(args.data, name, None)]
        asked = [f"{r['instruction']}\n{r['input']}" for r in real]
        texts = [f"{a}\n{r['output']}" for a, r in zip(asked, real, strict=True)]
        ends = [len(sentences(a)) for a in asked]
        _, group = real_groups(args.scratch, texts)
        with path.with_suffix(".part").open("w", encoding="utf-8") as file:
            for row, parts in recombined(texts, np.load(group), count):
                cut = min(ends[row], len(parts) - 1)
                made = {"instruction": " ".join(parts[:cut]) or "Go on.", "output": " ".join(parts[cut:])}
                file.write(json.dumps(made, ensure_ascii=False) + "\n")
        path.with_suffix(".part").rename(path)
    return path


def run(args: argparse.Namespace, recipe: Path, until: str, *more: str) -> float:
    """Seconds of one `finetune run`; raises if it fails."""
    start = time.monotonic()
    command = [sys.executable, "-m", "finetune", "run", str(recipe), "--until", until, *more]
    roots = ["--artifacts", str(args.scratch / "artifacts"), "--scratch", str(args.scratch / "scratch")]
    subprocess.run([*command, *roots], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - start


def measured(args: argparse.Namespace, count: int, engine: str, workers: str) -> dict[str, Any]:
    """One run from the file to packed rows."""
    recipe = args.scratch / "scale.yaml"
    recipe.write_text(RECIPE.format(path=rows_of(args, count)), encoding="utf-8")
    run(args, recipe, "base")
    for name in STAGES:
        shutil.rmtree(args.scratch / "artifacts" / name, ignore_errors=True)
    seconds = run(args, recipe, "pack", "--engine", engine, f"--set=runtime.workers={workers}")
    found: dict[str, Any] = {"rows": count, "engine": engine, "workers": workers, "seconds": round(seconds, 1)}
    manifests = {n: next((args.scratch / "artifacts" / n).glob("*/manifest.json")) for n in STAGES}
    made = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in manifests.items()}
    found["stages"] = {name: round(m["seconds"], 1) for name, m in made.items()}
    found["digest"] = made["pack"]["digest"]
    found["documents"] = made["pack"]["metrics"]["documents"]
    found["peak_memory_gb"] = round(max(m["peak_memory_bytes"] for m in made.values()) / 1e9, 2)
    found["peak_worker_gb"] = round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6, 2)
    return found


def compared(found: Sequence[dict[str, Any]]) -> None:
    """Print speed-ups and overheads between the runs of one size."""
    for a in found:
        for b in found:
            if a["rows"] != b["rows"] or a is b:
                continue
            same = "equal bytes" if a["digest"] == b["digest"] else "OTHER BYTES"
            if (a["engine"], a["workers"], b["workers"]) == (b["engine"], "1", "2"):
                parts = [sum(x["stages"][n] for n in PARTITIONED) for x in (a, b)]
                print(
                    f"{a['rows']:,} rows, {a['engine']}: 2 workers: {a['seconds'] / b['seconds']:.2f} times as fast, "
                    f"{parts[0] / parts[1]:.2f} in {', '.join(PARTITIONED)}; {same}"
                )
            if (a["engine"], b["engine"], a["workers"]) == ("local", "ray", b["workers"]):
                more = b["seconds"] - a["seconds"]
                print(f"{a['rows']:,} rows, {a['workers']} workers: Ray takes {more:.1f} s more; {same}")


def lines(path: Path) -> list[dict[str, Any]]:
    """The results in a file, none if there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def table(args: argparse.Namespace) -> None:
    """Print what TARGET_ROWS rows would take by the largest run with two workers, as Markdown."""
    runs = [r for r in lines(args.scratch / "scale-runs.jsonl") if r["workers"] in ("2", "auto")]
    largest = max(runs, key=lambda r: r["rows"])
    rows, stages = largest["rows"], largest["stages"]
    sizes = sorted(lines(args.scratch / "scale-results.jsonl"), key=lambda r: r["rows"])
    power = {}
    for name in ("dedup", "split"):
        ends = [(r["rows"], r[f"{name}_seconds"]) for r in sizes]
        known = len(ends) > 1 and ends[-1][0] > ends[0][0]
        power[name] = math.log(ends[-1][1] / ends[0][1]) / math.log(ends[-1][0] / ends[0][0]) if known else 1.25
    print(f"| stage | {rows:,} rows, 2 workers: s | grows as | 100 M rows, 2 cores: h | 64: h | 512: h |")
    print("|---|---|---|---|---|---|")
    total = [0.0, 0.0, 0.0]
    for name in STAGES:
        grown = stages[name] * (TARGET_ROWS / rows) / 3600
        if name in power:
            capped = max(rows, MOST_CELLS * ROWS_PER_CELL)  # more rows fill the same cells
            grown = stages[name] * (capped / rows) ** power[name] * (TARGET_ROWS / capped) ** 2 / 3600
        hours = [grown * (2 / cores if name in PARTITIONED else 1) for cores in (2, 64, 512)]
        total = [t + h for t, h in zip(total, hours, strict=True)]
        shown = " | ".join(f"{h:.1f}" for h in hours)
        grows = f"n^{power[name]:.2f}, n² above {MOST_CELLS * ROWS_PER_CELL / 1e6:.1f} M" if name in power else "n"
        print(f"| {name} | {stages[name]} | {grows} | {shown} |")
    print(f"| all | {sum(stages.values()):.1f} | | {' | '.join(f'{t:.1f}' for t in total)} |")
    print(f"vectors of 384 float32 on the calling machine: {TARGET_ROWS * 384 * 4 / 1e9:.0f} GB, memory-mapped")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every combination; print JSON lines and comparisons, or the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000])
    parser.add_argument("--engine", nargs="+", choices=("local", "ray"), default=["local"])
    parser.add_argument("--workers", nargs="+", default=["2"])
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args(arguments)
    args.scratch = args.scratch.absolute()
    if args.table:
        table(args)
        return 0
    args.scratch.mkdir(parents=True, exist_ok=True)
    found = []
    for count in args.rows:
        for engine in args.engine:
            for workers in args.workers:
                found.append(measured(args, count, engine, workers))
                print(json.dumps(found[-1]), flush=True)
                with (args.scratch / "scale-runs.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(found[-1]) + "\n")
    compared(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
