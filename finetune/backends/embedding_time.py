"""How long the embed stage would take here: by what it last took with the same model, else by a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune.backends.embedding_names import LSA, STATIC

# Rows a second on 2 cores, answers of 100 tokens or so; a model is taken for one of MiniLM's size (22 million
# parameters, 6 layers). One of gte-large's takes some 15 times as long, and a GPU a hundredth of it.
RATES = {LSA: 2000.0, STATIC: 5000.0, "": 60.0}


def embedding_time(embedding: str, rows: int, built: Path) -> dict[str, Any]:
    """What to expect of embedding `rows` rows.

    Args:
        embedding: the name in the embed stage's spec.
        rows: how many.
        built: the folder that holds the embed stage's outputs, each with its manifest.

    Returns:
        {"rows", "rows_per_second", "seconds", "measured": whether by an embed stage that ran here}.
    """
    rate, newest = 0.0, 0
    for path in built.glob("*/manifest.json"):
        try:
            metrics, made = json.loads(path.read_bytes())["metrics"], path.stat().st_mtime_ns
        except (OSError, ValueError, KeyError):
            continue  # removed meanwhile, or damaged: whoever needs that stage will say so
        if metrics.get("model") == embedding and metrics.get("rows_per_second") and made > newest:
            rate, newest = float(metrics["rows_per_second"]), made
    if not newest:
        kind = embedding if embedding == LSA else STATIC if embedding.startswith(STATIC) else ""
        rate = RATES[kind]
    return {"rows": rows, "rows_per_second": rate, "seconds": rows / rate, "measured": newest > 0}


def describe(expected: dict[str, Any]) -> str:
    """The same for a person."""
    how = "as the last embed stage here" if expected["measured"] else "by the table, for a small model on 2 cores"
    rate = f"{expected['rows']:,} rows at {expected['rows_per_second']:,.0f} a second"
    return f"about {expected['seconds']:.0f} s for {rate} ({how})"
