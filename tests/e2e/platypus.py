"""Rows in the shape of Open-Platypus, with what its curation is there to find."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SOURCES = ("airoboros", "leetcode_ne", "reclor", "scibench")


@dataclass
class Rows:
    """Rows by what they are, in the order of the file; `evaluation` is the benchmark that some were leaked from."""

    rows: list[dict[str, str]] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    evaluation: list[dict[str, str]] = field(default_factory=list)

    def add(self, kind: str, instruction: str, output: str, source: str) -> None:
        """A row with the columns of the data set, in its order."""
        self.kinds.append(kind)
        self.rows.append({"input": "", "output": output, "instruction": instruction, "data_source": source})

    def of(self, kind: str) -> set[int]:
        """The numbers of the rows of a kind, from 1 as in row ids."""
        return {i for i, k in enumerate(self.kinds, 1) if k == kind}


def made(plain: int = 260, seed: int = 0) -> Rows:
    """Plain rows; exact copies; answers with one word of many changed; answers of the same words in another order;
    rows without an answer; questions of an evaluation file.
    """
    chance = random.Random(seed)
    words = ["".join(chance.choices(LETTERS, k=chance.randint(2, 8))) for _ in range(2000)]

    def said(count: int) -> str:
        return " ".join(chance.choices(words, k=count)).capitalize() + "."

    found = Rows()
    for _ in range(plain):
        found.add("plain", said(14), " ".join(said(10) for _ in range(chance.randint(3, 8))), chance.choice(SOURCES))
    for i, kind in enumerate(["exact"] * 20 + ["minhash"] * 15 + ["embedding"] * 12):
        answer = found.rows[i]["output"]
        parts = answer.split(" ")
        if kind == "exact":
            answer = f"  {answer.lower()}\n"
        elif kind == "minhash":
            answer = " ".join(parts[:-1])
        else:  # no run of five words is left, but all the words are
            answer = " ".join(parts[::2] + parts[1::2])
        found.add(kind, said(14), answer, found.rows[i]["data_source"])
    for _ in range(6):
        found.add("empty", said(14), "", "reclor")
    found.evaluation = [{"instruction": said(30), "input": "", "output": said(3)} for _ in range(25)]
    for leaked in found.evaluation[:9]:
        found.add("leaked", f"Tell me: {leaked['instruction']} Why?", " ".join(said(10) for _ in range(4)), "scibench")
    order = chance.sample(range(len(found.rows)), len(found.rows))
    found.rows, found.kinds = [found.rows[i] for i in order], [found.kinds[i] for i in order]
    return found


def write(folder: Path, rows: Rows) -> tuple[Path, Path]:
    """The rows as Parquet, as the Hub serves them, and the evaluation rows as JSON lines."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    data, evaluation = folder / "open-platypus.parquet", folder / "benchmark.jsonl"
    pq.write_table(pa.Table.from_pylist(rows.rows), data)
    evaluation.write_text("".join(json.dumps(row) + "\n" for row in rows.evaluation), encoding="utf-8")
    return data, evaluation
