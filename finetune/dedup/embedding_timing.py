"""Estimate the duration of the embed stage for each kind of model: from earlier runs here, else from a table.

`scratch/embeddings/rates.json` holds the last rows per second of each model on this machine. Scratch is local, so
artifacts copied from another machine do not count.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune.dedup.embedding_names import LSA, STATIC

SENTENCES = "sentence-transformers"
# Rows per second on 2 cores, answers of about 100 tokens; a model is assumed to have MiniLM's size (10.6 million
# parameters in 6 layers) unless its name contains a size below.
RATES = {LSA: 2000.0, STATIC: 5000.0, SENTENCES: 60.0}
LARGER = {"base": 8.0, "large": 28.0}  # size of the BERT models of that name relative to MiniLM
LEAST_ROWS = 1000  # with fewer, loading the model dominates


def kind_of(embedding: str) -> str:
    """Return `lsa`, `model2vec:` or `sentence-transformers`."""
    return LSA if embedding == LSA else STATIC if embedding.startswith(STATIC) else SENTENCES


def keep_rate(scratch: Path, embedding: str, rows: int, seconds: float) -> None:
    """Record the time of embedding `rows` rows; a failed write only makes the next plan less precise."""
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
    """Estimate embedding `rows` rows with `embedding`, the name in the embed stage's spec.

    Returns:
        {"rows", "model", "rows_per_second", "seconds", "measured": on this machine, "others": the same figures for a
        model of each other kind, by the name of a measured model, else by the kind's name}.
    """
    known = _known(scratch)
    others = {}
    for kind in RATES:
        if kind != kind_of(embedding):
            name = next((n for n in sorted(known) if kind_of(n) == kind), kind)
            others[name] = _expected(name, kind, rows, known)
    return {"rows": rows, "model": embedding, **_expected(embedding, kind_of(embedding), rows, known), "others": others}


def describe(expected: dict[str, Any]) -> str:
    """Format the result of `embedding_time` as text."""
    others = "; ".join(f"{_words(name, timing)}" for name, timing in expected["others"].items())
    return f"{_words(expected['model'], expected)} for {expected['rows']:,} rows; instead: {others}"


def _expected(name: str, kind: str, rows: int, known: dict[str, float]) -> dict[str, Any]:
    times = max((t for word, t in LARGER.items() if kind == SENTENCES and word in name.lower()), default=1.0)
    rate = known.get(name, RATES[kind] / times)
    return {"rows_per_second": rate, "seconds": rows / rate, "measured": name in known}


def _words(name: str, timing: dict[str, Any]) -> str:
    label = "a static model" if name == STATIC else "a small transformer" if name == SENTENCES else name
    how = "measured here" if timing["measured"] else "an estimate for 2 cores"
    return f"{label} about {timing['seconds']:,.0f} s ({how})"


def _file(scratch: Path) -> Path:
    return scratch / "embeddings" / "rates.json"


def _known(scratch: Path) -> dict[str, float]:
    try:
        timings = json.loads(_file(scratch).read_bytes())
        return {str(name): float(rate) for name, rate in timings.items() if float(rate) > 0}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # no measurement, or a damaged file
