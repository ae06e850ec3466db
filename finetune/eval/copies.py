"""Count sampled answers that repeat an answer of the training rows, and held-out references that do so by chance.

An answer repeats another if at least CONTAINED of its runs of RUN words are runs of that one answer. References are
counted too: in formulaic data they also repeat training answers, which is not memorisation.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from finetune.data.records import read_rows
from finetune.data.text import word_runs, words

RUN = 5
CONTAINED = 0.8
SHORTEST = 12  # words; shorter answers repeat others without memorisation
MOST_ROWS = 50_000  # training rows that are compared


@dataclass(frozen=True)
class Copies:
    """Numbers of generated answers and of references, out of `samples` prompts, that repeat a training answer."""

    samples: int
    answers: int
    references: int


def kept_copies(samples: Path, train: Path, kept: Path | None) -> Copies | None:
    """Return `read_copies(samples, train)`, from the file `kept` if it was counted for these folders before."""
    places = [samples.parent.name, train.parent.name]
    if kept is not None and kept.is_file():
        try:
            before = json.loads(kept.read_text(encoding="utf-8"))
            if before["of"] == places:
                return Copies(*(int(n) for n in before["copies"]))
        except (OSError, ValueError, KeyError, TypeError):
            pass  # counted again
    copies = read_copies(samples, train)
    if copies is not None and kept is not None and kept.parent.is_dir():
        with suppress(OSError):
            kept.write_text(json.dumps({"of": places, "copies": list(astuple(copies))}), encoding="utf-8")
    return copies


def read_copies(samples: Path, train: Path) -> Copies | None:
    """Count from samples.jsonl of evaluate and train.parquet of split; None if either is not there."""
    if not samples.is_file() or not train.is_file():
        return None
    lines = []
    for line in samples.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:  # truncated when the process was killed
            break
    rows = (row.joined("assistant") for _, row in zip(range(MOST_ROWS), read_rows(train), strict=False))
    return count_copies(lines, rows)


def count_copies(samples: Sequence[Mapping[str, Any]], train: Iterable[str]) -> Copies:
    """Compare {"adapter": {"text"}, "reference"} of each sample with the training answers; short ones are left out."""
    texts = [(str(s.get("adapter", {}).get("text", "")), str(s.get("reference", ""))) for s in samples]
    answers = [(_runs(a), _runs(r)) for a, r in texts if len(words(a)) >= SHORTEST and len(words(r)) >= SHORTEST]
    wanted: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for number, pair in enumerate(answers):
        for side, runs in enumerate(pair):
            for run in runs:
                wanted[run].append((number, side))
    most: Counter[tuple[int, int]] = Counter()
    for answer in train:
        shared = Counter(place for run in _runs(answer) if run in wanted for place in wanted[run])
        for place, count in shared.items():
            most[place] = max(most[place], count)
    repeated = [
        sum(most[number, side] >= CONTAINED * len(pair[side]) for number, pair in enumerate(answers)) for side in (0, 1)
    ]
    return Copies(len(answers), *repeated)


def _runs(text: str) -> set[str]:
    return set(word_runs(words(text), RUN))
