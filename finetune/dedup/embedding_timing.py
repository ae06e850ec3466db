"""How long the embed stage would take here with each kind of model: as measured here before, else by a table.

`scratch/embeddings/rates.json` holds the rows a second that each model last made on this machine. Scratch is local, so
a folder of artifacts that was brought from another machine does not count.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune.dedup.embedding_names import LSA, STATIC

SENTENCES = "sentence-transformers"
# Rows a second on 2 cores, answers of 100 tokens or so; a model is taken for one of MiniLM's size (10.6 million
# parameters in 6 layers) unless its name says more.
RATES = {LSA: 2000.0, STATIC: 5000.0, SENTENCES: 60.0}
LARGER = {"base": 8.0, "large": 28.0}  # how many times those parameters BERT's sizes of that name have
LEAST_ROWS = 1000  # in fewer, most of the time goes into loading the model


def kind_of(embedding: str) -> str:
    """`lsa`, `model2vec:` or `sentence-transformers`."""
    return LSA if embedding == LSA else STATIC if embedding.startswith(STATIC) else SENTENCES


def keep_rate(scratch: Path, embedding: str, rows: int, seconds: float) -> None:
    """Remember what embedding `rows` rows took; a disk that will not take it costs only the next plan its precision."""
    from finetune.utils.files import canonical_json, replace_bytes

    if rows < LEAST_ROWS or seconds <= 0:
        return
    path = _file(scratch)
    rates = {**_known(scratch), embedding: rows / seconds}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(path, canonical_json(rates).encode())
    except OSError:
        return


def embedding_time(embedding: str, rows: int, scratch: Path) -> dict[str, Any]:
    """What to expect of embedding `rows` rows by `embedding`, the name in the embed stage's spec.

    Returns:
        {"rows", "model", "rows_per_second", "seconds", "measured": whether here, "others": the same figures for a
        model of each other kind, by its name where one was measured, else by the kind's}.
    """
    known = _known(scratch)
    others = {}
    for kind in RATES:
        if kind != kind_of(embedding):
            name = next((n for n in sorted(known) if kind_of(n) == kind), kind)
            others[name] = _expected(name, kind, rows, known)
    return {"rows": rows, "model": embedding, **_expected(embedding, kind_of(embedding), rows, known), "others": others}


def describe(expected: dict[str, Any]) -> str:
    """The same for a person."""
    others = "; ".join(f"{_words(name, found)}" for name, found in expected["others"].items())
    return f"{_words(expected['model'], expected)} for {expected['rows']:,} rows; instead: {others}"


def _expected(name: str, kind: str, rows: int, known: dict[str, float]) -> dict[str, Any]:
    times = max((t for word, t in LARGER.items() if kind == SENTENCES and word in name.lower()), default=1.0)
    rate = known.get(name, RATES[kind] / times)
    return {"rows_per_second": rate, "seconds": rows / rate, "measured": name in known}


def _words(name: str, found: dict[str, Any]) -> str:
    label = "a static model" if name == STATIC else "a small transformer" if name == SENTENCES else name
    how = "measured here" if found["measured"] else "an estimate for 2 cores"
    return f"{label} about {found['seconds']:,.0f} s ({how})"


def _file(scratch: Path) -> Path:
    return scratch / "embeddings" / "rates.json"


def _known(scratch: Path) -> dict[str, float]:
    try:
        found = json.loads(_file(scratch).read_bytes())
        return {str(name): float(rate) for name, rate in found.items() if float(rate) > 0}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # nothing measured, or not by us
