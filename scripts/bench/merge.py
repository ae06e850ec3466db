"""Our merge against `cp -r` of the base and against peft's `merge_and_unload`: wall time and peak memory.

    .venv/bin/python scripts/bench/merge.py --scratch DIR [--size 7b] [--rounds 3] [--out merge.json]

Makes a random bf16 checkpoint of Mistral-7B's shape and an adapter (r 64, all linear modules) in DIR, runs the arms one
after the other, each in a process of its own, and removes DIR/merge-bench afterwards. The figures are medians.

What is done for a fair comparison: every arm ends when `sync` has returned, so that what it leaves to the page cache
counts; before every arm the output of the last one is deleted and synced, and the pages of the base and the adapter are
dropped from the page cache (posix_fadvise), so every arm reads from the disk; all arms run once at a small size before
the first round, so that Python's own files are in the cache for all; the order of the arms turns with each round. Time
is from starting the process, Python's imports included, but for the arm `stage`, which begins after them. Memory is
read from /proc/PID/status every 10 ms: RssAnon is what the machine must really hold, RSS also counts pages of mapped
files.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

import random_model

ARMS = ("cp", "ours", "stage", "peft")


def stage(root: Path, out: Path, certificate: str) -> None:
    """The merge stage as a run comes to it: certify has imported everything before. Its seconds begin after that."""
    import torch  # noqa: F401

    import finetune.stages.merge  # noqa: F401

    (root / "begun").write_text(str(time.monotonic()))
    ours(root, out, certificate)


def ours(root: Path, out: Path, certificate: str) -> None:
    """The merge stage in a process of its own."""
    from finetune.context import Context
    from finetune.recipe import Recipe, Runtime, Tracking
    from finetune.stages import merge

    recipe = Recipe.model_validate(
        {"name": "bench", "model": "builtin:tiny-mistral", "data": [{"source": "pydoc"}], "certify": None}
    )
    spec = merge.spec(recipe)
    assert spec is not None
    (root / "certify").mkdir(exist_ok=True)
    words = {"base": certificate, "round_trip_dtype": "bfloat16"}
    (root / "certify/certificate.json").write_text(json.dumps(words))
    ctx = Context(scratch=root, runtime=Runtime(), tracking=Tracking())
    inputs = {"base": root / "base", "train": root / "train", "certify": root / "certify"}
    out.mkdir()
    merge.run(spec, inputs, out, ctx)


def peft(root: Path, out: Path) -> None:
    """What a script would do."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(model, root / "train/adapter").merge_and_unload()
    merged.save_pretrained(out, max_shard_size="5GB")


def measure(arm: str, root: Path, certificate: str) -> dict[str, float]:
    """One arm in a process of its own, from the disk to the disk: seconds, and peak bytes."""
    out = root / "out"
    forget(root)
    command = [sys.executable, __file__, "--arm", arm, "--scratch", str(root), "--base", certificate]
    if arm == "cp":
        command = ["cp", "-r", str(root / "base"), str(out)]
    start = time.monotonic()
    process = subprocess.Popen(command)
    anon = total = 0
    while process.poll() is None:
        now = memory(process.pid)
        anon, total = max(anon, now.get("RssAnon", 0)), max(total, now.get("VmRSS", 0))
        time.sleep(0.01)
    done = time.monotonic()
    if arm == "stage":
        start = float((root / "begun").read_text())
    os.sync()
    end = time.monotonic()
    if process.returncode:
        raise SystemExit(f"{arm} ended with status {process.returncode}")
    written = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    expected = sum(p.stat().st_size for p in (root / "base").glob("*.safetensors"))
    if abs(written - expected) > 1e6:
        raise SystemExit(f"{arm} wrote {written} bytes of weights, the base has {expected}")
    shutil.rmtree(out)
    os.sync()
    return {"seconds": end - start, "sync_seconds": end - done, "peak_anon_bytes": anon, "peak_rss_bytes": total}


def memory(pid: int) -> dict[str, int]:
    """The process's memory now, in bytes, as /proc tells it; empty once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    return {k: int(v.split()[0]) * 1024 for k, _, v in (line.partition(":") for line in lines) if v.endswith(" kB")}


def forget(root: Path) -> None:
    """Drop the inputs from the page cache."""
    os.sync()
    for path in (p for folder in ("base", "train") for p in (root / folder).rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def report(found: dict[str, list[dict[str, float]]], target: TextIO) -> dict[str, dict[str, float]]:
    """Print the table of medians; the medians."""
    middle = {a: {k: statistics.median(r[k] for r in rounds) for k in rounds[0]} for a, rounds in found.items()}
    print("| arm | seconds | of which sync | of cp | peak RssAnon GB | peak RSS GB |", file=target)
    print("|---|---|---|---|---|---|", file=target)
    for arm, m in middle.items():
        seconds = [r["seconds"] for r in found[arm]]
        print(
            f"| {arm} | {m['seconds']:.1f} ({min(seconds):.1f}–{max(seconds):.1f}) | {m['sync_seconds']:.1f} "
            f"| {m['seconds'] / middle['cp']['seconds']:.2f} "
            f"| {m['peak_anon_bytes'] / 1e9:.2f} | {m['peak_rss_bytes'] / 1e9:.2f} |",
            file=target,
        )
    return middle


def main() -> None:
    """Make the files, run every arm in every round, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="a folder on the disk to be measured")
    parser.add_argument("--size", choices=random_model.SHAPES, default="7b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--base", choices=("original", "dequantized"), default="original", help="what ours merges into")
    parser.add_argument("--out", type=Path, help="write all figures here, as JSON")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        out = options.scratch / "out"
        if options.arm == "peft":
            peft(options.scratch, out)
        else:
            {"ours": ours, "stage": stage}[options.arm](options.scratch, out, options.base)
        return
    options.scratch.mkdir(parents=True, exist_ok=True)
    arms = ["cp", *(a for a in options.arms if a != "cp")]
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="merge-bench-") as folder:
        warm, root = Path(folder) / "warm", Path(folder) / "model"
        need = 2.2 * random_model.bytes_of(options.size) + 1e9
        if (free := shutil.disk_usage(folder).free) < need:
            raise SystemExit(f"{options.scratch} needs {need / 1e9:.0f} GB free and has {free / 1e9:.0f} GB")
        random_model.make(warm, "tiny")
        size = random_model.make(root, options.size)
        for arm in arms:
            measure(arm, warm, options.base)
        load, begun = os.getloadavg(), datetime.now(UTC).isoformat(timespec="seconds")
        found: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
        for number in range(options.rounds):
            turn = number % len(arms)
            for arm in arms[turn:] + arms[:turn]:
                found[arm].append(measure(arm, root, options.base))
                print(f"round {number + 1} {arm}: {found[arm][-1]}", file=sys.stderr)
    print(f"{options.size}: {size / 1e9:.2f} GB, {options.rounds} rounds from {begun}, load before {load}\n")
    middle = report(found, sys.stdout)
    if options.out:
        about = {"size": options.size, "bytes": size, "begun": begun, "load": load, "cores": os.cpu_count()}
        options.out.write_text(json.dumps({**about, "medians": middle, "rounds": found}, indent=1))


if __name__ == "__main__":
    main()
