"""Dedup and split at size: seconds, memory and recall on recombined real sentences.

    .venv/bin/python scripts/bench/scale.py --data ../shared/data --scratch DIR --rows 120000 250000 [--rounds 3]
        [--every-pair] [--semhash] [--prepare]    first with --prepare, so that the peak of memory is the stages'

The rows are made by `recombined.py` from the real ones and embedded by LSA as stage embed does (both are kept in
--scratch). Above 100,000 rows every size takes the same path: cells, measured recall, greedy selection. `pairs_per_row`
compares the rate of pairs at the threshold with that of the real rows. --every-pair adds the exact selection;
--semhash adds SemHash on the same vectors (`pip install --target LIB --no-deps semhash vicinity …`, see curation.py),
with its wrongly kept rows and its dropped rows without a kept twin.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from curation_checks import read
from recombined import recombined

from finetune.dedup import large
from finetune.dedup.embed import _unit, lsa
from finetune.dedup.index import FlatIndex
from finetune.dedup.measures import Cosine
from finetune.dedup.select import groups, select

FILES = ("instruct-16k", "t0-55k")
THRESHOLD, GROUP_THRESHOLD = 0.95, 0.9
SAMPLED = 2000


def vectors_of(args: argparse.Namespace, count: int) -> tuple[np.ndarray, dict[str, Any]]:
    """The vectors of `count` recombined rows, and how long they took; made once."""
    path, facts = args.scratch / f"scale-{count}.npy", args.scratch / f"scale-{count}.json"
    if not path.exists():
        real = [f"{r['instruction']}\n{r['input']}\n{r['output']}" for f in FILES for r in read(args.data, f, None)]
        known, group = real_groups(args.scratch, real)
        texts = [" ".join(parts) for _, parts in recombined(real, np.load(group), count)]
        start = time.monotonic()
        made = _unit(lsa(texts))
        seconds = time.monotonic() - start
        np.save(path, made)
        rates = {"real": pair_rate(distinct(np.load(known))), "recombined": pair_rate(distinct(made))}
        facts.write_text(json.dumps({"lsa_seconds": round(seconds, 1), "pairs_per_row": rates}), encoding="utf-8")
    return np.load(path, mmap_mode="r"), json.loads(facts.read_text(encoding="utf-8"))


def real_groups(scratch: Path, real: list[str]) -> tuple[Path, Path]:
    """Files with the vectors and the groups of the real rows; made once."""
    known, group = scratch / "scale-real.npy", scratch / "scale-groups.npy"
    if not group.exists():
        np.save(known, _unit(lsa(real)))
        np.save(group, groups(np.load(known), [real], GROUP_THRESHOLD, FlatIndex))
    return known, group


def distinct(vectors: np.ndarray) -> np.ndarray:
    """The vectors without copies; by digests, since sorting a million rows takes three times their memory."""
    first: dict[bytes, int] = {}
    for row, vector in enumerate(vectors):
        first.setdefault(hashlib.blake2b(vector, digest_size=16).digest(), row)
    return vectors[list(first.values())]


def pair_rate(vectors: np.ndarray) -> list[float]:
    """Pairs per row at the threshold, and the share of rows with one, of a sample against all."""
    places = np.linspace(0, len(vectors) - 1, SAMPLED).astype(int)
    counts = [((vectors[places[k : k + 500]] @ vectors.T) >= THRESHOLD).sum(1) - 1 for k in range(0, SAMPLED, 500)]
    every = np.concatenate(counts)
    return [round(float(every.mean()), 3), round(float((every > 0).mean()), 3)]


def timed(work: Callable[[], Any], rounds: int) -> tuple[float, Any]:
    """Median seconds, and the last result."""
    took = []
    for _ in range(rounds):
        start = time.monotonic()
        result = work()
        took.append(time.monotonic() - start)
    return round(statistics.median(took), 2), result


def judged(vectors: np.ndarray, kept: np.ndarray) -> dict[str, int]:
    """Rows wrongly kept (a kept row before them reaches the threshold), and dropped rows without a kept twin: of
    SAMPLED kept and SAMPLED dropped rows, each compared with every kept row.
    """
    dropped = np.setdiff1d(np.arange(len(vectors)), kept)
    found = {}
    for name, rows in (("kept with a kept twin", kept), ("dropped without a kept twin", dropped)):
        some = rows[np.linspace(0, len(rows) - 1, min(SAMPLED, len(rows))).astype(int)]
        twins = np.zeros(len(some), bool)
        for start in range(0, len(kept), 65_536):
            part = kept[start : start + 65_536]
            reach = vectors[some] @ vectors[part].T >= THRESHOLD
            reach &= some[:, None] != part[None, :]
            twins |= reach.any(1)
        found[f"{name}, of {len(some)}"] = int((twins if name.startswith("kept") else ~twins).sum())
    return found


def semhash(vectors: np.ndarray) -> np.ndarray:
    """The rows that SemHash keeps."""
    from semhash import SemHash

    names = [str(i) for i in range(len(vectors))]
    hashed = SemHash.from_embeddings(np.asarray(vectors), names, model=None)
    return np.array(sorted(int(name) for name in hashed.self_deduplicate(threshold=THRESHOLD).selected))


def measured(args: argparse.Namespace, count: int) -> dict[str, Any]:
    """Every figure of one size; times are medians."""
    vectors, facts = vectors_of(args, count)
    rounds = args.rounds or (3 if count <= 250_000 else 1)
    order = range(len(vectors))
    seconds, (pairs, recall) = timed(lambda: large.select_measured(order, None, [], vectors, THRESHOLD, print), rounds)
    kept = np.setdiff1d(np.arange(len(vectors)), [p.dropped for p in pairs])
    rest = np.asarray(vectors[kept])
    names = [None] * len(rest)
    split, group = timed(
        lambda: groups(
            rest, [names], GROUP_THRESHOLD, FlatIndex, large.BLOCK_ROWS,
            measure=large.cell_measure(rest, GROUP_THRESHOLD),
        ),
        rounds,
    )  # fmt: skip
    found = {
        "rows": len(vectors),
        "rounds": rounds,
        **facts,
        "dedup_seconds": seconds,
        "dropped": len(pairs),
        "recall": recall,
    }
    found |= {"ours": judged(vectors, kept), "split_seconds": split, "groups": len(np.unique(group))}
    if args.every_pair:
        took, exact = timed(lambda: select(order, None, [Cosine(vectors, THRESHOLD, FlatIndex)]), 1)
        found |= {"every_pair_seconds": took, "every_pair_dropped": len(exact)}
        found["rows_that_differ"] = len({p.dropped for p in exact} ^ {p.dropped for p in pairs})
    if args.semhash:
        took, theirs = timed(lambda: semhash(vectors), 1)
        found |= {"semhash_seconds": took, "semhash_kept": len(theirs), "semhash": judged(vectors, theirs)}
    found["peak_memory_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every size; print JSON lines and the exponent between the sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[250_000])
    parser.add_argument("--rounds", type=int, help="default: 3 up to 250,000 rows, else 1")
    parser.add_argument("--prepare", action="store_true", help="only make the vectors")
    parser.add_argument("--every-pair", action="store_true")
    parser.add_argument("--semhash", action="store_true")
    args = parser.parse_args(arguments)
    args.scratch.mkdir(parents=True, exist_ok=True)
    found = []
    for count in args.rows:
        if args.prepare:
            vectors_of(args, count)
            continue
        found.append(measured(args, count))
        print(json.dumps(found[-1]), flush=True)
        with (args.scratch / "scale-results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(found[-1]) + "\n")
    for a, b in pairwise(found):
        for stage in ("dedup", "split"):
            power = math.log(b[f"{stage}_seconds"] / a[f"{stage}_seconds"]) / math.log(b["rows"] / a["rows"])
            print(f"exponent of {stage} from {a['rows']:,} to {b['rows']:,} rows: {power:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
