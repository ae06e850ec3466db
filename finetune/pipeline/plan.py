"""Predict bytes, tokens, steps and seconds of a recipe from shapes alone: no weights, no network, no torch.

Rates are the datasheets' dense 16-bit figures; assumptions are stated next to each prediction.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.dedup.embedding_timing import describe as embedding_time_in_words
from finetune.dedup.embedding_timing import embedding_time
from finetune.errors import InputError
from finetune.estimate.choice import ASSUMED_UTILISATION, DEVICES, Choice, Options
from finetune.estimate.memory import OTHER_LAYERS, Training, disk, ram, windowed
from finetune.estimate.rows import expect
from finetune.estimate.shapes import Shapes, adapter_parameters, read_config, read_shapes
from finetune.eval.verdict import few_steps
from finetune.gguf.support import window_note
from finetune.models.architecture import positions
from finetune.models.device import machine_notes
from finetune.models.inventory import notes, why_not_packed
from finetune.pipeline.preflight import check_adapter
from finetune.recipe import Recipe
from finetune.serve.engines import adapter_limits
from finetune.synth.forecast import generation, generation_in_words
from finetune.train.batch import sizing_advice, total_steps
from finetune.utils.format import gb

if TYPE_CHECKING:
    from finetune.pipeline.runner import Step

DEFAULT_DEVICE = "t4"  # the device used if none is given
STATUS_WORDS = {"done": "there", "missing": "to run", "partial": "to go on with", "unknown": "to run", "off": "off"}


def predict(
    recipe: Recipe, steps: Sequence[Step], device: str | None = None, scratch: Path = Path("scratch")
) -> dict[str, Any]:
    """Return the plan as JSON: stages, access, memory, disk, tokens, steps, time. None if it depends on unread data.

    Raises InputError for an unknown device name, and for an adapter that does not fit the known base.
    """
    if device is not None and device.lower() not in DEVICES:
        raise InputError(f"--device {device}: allowed: {', '.join(DEVICES)}")
    by_name = {s.stage.name: s for s in steps}
    base = by_name["base"]
    pinned = base.folder if base.manifest else None
    check_adapter(recipe, pinned, scratch, load=recipe.tokens is not None)
    shapes = read_shapes(recipe, pinned)
    access = "no download of a base" if recipe.model.kind != "hub" else "open (not checked online)"
    if recipe.model.kind == "hub" and shapes and shapes.gated:
        access = f"gated: accept the terms at https://huggingface.co/{recipe.model.id} and log in (`hf auth login`)"
    written = by_name["generate"].manifest if "generate" in by_name else None
    result: dict[str, Any] = {
        "recipe": recipe.name,
        "model": recipe.model.id,
        "stages": {s.stage.name: s.status for s in steps},
        "older_versions": {s.stage.name: s.older_version for s in steps if s.older_version},
        "access": access,
        "parameters": shapes.parameters if shapes else None,
        **_data_figures(recipe, by_name),
        "embedding": _embedding(by_name, scratch),
        "preference": _pairs(recipe, by_name),
        "generate": generation(recipe, written.metrics if written else None),
    }
    if recipe.preference is not None and shapes is not None:
        result["alignment"] = _alignment(recipe, shapes, by_name, device)
    if recipe.train is None:
        result["imports"] = str(recipe.lora.start_from or "nothing: it is new").removeprefix("folder:")
        parts = disk(shapes, recipe) if shapes else None
        return result | {"memory_bytes": None, "ram_bytes": None, "disk_bytes": parts, "devices": None, "steps": 0}
    if shapes is None:
        return result | {"memory_bytes": None, "ram_bytes": None, "disk_bytes": None, "devices": None}
    result["notes"] = _notes(recipe, shapes, pinned)
    options = Options(shapes, Training.of(recipe, pinned))
    named = device.lower() if device else DEFAULT_DEVICE
    choices = {name: options.best(DEVICES[name]) for name in ([named] if device else DEVICES)}
    chosen = choices[named]
    result["trainable_parameters"] = adapter_parameters(shapes, recipe)
    result["memory_bytes"] = {**chosen.parts, "total": chosen.total}
    result["memory_device"] = named
    # Only if the window alone causes a dense mask: packed rows and several padded rows always have one.
    warns = windowed(shapes, options.run) and not options.run.packed and chosen.rows == 1
    result["sliding_window"] = shapes.window if warns else None
    result["ram_bytes"] = ram(shapes, recipe, chosen.rows, chosen.policy)
    result["disk_bytes"] = disk(shapes, recipe)
    tokens = None
    if result["rows"]:  # their tokens are those of one epoch
        tokens = float(result["steps"] * recipe.training.batch_rows * result["tokens"] / result["rows"])
    result["devices"] = {name: _on_device(choice, recipe, tokens) for name, choice in choices.items()}
    return result


def _alignment(recipe: Recipe, shapes: Shapes, by_name: dict[str, Step], device: str | None) -> dict[str, Any]:
    """Memory and speed of preference training by device; `pairs` and `steps` once stage pairs has counted them."""
    run = Training.of_preference(recipe)
    options = Options(shapes, run)
    named = device.lower() if device else DEFAULT_DEVICE
    choices = {name: options.best(DEVICES[name]) for name in ([named] if device else DEVICES)}
    chosen, asked = choices[named], recipe.preference
    assert asked is not None  # noqa: S101
    counted = by_name["pairs"].manifest if "pairs" in by_name else None
    pairs = int(counted.metrics["rows"]) if counted else None
    return {
        "method": asked.method,
        "pairs": pairs,
        "steps": total_steps(pairs, recipe.alignment) if pairs is not None else asked.max_steps,
        "memory_device": named,
        "memory_bytes": {**chosen.parts, "total": chosen.total},
        "devices": {
            name: {
                "fits": choice.fits,
                "peak_bytes": choice.total,
                "micro_batch_pairs": choice.rows,
                "checkpointing": choice.policy,
                "tokens_per_second": choice.tokens_per_second,
            }
            for name, choice in choices.items()
        },
    }


def _notes(recipe: Recipe, shapes: Shapes, pinned: Path | None) -> list[str]:
    """Return notes on the base that matter before anything is built, one sentence each."""
    lines = [*notes(shapes.inventory, read_config(recipe, pinned) or {})] if shapes.inventory else []
    if shapes.inventory is not None:
        lines.append(
            f"its layers are not Llama's: activations are those of a Llama layer of the same widths and "
            f"{OTHER_LAYERS:.0%} more, an estimate: of tiny models of ten other families it is 1.0 to 2.2 times "
            "what was measured"
        )
    if recipe.pack and pinned and (why := why_not_packed(pinned)):
        lines.append(f"packing is off: {why}")
    longest = Training.of(recipe, pinned).row_tokens
    known = positions({"max_position_embeddings": shapes.positions or None}, recipe.model.rope_scaling)
    if known and longest > known:
        lines.append(
            f"WARNING: rows may have {longest:,} tokens, the base knows {known:,} positions "
            "(max_position_embeddings): lower render.max_length_tokens, or set model.rope_scaling"
        )
    if limits := _not_served(recipe):
        lines.append(f"vLLM will not serve this adapter on its base ({'; '.join(limits)}): serve the merged model")
    to_gguf = recipe.merge and recipe.export and recipe.export.gguf
    if to_gguf and (note := window_note(read_config(recipe, pinned) or {})):
        lines.append(f"export.gguf: {note}")
    return [*lines, *machine_notes()]


def _not_served(recipe: Recipe) -> list[str]:
    lora = recipe.lora
    config = {"r": lora.r, "rank_pattern": lora.rank_pattern, "modules_to_save": lora.modules_to_save}
    added = {"embed_tokens": recipe.tokens.add} if recipe.tokens else None
    return adapter_limits({**config, "use_dora": lora.dora, "trainable_token_indices": added})


def _embedding(by_name: dict[str, Step], scratch: Path) -> dict[str, Any] | None:
    """Return the predicted embedding time, once filter has counted the rows; None if nothing has to be embedded."""
    filtered, step = by_name["filter"].manifest, by_name["embed"]
    if filtered is None or step.spec is None or step.manifest is not None:
        return None
    return embedding_time(step.spec.model_dump()["embedding"], int(filtered.metrics["rows_out"]), scratch)


def _pairs(recipe: Recipe, by_name: dict[str, Step]) -> dict[str, Any] | None:
    """Pairs, tokens and steps of preference tuning; the counts are None before the stage pairs has run."""
    section = recipe.preference
    if section is None:
        return None
    manifest = by_name["pairs"].manifest
    figures: dict[str, Any] = {"method": section.method, "loss": section.loss_type}
    if manifest is None:
        return figures | {"pairs": None, "tokens": None, "steps": None}
    pairs = int(manifest.metrics["rows"])
    steps = total_steps(pairs, recipe.alignment)
    return figures | {"pairs": pairs, "tokens": manifest.metrics["tokens"], "steps": steps}


def _data_figures(recipe: Recipe, by_name: dict[str, Step]) -> dict[str, Any]:
    """Return rows, tokens and optimiser steps: counted by render and pack, or estimated from local files."""
    pack, render = by_name["pack"], by_name["render"]
    last = pack.manifest or (render.manifest if pack.status == "off" else None)
    if last is None:
        if recipe.train is None or (expected := expect(recipe)) is None:
            return {"rows": None, "tokens": None, "steps": None}
        counted = {"rows": expected.rows, "tokens": expected.tokens, "documents": expected.documents, "estimated": True}
    else:
        rows = int(last.metrics.get("bins") or last.metrics.get("rows") or 0)
        documents = int(last.metrics.get("documents") or rows)
        tokens = int(last.metrics.get("tokens") or 0)
        counted = {"rows": rows, "tokens": tokens, "documents": documents, "estimated": False}
    steps = total_steps(counted["rows"], recipe.training)
    few = few_steps(steps, sizing_advice(counted["documents"], counted["rows"])) if recipe.train else ""
    return {**counted, "steps": steps, "few_steps": few}


def _on_device(choice: Choice, recipe: Recipe, tokens: float | None) -> dict[str, Any]:
    """Return the training settings on a device: the fastest that fits, or the smallest if `fits` is false."""
    return {
        "fits": choice.fits,
        "memory_bytes": choice.budget_bytes,
        "peak_bytes": choice.total,
        "micro_batch_rows": choice.rows,
        "accumulation": max(1, recipe.training.batch_rows // choice.rows),
        "checkpointing": choice.policy,
        "tokens_per_second": choice.tokens_per_second,
        "train_seconds": tokens / choice.tokens_per_second if tokens else None,
    }


def describe(result: dict[str, Any]) -> str:
    """Return the plan as text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(  # noqa: S701 - text for a terminal
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(
        embedding_time_in_words=embedding_time_in_words, gb=gb, generation_in_words=generation_in_words,
        labelled=_labelled, parts=_parts, status_words=STATUS_WORDS, utilisation=ASSUMED_UTILISATION,
    )  # fmt: skip
    return environment.get_template("plan.jinja").render(**result).rstrip("\n")


def _labelled(label: str, text: str) -> str:
    return textwrap.fill(text, 100, initial_indent=f"  {label:<12}", subsequent_indent=" " * 14)


def _parts(label: str, first: str, parts: dict[str, int], width: int = 100) -> str:
    """Format `first` and parts above 50 MB, largest first, in lines of at most `width` columns."""
    largest = sorted(((k, v) for k, v in parts.items() if v > 50e6 and k != "total"), key=lambda part: -part[1])
    lines: list[str] = []
    line = f"  {label:<12}{first}".rstrip() if first else f"  {label:<11}"
    for number, (name, size) in enumerate(largest):
        word = f" {name.replace('_', ' ')} {gb(size)}{',' if number + 1 < len(largest) else ''}"
        if len(line) + len(word) > width:
            lines, line = [*lines, line], " " * 13
        line += word
    return "\n".join([*lines, line])
