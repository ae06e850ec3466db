"""Near-duplicates by wording: our exact join beside the LSH of datasketch and of rensa, a process for each.

    .venv/bin/python scripts/bench/curation_wording.py --data ../shared/data [--rows 20000] [--out wording.json]

All three get the same rows and the same sets of word 5-grams (their libraries as lists of texts, whose making is not
timed; ours from the texts, which is). Seconds to hash, to build and to ask for the neighbours of every row; peak memory
over what the process held with the texts read; recall: the share of all pairs of Jaccard ≥ 0.8, which the exact join
found and a count by dictionaries confirms on a sample, that are among the candidates; candidates: how many pairs were
named, right or wrong. A library that is not installed is left out (`pip install datasketch rensa`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from curation_checks import WORDING, peak_bytes, read, seconds

ARMS = ("ours", "datasketch", "rensa")
FILES = ("instruct-16k", "t0-55k")
NGRAM = 5
PERMUTATIONS = 128
BANDS = 32  # of 4 rows each, for rensa; datasketch chooses its own (25 of 5)

Found = tuple[dict[str, float], np.ndarray]  # seconds a step, pairs (N, 2) with the smaller row first


def texts_of(data: Path, rows: int) -> list[str]:
    """Different rows of both files as one text each, evenly spread."""
    found = [row for name in FILES for row in read(data, name, rows // len(FILES))]
    return list(dict.fromkeys("\n".join((r["instruction"], r["input"], r["output"])) for r in found))


def token_sets(texts: Sequence[str]) -> Iterator[list[str]]:
    """The n-grams of every text, as our sets have them."""
    from finetune.data.text import normalised
    from finetune.dedup.jaccard import WORD_OR_SIGN

    for text in texts:
        words = WORD_OR_SIGN.findall(normalised(text))
        count = max(len(words) - NGRAM + 1, 1)
        yield list(dict.fromkeys(" ".join(words[k : k + NGRAM]) for k in range(count))) if words else []


def ours(texts: list[str]) -> Found:
    """The exact join."""
    from finetune.dedup.jaccard import SetSearch, word_sets

    took: dict[str, float] = {}
    took["hash"], sets = seconds(lambda: word_sets(texts, NGRAM))
    search = SetSearch(WORDING)
    took["build"], _ = seconds(lambda: search.add(sets))
    took["query"], found = seconds(lambda: list(search.pairs(sets, WORDING)))
    pairs = np.concatenate([np.zeros((0, 2), np.int64), *(np.stack([i, j], 1) for i, j, _ in found)])
    return took, pairs[pairs[:, 0] < pairs[:, 1]]


def datasketch(texts: list[str]) -> Found:
    """Its MinHashLSH with the bands it chooses for the threshold."""
    from datasketch import MinHash, MinHashLSH

    tokens = [[t.encode() for t in row] for row in token_sets(texts)]
    took: dict[str, float] = {}
    lsh = MinHashLSH(threshold=WORDING, num_perm=PERMUTATIONS)
    took["hash"], made = seconds(lambda: MinHash.bulk(tokens, num_perm=PERMUTATIONS, seed=1))

    def build() -> None:
        for row, one in enumerate(made):
            lsh.insert(row, one)

    took["build"], _ = seconds(build)
    took["query"], found = seconds(lambda: [lsh.query(one) for one in made])
    return took, as_pairs(found, tokens)


def rensa(texts: list[str]) -> Found:
    """Its RMinHashLSH."""
    from rensa import RMinHash, RMinHashLSH

    tokens = list(token_sets(texts))
    took: dict[str, float] = {}
    lsh = RMinHashLSH(WORDING, PERMUTATIONS, BANDS)
    took["hash"], made = seconds(lambda: RMinHash.from_token_sets(tokens, PERMUTATIONS, 1))

    def build() -> None:
        for row, one in enumerate(made):
            lsh.insert(row, one)

    took["build"], _ = seconds(build)
    took["query"], found = seconds(lambda: [lsh.query(one) for one in made])
    return took, as_pairs(found, tokens)


def as_pairs(found: Sequence[Sequence[int]], tokens: Sequence[Sequence[object]]) -> np.ndarray:
    """Candidates as pairs; rows without words are like none."""
    pairs = [(i, int(j)) for i, row in enumerate(found) for j in row if i < int(j) and tokens[i] and tokens[int(j)]]
    return np.array(pairs, np.int64).reshape(-1, 2)


def run_arm(name: str, texts: list[str], folder: Path) -> dict[str, Any]:
    """One arm in this process; its pairs go to a file."""
    arm: Callable[[list[str]], Found] = {"ours": ours, "datasketch": datasketch, "rensa": rensa}[name]
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before = peak_bytes()
    took, pairs = arm(texts)
    np.save(folder / f"{name}.npy", pairs)
    return {
        "seconds": {**{k: round(v, 2) for k, v in took.items()}, "sum": round(sum(took.values()), 2)},
        "more_bytes": peak_bytes() - before,
        "candidates": len(pairs),
    }


def confirmed(texts: list[str], pairs: np.ndarray, sampled: int = 200) -> float:
    """Recall of `pairs` by dictionaries: of a sample of rows, the share of their pairs that are there."""
    sets = [frozenset(row) for row in token_sets(texts)]
    known = {tuple(p) for p in pairs.tolist()}
    real = right = 0
    for i in range(0, len(sets), max(1, len(sets) // sampled)):
        for j, other in enumerate(sets):
            if i != j and sets[i] and other:
                smaller, larger = sorted((len(sets[i]), len(other)))
                if smaller < WORDING * larger - 1e-9:
                    continue
                common = len(sets[i] & other)
                if common / (len(sets[i]) + len(other) - common) >= WORDING:
                    real += 1
                    right += (min(i, j), max(i, j)) in known
    return right / real if real else 1.0


def compare(data: Path, rows: int, folder: Path) -> dict[str, Any]:
    """Every arm that is installed, and what it found of what there is."""
    texts = texts_of(data, rows)
    out: dict[str, Any] = {"rows": len(texts)}
    truth: set[tuple[int, int]] = set()
    for name in ARMS:
        if name != "ours" and importlib.util.find_spec(name) is None:
            print(f"wording: {name} is not installed, left out", file=sys.stderr)
            continue
        command = [sys.executable, __file__, "--data", str(data), "--rows", str(rows), "--arm", name, str(folder)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        out[name] = json.loads(done.stdout.splitlines()[-1])
        pairs = np.load(folder / f"{name}.npy")
        if name == "ours":
            truth = {tuple(p) for p in pairs.tolist()}
            out[name]["recall"] = confirmed(texts, pairs)
        else:
            right = len(truth & {tuple(p) for p in pairs.tolist()})
            out[name]["recall"] = round(right / len(truth), 4) if truth else 1.0
        print(f"wording, {name}: {out[name]}", file=sys.stderr)
    return out


def main() -> None:
    """Parse, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, default=Path("/tmp"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--arm", nargs=2, metavar=("NAME", "FOLDER"), help="inner call: one arm, as JSON")
    asked = parser.parse_args()
    if asked.arm:
        print(json.dumps(run_arm(asked.arm[0], texts_of(asked.data, asked.rows), Path(asked.arm[1]))))
        return
    found = compare(asked.data, asked.rows, asked.folder)
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    else:
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
