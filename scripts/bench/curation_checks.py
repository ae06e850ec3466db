"""What curation.py judges by: brute force, the way of the notebook, and the stages after embedding."""

from __future__ import annotations

import gzip
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from finetune.context import Context
from finetune.dedup.measures import Cosine
from finetune.dedup.select import select
from finetune.recipe import Recipe, Runtime, Tracking

THRESHOLD = 0.9
WORDING = 0.8


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """Wall time of a call, and its result."""
    start = time.monotonic()
    result = call()
    return time.monotonic() - start, result


def read(data: Path, name: str, rows: int | None) -> list[dict[str, str]]:
    """The rows of one file, or `rows` of them evenly spread."""
    with gzip.open(data / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        found = [json.loads(line) for line in file]
    if rows and rows < len(found):
        found = [found[k * len(found) // rows] for k in range(rows)]
    return found


def peak_bytes() -> int:
    """The most memory this process held; getrusage would tell the larger of this and its parent's."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


def pair_recall(vectors: np.ndarray) -> dict[str, Any]:
    """Pairs that reach the threshold among different vectors: by the search and by brute force in float64."""
    from finetune.dedup.index import FlatIndex
    from finetune.dedup.measures import reaches

    measure = Cosine(vectors, THRESHOLD, FlatIndex)
    search = measure.search()
    search.add(vectors)
    wide = vectors.astype(np.float64)
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    brute = ours = missed = 0
    for start in range(0, len(vectors), 512):
        table = np.round(wide[start : start + 512] @ wide.T, 12) >= THRESHOLD
        found = np.zeros_like(table)
        for i, j, scores in search.pairs(vectors[start : start + 512], THRESHOLD - measure.band):
            sure = reaches(measure, i + start, j, scores)
            found[i[sure], j[sure]] = True
        rows = np.arange(len(table))
        table[rows, rows + start] = found[rows, rows + start] = False
        brute, ours, missed = brute + int(table.sum()), ours + int(found.sum()), missed + int((table & ~found).sum())
    return {"brute": brute // 2, "ours": ours // 2, "recall": 1 - missed / brute if brute else 1.0}


def judged(vectors: np.ndarray, kept: np.ndarray) -> dict[str, int]:
    """How far a selection keeps the two promises: kept rows and dropped ones that break them."""
    from finetune.dedup.index import FlatIndex
    from finetune.dedup.select import links_between

    dropped = np.setdiff1d(np.arange(len(vectors)), kept)
    again = select(range(len(kept)), None, [Cosine(vectors[kept], THRESHOLD, FlatIndex)])
    with_twin, _, _ = links_between(vectors[dropped], vectors[kept], THRESHOLD, FlatIndex)
    return {"kept": len(kept), "wrongly_kept": len(again), "wrongly_dropped": len(dropped) - len(with_twin)}


def notebook(vectors: np.ndarray) -> np.ndarray:
    """The rows that the k = 2 way keeps."""
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    scores, neighbours = index.search(vectors, 2)
    kept: set[int] = set()
    for row in range(len(vectors)):
        if scores[row, 1] < THRESHOLD or (row not in kept and int(neighbours[row, 1]) not in kept):
            kept.add(row)
    return np.array(sorted(kept), np.int64)


def wording(rows: list[dict[str, str]]) -> dict[str, Any]:
    """Pairs of whole rows that reach the Jaccard threshold, by the join, and by counting for a sample."""
    from finetune.dedup.jaccard import SetSearch, jaccard, word_sets

    texts = list(dict.fromkeys("\n".join((r["instruction"], r["input"], r["output"])) for r in rows))
    took_sets, sets = seconds(lambda: word_sets(texts, 5))
    search = SetSearch(WORDING)
    search.add(sets)
    sample = np.arange(0, len(texts), max(1, len(texts) // 200))
    brute = ours = 0
    found = {
        (int(i), int(j)) for a, b, _ in search.pairs(sets.take(sample), WORDING) for i, j in zip(a, b, strict=True)
    }
    everyone = np.arange(len(texts))
    for place, row in enumerate(sample.tolist()):
        scores = jaccard(sets, np.full(len(texts), row), sets, everyone)
        twins = set(np.flatnonzero(scores >= WORDING).tolist()) - {row}
        brute += len(twins)
        ours += len({j for j in twins if (place, j) in found})
    took, pairs = seconds(lambda: select_wording(sets))
    return {
        "rows": len(texts),
        "sample_pairs": brute,
        "recall": ours / brute if brute else 1.0,
        "dropped": pairs,
        "seconds": {"sets": round(took_sets, 2), "select": round(took, 2)},
    }


def select_wording(sets: Any) -> int:  # noqa: ANN401
    """How many rows the wording step drops."""
    from finetune.dedup.jaccard import Jaccard

    return len(select(range(len(sets)), None, [Jaccard(sets, WORDING)]))


def run_stages(root: Path, minhash: bool) -> dict[str, Any]:
    """dedup, decontaminate, sample and split as a recipe runs them on those inputs."""
    from finetune.stages import decontaminate, dedup, sample, split

    recipe = Recipe.model_validate(
        {
            "name": "bench", "model": "builtin:tiny-mistral", "data": [{"source": "pydoc", "weight": 1}],
            "dedup": {"embedding": "folder/of/minilm", "threshold": THRESHOLD, "jaccard": {} if minhash else None},
            "decontaminate": {"against": [{"source": "local", "path": str(root / "evaluation.jsonl")}]},
            "sample": {"random": 10_000},
        }
    )  # fmt: skip
    ctx = Context(scratch=root, runtime=Runtime(), tracking=Tracking(), device="cpu")
    steps: dict[str, float] = {}
    metrics: dict[str, Any] = {}
    for name, stage in (("dedup", dedup), ("decontaminate", decontaminate), ("sample", sample), ("split", split)):
        out = root / name
        out.mkdir(exist_ok=True)
        inputs = {n: root / n for n in ("filter", "embed", "dedup", "decontaminate", "sample", "base")}
        took, metrics[name] = seconds(lambda s=stage, o=out, i=inputs: s.run(s.spec(recipe), i, o, ctx))
        steps[name] = round(took, 2)
    total = round(sum(steps.values()), 2)
    return {"seconds": total, "peak_bytes": peak_bytes(), "steps": steps, "dedup": metrics["dedup"]}
