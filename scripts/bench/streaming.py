"""Peak memory and speed of ingest and filter over a generated JSONL file: `streaming.py --gb 0.3 1 5`.

Each stage runs in a process of its own. The files lie under --folder (default: a temporary folder) and are deleted.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.context import Context
from finetune.recipe import Recipe, Runtime, Tracking
from finetune.stages import filter as filter_stage
from finetune.stages import ingest

RULES = ["turns", "repetition", "symbols", "refusals", "truncated", "echo", "links"]
GB = 10**9


def rows(seed: int = 0) -> Iterator[dict[str, str | None]]:
    """Rows of about 1 KB: one of 200 does not fit its format, one of ten is dropped by a rule."""
    dice = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(dice.choices(letters, k=dice.randint(2, 10))) for _ in range(20_000)]

    def sentences(count: int) -> str:
        return " ".join(" ".join(dice.choices(words, k=12)).capitalize() + "." for _ in range(count))

    while True:
        kind = dice.random()
        question = sentences(2)
        answer: str | None = sentences(dice.randint(2, 18))
        if kind < 0.005:
            answer = None
        elif kind < 0.055:
            answer = question
        elif kind < 0.105:
            answer = f"As an AI language model, I cannot say. {answer}"
        yield {"instruction": question, "output": answer}


def generate(path: Path, size: int) -> None:
    """A JSONL file of at least `size` bytes."""
    written = 0
    with path.open("w", encoding="ascii") as file:
        for row in rows():
            if written >= size:
                return
            written += file.write(json.dumps(row) + "\n")


def run_stage(name: str, source: Path, folder: Path) -> dict[str, Any]:
    """Run one stage in this process; its figures."""
    raw = {"name": "bench", "model": "builtin:tiny-mistral", "data": [{"source": "local", "path": str(source)}]}
    recipe = Recipe.model_validate({**raw, "filter": {"rules": RULES}})
    out = folder / name
    out.mkdir()
    ctx = Context(folder / "scratch", Runtime(), Tracking())
    start = time.monotonic()
    if name == "ingest":
        metrics = ingest.run(ingest.spec(recipe), {}, out, ctx)
        seen = int(str(metrics["rows_out"])) + sum(dict(metrics["refused"]).values())  # type: ignore[call-overload]
    else:
        spec = filter_stage.spec(recipe)
        assert spec is not None
        metrics = filter_stage.run(spec, {"ingest": folder / "ingest"}, out, ctx)
        seen = int(str(metrics["rows_in"]))
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"rows": seen, "rows_out": metrics["rows_out"], "seconds": seconds, "peak_bytes": peak}


def main() -> None:
    """Measure each size, one line a stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, nargs="+", default=[0.3, 1.0])
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--stage", nargs=3, metavar=("NAME", "SOURCE", "OUT"), help="inner call: one stage, as JSON")
    asked = parser.parse_args()
    if asked.stage:
        name, source, out = asked.stage
        print(json.dumps(run_stage(name, Path(source), Path(out))))
        return
    for size in asked.gb:
        with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
            source = Path(folder) / "rows.jsonl"
            generate(source, int(size * GB))
            for name in ("ingest", "filter"):
                command = [sys.executable, __file__, "--stage", name, str(source), folder]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found = json.loads(done.stdout)
                speed = found["rows"] / found["seconds"]
                print(
                    f"{size:g} GB {name}: {found['rows']:,} rows, {found['rows_out']:,} kept, "
                    f"peak {found['peak_bytes'] / 1e6:.0f} MB, {speed:,.0f} rows/s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
