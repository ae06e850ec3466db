"""Tokens a second of greedy decoding, as stage evaluate does it, on a random NF4 base, for one prompt and several.

.venv/bin/python scripts/bench/decode.py --model 7b --device cuda
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import throughput_parts as parts
import torch

from finetune.context import Context
from finetune.eval.generation import greedy
from finetune.recipe import Runtime, Tracking


def main() -> None:
    """Print a line for each number of prompts; the first answer warms up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(parts.SIZES), default="7b")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--new", type=int, default=128, help="tokens of each answer")
    asked = parser.parse_args()
    size = parts.SIZES[asked.model]
    base = parts.base(size, asked.device, torch.bfloat16 if asked.device == "cuda" else torch.float32, "sdpa")
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        ctx = Context(scratch=Path(folder), runtime=Runtime(), tracking=Tracking(), device=asked.device)
        for count in (1, 1, 8, 32):
            prompts = [generator.integers(3, 300, size.length // 4) for _ in range(count)]
            begun = time.perf_counter()
            answers = greedy(base, prompts, [asked.new] * count, [], 0, ctx, batch_tokens=1 << 20)
            seconds = time.perf_counter() - begun
            made = sum(len(answer.ids) for answer in answers)
            print(f"decode, {count} prompts at once: {made / seconds:,.0f} tokens/s ({seconds:.2f} s)", flush=True)


if __name__ == "__main__":
    main()
