"""Load a model for generation (a run's adapter on its base, a merged model, a base) with template and terminators."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from finetune.context import Context
from finetune.errors import InputError
from finetune.eval.voice import Voice, folder_voice, generation_stops, make_voice, prompt_ids
from finetune.pipeline import run_view
from finetune.pipeline.runs import recipe_text
from finetune.pipeline.store import Store
from finetune.recipe import Recipe
from finetune.recipe.load import parse_recipe
from finetune.utils.console import Screen
from finetune.utils.files import read_json
from finetune.utils.links import require_model

__all__ = ["Voice", "folder_voice", "model_folder", "open_voice", "prompt_ids", "run_voice"]
HUB_BASE = r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?"


def model_folder(name: str) -> Path | None:
    """Return the model folder that `name` is, or None for the name of a run. Raises InputError for another folder."""
    path = Path(name).expanduser()
    if (path / "config.json").is_file():
        require_model(path, name)
        return path
    if (path / "adapter_config.json").is_file():
        raise InputError(f"{name} is an adapter without its base; give the name of the run that trained it")
    looks_like_path = "/" in name and not name.partition("@")[0].endswith((".yaml", ".yml"))
    if looks_like_path:
        what = "holds no config.json" if path.is_dir() else "is not a folder"
        raise InputError(f"{name} {what}; give a recipe (also RECIPE@RUN) or the folder of a merged model")
    return None


@contextmanager
def run_voice(name: str, artifacts: Path, scratch: Path, screen: Screen) -> Iterator[Voice]:
    """Load the adapter of a run on its base, quantised as in training."""
    from finetune.models import loading
    from finetune.models.device import pick_device, pick_precision
    from finetune.utils import runtime

    store = Store(artifacts, scratch)
    value = run_view.finished(store, name, run_view.adapter_needs, screen.say)
    base, trained = run_view.done_folders(value, run_view.adapter_needs(value), name)
    adapter, recipe = trained / "adapter", recipe_of(value, name.partition("@")[0])
    device = pick_device(recipe.runtime.device)
    ctx = Context(scratch.absolute(), recipe.runtime, recipe.tracking, say=screen.say, bar=screen.bar, device=device)
    precision, why = pick_precision(recipe.training.precision, device)
    kind = recipe.quantization.type.upper() if recipe.quantization else "unquantised"
    screen.say(f"{value['recipe']}@{value['run']}: adapter on {recipe.model.id} ({kind}), {precision}: {why}")
    frozen = loading.load_base(recipe.model, base, ctx, recipe.quantization, precision, device)
    model = loading.attach_adapter(frozen, adapter)
    described = adapter / "template" / "template.json"  # an adapter imported without rows has none
    facts = read_json(described) if described.is_file() else {}
    with runtime.fitting(base, device):
        stops = facts.get("terminators") or generation_stops(base)
        identity = f"{[base.name, trained.name]}, {precision}"  # keys of the two stages
        yield make_voice(model, base, adapter, stops, facts, identity)


def recipe_of(value: dict[str, Any], name: str) -> Recipe:
    """Return the recipe as this run read it; relative paths are resolved next to the original file."""
    text = recipe_text(value["folder"])
    origin = Path(name) if name.endswith((".yaml", ".yml")) else value["folder"] / "recipe.yaml"
    return parse_recipe(text, origin, value["sets"])


@contextmanager
def base_voice(name: str, artifacts: Path, scratch: Path, screen: Screen) -> Iterator[Voice]:
    """Load a published base: OWNER/NAME[@REVISION] on the Hub, or a builtin, which is trained first."""
    from finetune.models import loading
    from finetune.pipeline import runner
    from finetune.pipeline.runs import Run

    model, _, revision = name.partition("@")
    asked = {"id": model, "revision": revision or None}
    try:
        recipe = Recipe.model_validate({"name": "base", "model": asked, "data": [{"source": "pydoc"}]})
    except ValueError as error:
        raise InputError(f"{name} is not a run, a folder or a base: {str(error).splitlines()[2].strip()}") from None
    store = Store(artifacts, scratch)
    ctx = Context(store.scratch, recipe.runtime, recipe.tracking, say=screen.say, bar=screen.bar)
    runner.run(recipe, store, ctx, Run(store.artifacts, "base", "", (), "0" * 8, write=False), until="base")
    step = next(s for s in runner.plan(recipe, store) if s.stage.name == "base")
    assert step.folder is not None  # noqa: S101 - it was built
    weights = loading.ensure_base(recipe.model, step.folder, ctx)
    with folder_voice(weights, screen) as voice:
        yield voice


def open_voice(name: str, artifacts: Path, scratch: Path, screen: Screen) -> AbstractContextManager[Voice]:
    """Load the model of `name`: RECIPE[@RUN], the folder of a model, or a base. Raises InputError."""
    is_base = name.startswith("builtin:") or re.fullmatch(HUB_BASE, name) is not None
    if is_base and not Path(name).is_dir() and not name.partition("@")[0].endswith((".yaml", ".yml")):
        return base_voice(name, artifacts, scratch, screen)
    folder = model_folder(name)
    return folder_voice(folder, screen) if folder else run_voice(name, artifacts, scratch, screen)
