"""The render stage's work on rows against the tokenizer's own batch call on the same rows, already rendered.

    .venv/bin/python scripts/bench/render.py DATA.jsonl.gz [--rows N] [--tokenizer v3] [--rounds 7] [--out render.json]

Arms, in turn within a round: `raw` is `tokenizer(texts)` on the finished texts; `render` is what the stage does with
each row (render, find the answers, tokenise with offsets, mask, audit), with `--prove all` also the comparison with
apply_chat_template;
`stage` is that with its files: rows read from Parquet, columns written and read back. All in one process, with as many
tokenizer threads as RAYON_NUM_THREADS says (the same for all arms). A ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import real_rows

from finetune.context import Context
from finetune.data.records import write_rows
from finetune.recipe import Render, Runtime, Tracking
from finetune.stages import render as stage
from finetune.tokenization.audit import Tally
from finetune.tokenization.chat import verification_sample
from finetune.tokenization.chat_template import JinjaRenderer, choose_template
from finetune.tokenization.encoder import Encoder
from finetune.tokenization.id_check import IdCheck
from finetune.tokenization.row_tokenizer import RowTokenizer


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    gc.collect()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--tokenizer", choices=sorted(real_rows.TEMPLATES), default="v3")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prove", choices=("all", "sample"), default="sample")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    rows = real_rows.read(asked.data, asked.rows)
    tokenizer = real_rows.tokenizer(asked.tokenizer)
    spec = Render(prove_rows="all" if asked.prove == "all" else 200)
    template = choose_template("auto", None, tokenizer, verification_sample(rows, 200))
    own = JinjaRenderer(template.inference, tokenizer.special_tokens_map)
    texts = [own([{"role": m.role, "content": m.content} for m in row.messages])[0] for row in rows]

    def worker() -> RowTokenizer:
        return RowTokenizer(template, Encoder(tokenizer), stage._rules(spec, tokenizer, template))

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "rows.parquet", Path(folder) / "train.parquet"
        write_rows(source, rows)
        ctx = Context(scratch=Path(folder), runtime=Runtime(), tracking=Tracking())

        def rendered() -> None:
            one, tally = worker(), Tally()
            check = IdCheck(tokenizer, template)
            for row in rows if asked.prove == "all" else ():
                check.compare(row, one)
            for i in range(0, len(rows), stage.BATCH):
                one.batch(rows[i : i + stage.BATCH], tally)

        arms: dict[str, Callable[[], object]] = {
            "raw": lambda: tokenizer(texts, add_special_tokens=False),
            "render": rendered,
            "stage": lambda: stage._write(worker(), source, target, ctx),
        }
        for work in arms.values():
            work()
        rounds = []
        for number in range(asked.rounds):
            order = list(arms)[number % 3 :] + list(arms)[: number % 3]
            rounds.append({name: seconds(arms[name]) for name in order})
    report = {
        "data": asked.data.name,
        "rows": len(rows),
        "tokenizer": asked.tokenizer,
        "prove": asked.prove,
        "rounds": rounds,
        "median_seconds": {n: statistics.median(r[n] for r in rounds) for n in arms},
        "ratio_to_raw": {n: statistics.median(r[n] / r["raw"] for r in rounds) for n in arms},
        "ratio_range": {n: [min(r[n] / r["raw"] for r in rounds), max(r[n] / r["raw"] for r in rounds)] for n in arms},
        "load": os.getloadavg(),
        "cores": os.cpu_count(),
        "threads": os.environ.get("RAYON_NUM_THREADS", "all"),
    }
    print(f"{len(rows):,} rows, tokenizer {asked.tokenizer}, {asked.rounds} rounds, load {os.getloadavg()[0]:.1f}")
    for name in arms:
        low, high = report["ratio_range"][name]
        print(f"{name:8} {report['ratio_to_raw'][name]:6.2f} × raw   ({low:.2f} to {high:.2f})")
    if asked.out:
        asked.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
