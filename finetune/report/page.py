"""`finetune report`: one HTML page about a run, in the run's folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from finetune.errors import FinetuneError, InputError
from finetune.eval.metrics import never_stops
from finetune.eval.verdict import BAD, DEFINITIONS, Verdict, verdict_of
from finetune.pipeline import run_view
from finetune.pipeline.runs import begun_at, recorded
from finetune.pipeline.stage_list import STAGES, spec_of
from finetune.pipeline.store import Store
from finetune.recipe import Recipe
from finetune.recipe.load import parse_recipe
from finetune.report.html import render_page
from finetune.report.stage_view import Stages, StageView
from finetune.utils.files import replace_bytes
from finetune.utils.format import percent
from finetune.utils.links import read_regular

REPORT = "report.html"


def write_report(store: Store, name: str, say: Callable[[str], None] = lambda line: None) -> Path:
    """Write report.html of `RECIPE[@RUN]` from what is on disk now; the same state gives the same bytes.

    Without @RUN it is the newest finished run; `say` gets a line if a newer one is skipped.
    Raises InputError if there is no such run, or what it recorded is not what a run records.
    """
    value = run_view.finished(store, name, say=say)
    path: Path = value["folder"] / REPORT
    with recorded(value["folder"]):
        page = render_page("report.jinja", read_facts(store, value))
    try:
        replace_bytes(path, page)
    except OSError as error:
        raise FinetuneError(f"{path}: cannot be written: {error.strerror or error}") from None
    return path


def read_facts(store: Store, value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that the page shows of a run, as read by `shown.read`."""
    from finetune.report import data_section, model_sections, preference_section, synthetic_section

    stages = _views(store, value)
    text = read_regular(value["folder"] / "recipe.yaml").decode(errors="replace")
    recipe, moment = _recipe(text, value), begun_at(value["run"])
    judged = verdict_of({n: v.metrics for n, v in stages.items()}, {n: v.folder for n, v in stages.items()})
    predicted = predicted_memory(recipe, stages)
    return {
        "recipe": value["recipe"],
        "run": value["run"],
        "date": moment.strftime("%Y-%m-%d %H:%M UTC") if moment else "unknown date",
        "model": recipe.model.id if recipe else "",
        "device": str(stages["train"].metrics.get("device", "")),
        "result": _shaded(result(stages, recipe), judged),
        "verdict": judged,
        "definitions": DEFINITIONS,
        "stages": stages,
        "synthetic": synthetic_section.synthetic_section(stages.get("generate")),
        "data": data_section.data_section(stages, recipe),
        "training": model_sections.training_section(stages["train"], predicted),
        "preference": preference_section.preference_section(stages),
        "evaluation": model_sections.evaluation_section(stages),
        "certificate": model_sections.certificate_section(stages),
        "export": model_sections.export_section(stages["export"]),
        "recipe_text": text,
        "sets": value["sets"],
        "manifests": [v.manifest for v in stages.values() if v.manifest is not None],
        "folder": str(value["folder"]),
    }


def _views(store: Store, value: Mapping[str, Any]) -> dict[str, StageView]:
    views = {}
    for name, record in value["stages"].items():
        folder = Path(record["path"]) if record["path"] else None
        views[name] = StageView(
            name=name,
            status=record["status"],
            folder=folder,
            metrics=record["metrics"],
            seconds=record["seconds"],
            message=record.get("message", ""),
            manifest=store.find(folder) if folder else None,
        )
    return views


def _recipe(text: str, value: Mapping[str, Any]) -> Recipe | None:
    """Return the run's recipe; None if this version cannot read it."""
    try:
        return parse_recipe(text, value["folder"] / "recipe.yaml", value["sets"])
    except InputError:
        return None


def predicted_memory(recipe: Recipe | None, stages: Stages) -> dict[str, int] | None:
    """Return the plan's bytes in training, by part and in total, for the micro-batch that was used."""
    from finetune.estimate.memory import Attention, Training, training
    from finetune.estimate.shapes import read_shapes
    from finetune.models.attention import is_varlen
    from finetune.train.batch import batch_shape

    if recipe is None:
        return None
    base, train = stages["base"], stages["train"].metrics
    pinned = base.folder if base.manifest else None
    shapes = read_shapes(recipe, pinned)
    if shapes is None:
        return None
    usual = batch_shape(recipe.training.batch_rows, recipe.runtime.micro_batch_rows, 1, recipe.pack is not None)[0]
    attention = Attention(varlen=is_varlen(str(train.get("attention", ""))))
    rows, policy = train.get("micro_batch_rows") or usual, train.get("checkpointing", "full")
    parts = training(
        shapes,
        Training.of(recipe, pinned),
        rows,
        policy,
        attention,
        train.get("processes", 1),
    )
    return {**parts, "total": sum(parts.values())}


def result(stages: Stages, recipe: Recipe | None) -> dict[str, str]:
    """Return a sentence on how the run ended; `kind` is done, stopped, refused or failed."""
    for view in stages.values():
        if view.status in ("refused", "failed"):
            words = "A gate refused" if view.status == "refused" else "Failed in"
            return {"kind": view.status, "words": f"{words} {view.name}: {view.message}"}
        if view.status == "partial":
            return {"kind": "stopped", "words": f"Stopped in {view.name}; the same command goes on from there."}
    done = [v for v in stages.values() if v.metrics]
    off = [s.name for s in STAGES if recipe is not None and spec_of(s, recipe) is None]
    left = [v.name for v in stages.values() if v.status == "missing" and not v.metrics and v.name not in off]
    if not done:
        return {"kind": "stopped", "words": "Nothing is finished yet."}
    loud = " NO ANSWER ENDED BY ITSELF (see Evaluation)." if never_stops(stages["evaluate"].metrics) else ""
    if left:
        words = f"Finished as far as {done[-1].name}; {left[0]} and what follows it has not run."
        return {"kind": "stopped", "words": words + loud}
    return {"kind": "stopped" if loud else "done", "words": _outcome(stages) + loud}


def _shaded(tile: dict[str, str], judged: Verdict | None) -> dict[str, str]:
    """Do not show a finished run with a bad line in its verdict as a success."""
    bad = judged is not None and judged.level == BAD
    return {**tile, "kind": "stopped"} if bad and tile["kind"] == "done" else tile


def _outcome(stages: Stages) -> str:
    evaluated, certified = stages["evaluate"].metrics, stages["certify"].metrics
    words = []
    if evaluated:
        before, after = evaluated["perplexity_base"], evaluated["perplexity_adapter"]
        verb = "fell" if after < before else "rose"
        words.append(f"perplexity on held-out rows {verb} from {before:.3g} to {after:.3g}")
    if certified:
        agreement = percent(certified["agreement"])
        words.append(f"the merged model picks the same next token as the trained one in {agreement} of places")
    if not words:
        return "Finished. Nothing was measured on held-out rows."
    return f"Finished: {', and '.join(words)}."
