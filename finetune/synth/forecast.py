"""Before a model is asked: requests, tokens and their limits; whether it can be reached, or loaded here."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from finetune.context import Context
from finetune.errors import FinetuneError, GateRefused, InputError
from finetune.recipe import LanguageModel, LocalSource, PydocSource, Recipe
from finetune.serve.client import sentences
from finetune.synth.asking import local_folder, server_of
from finetune.synth.seeds import read_seeds, require_seeds


def generation(recipe: Recipe, metrics: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return rows, requests and tokens of stage generate: what it took, or what it needs at least and may take at most.

    `metrics` are those of the finished stage, None before. `seeds` is None if they are on the Hub and not counted yet;
    the figures that depend on them are then None as well.
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
    if metrics is not None:
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


def check_endpoint(model: LanguageModel, field: str) -> str:
    """Return a note on the endpoint, or "". Raises InputError or FinetuneError if it cannot be reached or refuses.

    Only the list of models is asked for: nothing is generated.
    """
    if model.local is not None:
        return ""
    server = server_of(model, field)
    import openai

    try:
        with sentences(server):
            listed = server.models()
    except InputError as error:
        if isinstance(error.__context__, openai.NotFoundError):  # a server without a list
            return ""
        raise
    if not listed or any(name in (model.name, f"{model.name}:latest") for name in listed):
        return ""
    return f"{field}.name: {server.url} does not list {model.name}; it lists {', '.join(listed[:10])}"


def check_room(model: LanguageModel, field: str, device: str) -> None:
    """Raise GateRefused if the weights of a local model are larger than the free memory of `device` (cuda, cpu).

    Of a model on the Hub the files are listed; if the Hub does not answer, nothing is checked.
    """
    from finetune.eval.voice import loaded_bytes, no_room
    from finetune.models.loading import weight_files

    local = model.local
    if local is None or local.kind == "builtin":
        return
    if local.folder is not None:
        needed = loaded_bytes(weight_files(local.folder), device)
    else:
        from huggingface_hub import HfApi

        from finetune.hub import client as hub_client

        try:
            with hub_client.sentences("read", local.id, "model"):
                listed = hub_client.tree_of(HfApi(), local.id, "model", local.revision or "main")
        except InputError:
            raise
        except FinetuneError:
            return
        needed = sum(f.size for f in listed if fnmatch(f.path, "model*.safetensors"))
    if why_not := no_room(needed, device):
        raise GateRefused(f"{field}: {local.id}: {why_not}; name a smaller model, or serve it and name its endpoint")


def require_askable(model: LanguageModel, base: Path, ctx: Context, field: str) -> None:
    """Raise InputError or FinetuneError if the endpoint, or weights or template of a local model, cannot be used."""
    from finetune.eval.voice import require_voice

    if model.local is None:
        check_endpoint(model, field)
    else:
        require_voice(local_folder(model, base, ctx))
