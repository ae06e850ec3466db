"""Requests and tokens that generation will need, and the limits on them, before anything is requested."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from finetune.errors import InputError
from finetune.recipe import LocalSource, PydocSource, Recipe
from finetune.synth.seeds import read_seeds, require_seeds


class Finished(Protocol):
    """The manifest of a finished stage."""

    @property
    def metrics(self) -> Mapping[str, Any]:
        """Counts of the stage."""


class Planned(Protocol):
    """A planned stage."""

    @property
    def manifest(self) -> Finished | None:
        """The finished stage's manifest, or None."""


def generation(recipe: Recipe, step: Planned | None) -> dict[str, Any] | None:
    """Return rows, requests and tokens of stage generate: what it took, or what it needs at least and may take at most.

    `seeds` is None if they are on the Hub and not counted yet; the figures that depend on them are then None as well.
    Raises InputError if the rows that are asked for, or seeds without a number of rows, exceed max_requests or
    max_tokens even if every candidate is used, and for seeds that do not fit.
    """
    section = recipe.generate
    if section is None:
        return None
    model = section.model
    figures: dict[str, Any] = {
        "method": section.method,
        "model": model.label,
        "endpoint": model.endpoint,
        "max_requests": section.max_requests,
        "max_tokens": section.max_tokens,
    }
    if step is not None and step.manifest is not None:
        metrics = step.manifest.metrics
        return figures | {
            "done": True,
            "seeds": metrics["seeds"],
            "rows": metrics["rows_out"],
            "requests": metrics["requests"],
            "tokens": metrics["prompt_tokens"] + metrics["tokens"],
        }
    seeds = _count(recipe)
    rows = section.most_rows(seeds)
    least = section.requests_of(rows) if rows is not None else None
    for name, limit in (("max_requests", section.max_requests), ("max_tokens", section.max_tokens)):
        if limit is not None and least is not None and limit < least:
            raise InputError(
                f"generate.{name}: {limit:,} is less than the {least:,} requests that {rows:,} rows take at least; "
                "raise it, or set generate.rows"
            )
    most = least * section.max_new_tokens if least is not None else None
    return figures | {"done": False, "seeds": seeds, "rows": rows, "requests": least, "answer_tokens_at_most": most}


def _count(recipe: Recipe) -> int | None:
    """Return the number of seeds; None if any of them is on the Hub."""
    section = recipe.generate
    assert section is not None  # noqa: S101 - the caller asked
    if not all(isinstance(source, (LocalSource, PydocSource)) for source in section.seeds):
        return None
    seeds = list(read_seeds(section.seeds, Path(), recipe.ingest.ignore, single=section.method != "answer"))
    return len(require_seeds(seeds, section.max_refused_fraction))


def generation_in_words(f: dict[str, Any]) -> str:
    """Return the plan of stage generate in one or two sentences."""
    where = f"{f['model']} at {f['endpoint']}" if f["endpoint"] else f["model"]
    if f["done"]:
        return f"{f['method']} by {where}: {f['rows']:,} rows, {f['requests']:,} requests, {f['tokens']:,} tokens"
    limits = [f"{name} {f[name]:,}" for name in ("max_requests", "max_tokens") if f[name] is not None]
    limited = f"; limits: {', '.join(limits)}" if limits else "; no limit (generate.max_requests, max_tokens)"
    if f["requests"] is None:
        return f"{f['method']} by {where}: requests unknown until the seeds are read{limited}"
    return (
        f"{f['method']} by {where}: {f['rows']:,} rows, {f['requests']:,} requests of up to "
        f"{f['answer_tokens_at_most']:,} answer tokens together if every candidate is used, more otherwise{limited}"
    )
