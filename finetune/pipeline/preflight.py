"""Checks before the first stage is built: access, write permission, disk space, GPU memory."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from finetune.errors import FinetuneError, GateRefused, InputError
from finetune.estimate import memory as estimate_memory
from finetune.estimate.choice import Options, device_like
from finetune.estimate.shapes import Shapes, read_config, read_known_modules, read_shapes
from finetune.eval import answer_metrics, lm_eval
from finetune.gguf import llama_cpp
from finetune.lora import config as lora_config
from finetune.lora import start as lora_start
from finetune.models import loading, quantized_cache
from finetune.models.device import pick_device
from finetune.models.inventory import read_inventory, why_not_trained
from finetune.pipeline import run_view
from finetune.pipeline.recipe_checks import base_problem, refuse_tokenizer, rule_problem
from finetune.pipeline.runner import Step
from finetune.pipeline.store import Store
from finetune.quantized import formats
from finetune.recipe import HubSource, Recipe
from finetune.recipe.keys import key_form
from finetune.recipe.load import LoadedRecipe
from finetune.train import batch, distributed, tracking
from finetune.train.batch import batch_shape
from finetune.utils.files import read_json

NEEDS_WEIGHTS = ("train", "align", "evaluate", "certify")
LARGEST_ON_CPU = 1_000_000_000  # parameters; above that one step takes minutes without a GPU
DURABLE_SLACK = 500_000_000  # bytes: rows, packed data, reports


def check(
    recipe: Recipe, steps: Sequence[Step], world: int = 1, *, force: bool = False, scratch: Path | None = None
) -> list[str]:
    """Refuse a run that cannot succeed.

    Returns notes on checks that were skipped, and on those that failed but were ignored because of `force`.

    `steps` is the plan up to the requested stage; `scratch` holds the Hub's files (None: no network access).
    Raises InputError (no access, no tracker), GateRefused (no GPU for this size, or one that is too small).
    """
    to_build = {s.stage.name for s in steps if s.status not in ("off", "done")}
    notes = _check_access(recipe, to_build)
    base = next(s for s in steps if s.stage.name == "base")
    shapes = read_shapes(recipe, base.folder if base.manifest else None)
    if shapes is not None and to_build & set(NEEDS_WEIGHTS if recipe.train else ("align", "evaluate")):
        _check_device(recipe, shapes)
    if "filter" in to_build and recipe.filter:
        for lack in filter(None, map(rule_problem, recipe.filter.rules)):
            raise InputError(f"filter.rules: {lack}")
    if "export" in to_build and recipe.export:
        llama_cpp.require_quantizer(recipe.export.gguf)
        if why := formats.missing(recipe.export.hf):
            raise InputError(f"export.hf: {why}")
    if "evaluate" in to_build and recipe.evaluate and recipe.evaluate.tasks:
        lm_eval.check(recipe.evaluate.tasks, recipe.evaluate.task_path)
    if "evaluate" in to_build and recipe.evaluate and (lacks := answer_metrics.missing(recipe.evaluate.metrics)):
        raise InputError("\n".join(f"evaluate.metrics: {why}" for why in lacks))
    notes += _check_writers(recipe, to_build)
    if "train" in to_build:
        check_adapter(recipe, base.folder if base.manifest else None, scratch)
    trains = {"train": recipe.train is not None, "align": recipe.preference is not None}
    if to_build & {stage for stage, on in trains.items() if on}:
        pinned = base.folder if base.manifest else None
        notes += _check_training(recipe, shapes, world, pinned, force=force)
    return notes


def _check_writers(recipe: Recipe, to_build: set[str]) -> list[str]:
    """The models that write and judge can be reached, or loaded here; notes on names that an endpoint does not list."""
    from finetune.synth.forecast import check_endpoint, check_room, generation

    if "generate" in to_build:
        generation(recipe, None)  # refuses limits that the rows exceed
    judge = recipe.evaluate.judge if recipe.evaluate else None
    asked = [("generate", "generate.model", recipe.generate), ("evaluate", "evaluate.judge.model", judge)]
    notes = []
    for stage, field, section in asked:
        if stage in to_build and section is not None:
            check_room(section.model, f"{field}.local", pick_device(recipe.runtime.device))
            notes += [check_endpoint(section.model, f"{field}.endpoint")]
    return [*filter(None, notes)]


def check_adapter(recipe: Recipe, base: Path | None, scratch: Path | None = None, *, load: bool = True) -> None:
    """Refuse a base that the recipe cannot use, or a lora section that does not fit the base or lora.start_from.

    `base` is the finished stage's folder; without one the check is made if the modules are known, otherwise after the
    base stage. `scratch`: folder for files of the Hub; None for no network access. Without `load` the targets are
    compared with the known modules only, not with the model on the meta device, for which torch is imported.
    """
    if (config := read_config(recipe, base)) is not None and (why := base_problem(recipe, config)):
        raise InputError(why)
    refuse_tokenizer(recipe, base)
    refuse_start(recipe, base, scratch)
    if base is not None and recipe.export and recipe.merge and (counts := read_inventory(base)):
        widths = {f"{name}.weight": inner for name, (inner, _) in counts.quantized.items()}
        if why := next(formats.width_problems(widths, recipe.export.hf), None):
            raise InputError(f"export.hf: {why}")
    if recipe.train is None and recipe.preference is None:
        return
    if base is not None and (why := why_not_trained(base, quantized=recipe.quantization is not None)):
        raise InputError(f"{recipe.model.id}: {why}")
    if recipe.train is None and recipe.lora.start_from is not None:
        return  # the adapter decides what is trained
    if base is not None and load:
        lora_config.check_targets(recipe.lora, base, recipe.model.trust_remote_code)
    elif (modules := read_known_modules(recipe, base)) is not None:
        lora_config.check_modules(recipe.lora, modules)


def refuse_start(recipe: Recipe, base: Path | None, scratch: Path | None = None) -> None:
    """Raise InputError with a line for each of `start_problems`."""
    if problems := start_problems(recipe, base, scratch):
        raise InputError("\n".join(f"{'.'.join(field)}: {why}" for field, why in problems))


def start_problems(recipe: Recipe, base: Path | None, scratch: Path | None = None) -> list[lora_start.Problem]:
    """Return the differences of lora.start_from's adapter from the recipe and its base, as far as both are known.

    Raises InputError if the adapter itself cannot be read.
    """
    adapter = _start(recipe, scratch)
    if adapter is None:
        return []
    config, shapes = read_config(recipe, base), read_shapes(recipe, base)
    sizes = shapes.linears() if shapes else None
    modules, tokens = read_known_modules(recipe, base), recipe.tokens is not None
    known = lora_start.Base(recipe.model.id, modules, config, sizes, tokens)
    return lora_start.problems(recipe.lora, adapter, known, importing=recipe.train is None)


def start_mismatches(loaded: LoadedRecipe, store: Store) -> list[str]:
    """Return a message with file and line for each mismatch of lora.start_from; no network access."""
    if loaded.recipe.lora.start_from is None:
        return []
    try:
        problems = start_problems(run_view.with_start(loaded.recipe, store), None)
    except InputError as error:
        problems = [(("lora", "start_from"), str(error).removeprefix("lora.start_from: "))]
    return loaded.located(problems)


def _start(recipe: Recipe, scratch: Path | None) -> lora_start.Adapter | None:
    lora = recipe.lora
    if lora.start_folder is not None:
        return lora_start.read_adapter(lora.start_folder)
    if lora.start_from is None or lora.start_run is not None or scratch is None:
        return None
    from finetune.hub.client import read_adapter_files

    name, _, revision = lora.start_from.partition("@")
    try:
        files = read_adapter_files(name, revision or None, scratch)
    except InputError:
        raise
    except FinetuneError:
        return None  # offline: the train stage compares after its download
    return lora_start.Adapter(name, *files)


def more_epochs(recipe: Recipe, steps: Sequence[Step], store: Store) -> str | None:
    """Return a hint if training starts from the base although a finished run of this recipe had fewer steps."""
    train = next(s for s in steps if s.stage.name == "train")
    if train.status in ("off", "done") or recipe.train is None or recipe.lora.start_from is not None:
        return None
    try:
        earlier = run_view.finished(store, recipe.name, lambda _: ("train",))
    except InputError:
        return None
    record = earlier["stages"]["train"]
    manifest = store.find(Path(record["path"])) if record["status"] == "done" else None
    if manifest is None or train.spec is None:
        return None
    was, now = manifest.spec, key_form(train.spec)
    before, after = was.get("train") or {}, now.get("train") or {}
    fields = [n for n in ("epochs", "max_steps") if (after.get(n) or 0) > (before.get(n) or 0)]
    if not fields or any(was.get(n) != now.get(n) for n in ("model", "lora")):
        return None
    changed = ", ".join(f"train.{n} was {before.get(n)}, is {after.get(n)}" for n in fields)
    return (
        f"train: starts from the base again ({changed}); to continue the finished adapter instead, set "
        f"lora.start_from: {recipe.name}@{earlier['run']}"
    )


def _check_training(
    recipe: Recipe, shapes: Shapes | None, world: int, base: Path | None = None, *, force: bool
) -> list[str]:
    """The batch can be shared out, the GPU is large enough, the trackers are there. `base` is the folder of a finished
    base stage, which knows whether rows can be packed.
    """
    notes = []
    if world > 1:
        distributed.check_devices(recipe.runtime.device, world, os.environ)
    if recipe.train is not None:
        packed = estimate_memory.Training.of(recipe, base).packed
        batch_shape(recipe.training.batch_rows, recipe.runtime.micro_batch_rows, world, packed)
    if recipe.preference is not None:
        _check_alignment(recipe, world)
    if recipe.runtime.checkpointing == "offload" and pick_device(recipe.runtime.device) == "cpu":
        raise InputError(batch.OFFLOAD_ON_CPU)
    if shapes is not None and (small := _too_small(recipe, shapes, world, base)):
        if not force:
            raise GateRefused(f"{small}. --force continues anyway")
        notes.append(f"{small}; continuing because of --force")
    if recipe.tracking.wandb:
        mode, why = tracking.wandb_mode(os.environ, tracking.has_wandb_key())
        notes += [f"tracking: W&B is {mode}: {why}"] if mode != "online" else []
    if recipe.tracking.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise InputError("tracking.tensorboard: tensorboard is not installed (pip install tensorboard)")
    for name in recipe.tracking.report_to:
        tracking.integration(name)
    return notes


def _check_alignment(recipe: Recipe, world: int) -> None:
    """The pairs of a step can be shared out, and not under FSDP or DeepSpeed, which take the reference apart."""
    from finetune.preference.batches import batch_of

    assert recipe.preference is not None  # noqa: S101
    if world > 1 and (asked := distributed.asked(os.environ)):
        raise InputError(
            f"preference: {asked} was asked for, and preference training runs on one process or under DDP; use "
            "recipes/accelerate/ddp.yaml (--processes N)"
        )
    asked_pairs = recipe.preference
    batch_of(asked_pairs.batch_pairs, recipe.runtime.micro_batch_rows, world, asked_pairs.method, asked_pairs.loss_type)


def check_folders(recipe: Recipe, steps: Sequence[Step], store: Store) -> None:
    """Check that both roots are writable and have space for the remaining output; on one disk, for both together."""
    base = next(s for s in steps if s.stage.name == "base")
    pinned = base.folder if base.manifest else None
    shapes = read_shapes(recipe, pinned)
    to_build = {s.stage.name for s in steps if s.status not in ("off", "done")}
    needed = dict.fromkeys(("download", "quantized_copy", "merged", "export", "adapter", "training_checkpoints"), 0)
    needed |= estimate_memory.disk(shapes, recipe) if shapes else {}
    loads = bool(to_build & set(NEEDS_WEIGHTS))
    trains = ({"train"} if recipe.train is not None else set()) | {"align"}
    durable = DURABLE_SLACK + needed["adapter"] * len(to_build & {"train", "align"})
    durable += needed["training_checkpoints"] if to_build & trains else 0  # one after the other
    local = sum(needed[part] for part, stage in (("merged", "merge"), ("export", "export")) if stage in to_build)
    downloads = loads or "merge" in to_build
    local += needed["download"] if downloads and not is_downloaded(recipe, pinned, store.scratch) else 0
    local += needed["quantized_copy"] if loads and not (pinned and quantized_cache.exists(store.scratch, pinned)) else 0
    disks: dict[int, list[tuple[Path, int]]] = {}
    for root, bytes_needed in ((store.artifacts, durable), (store.scratch, local)):
        _check_writable(root)
        disks.setdefault(root.stat().st_dev, []).append((root, bytes_needed))
    for roots in disks.values():
        free, together = shutil.disk_usage(roots[0][0]).free, sum(count for _, count in roots)
        if free < together:
            names = " and ".join(str(root) for root, _ in roots) + (", on one disk" if len(roots) > 1 else "")
            raise FinetuneError(
                f"{names}: {free / 1e9:.1f} GB free, about {together / 1e9:.1f} GB needed; free some, or choose "
                "another folder with --artifacts or --scratch"
            )


def is_downloaded(recipe: Recipe, pinned: Path | None, scratch: Path) -> bool:
    """Return whether the cache has all weights of a Hub base, at the commit pinned by the base stage or named in the
    recipe.
    """
    if recipe.model.kind != "hub":
        return True
    revision = read_json(pinned / "base.json")["revision"] if pinned else recipe.model.revision
    folder = scratch / "hub" / f"models--{recipe.model.id.replace('/', '--')}" / "snapshots" / str(revision)
    return bool(loading.weight_files(folder))


def _check_writable(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise FinetuneError(f"{root}: cannot be written: {error.strerror}; choose another folder") from None


def _check_access(recipe: Recipe, to_build: set[str]) -> list[str]:
    from finetune.hub import client as hub_client

    notes = []
    if recipe.model.kind == "hub" and "base" in to_build:
        notes.append(hub_client.check_read(recipe.model.id, "model"))
    read = [*recipe.data, *(recipe.eval_data or [])] if "ingest" in to_build else []
    if "generate" in to_build and recipe.generate:
        read += recipe.generate.seeds
        local = recipe.generate.model.local
        notes += [hub_client.check_read(local.id, "model")] if local is not None and local.kind == "hub" else []
    if "pairs" in to_build and recipe.preference:
        read += [*recipe.preference.data, *(recipe.preference.eval_data or [])]
    names = [s.id for s in read if isinstance(s, HubSource)]
    notes += [hub_client.check_read(name, "dataset") for name in dict.fromkeys(names)]
    if recipe.publish.repo and "train" in to_build:
        notes.append(hub_client.check_write(recipe.publish.repo))
    return [n for n in notes if n]


def _check_device(recipe: Recipe, shapes: Shapes) -> None:
    if shapes.parameters < LARGEST_ON_CPU or pick_device(recipe.runtime.device) != "cpu":
        return
    why = "evaluating it would take days; set evaluate: null (certify and merge work without a GPU)"
    if recipe.train is not None or recipe.preference is not None:
        why = (
            "training would take weeks. Run the data stages here with --until pack, the whole on a GPU (Colab's free "
            "T4 fits a 7B), or the default recipe: make sft"
        )
    size = f"{shapes.parameters / 1e9:.1f} billion parameters"
    raise GateRefused(f"{recipe.model.id} has {size} and this machine has no GPU: {why}")


def _too_small(recipe: Recipe, shapes: Shapes, world: int, base: Path | None) -> str | None:
    """Return why the GPU to train on is too small; None if it is large enough or there is none."""
    if recipe.runtime.device == "cpu" or shapes.parameters < LARGEST_ON_CPU:
        return None
    import torch

    if pick_device(recipe.runtime.device) == "cpu":
        return None
    name, ampere = torch.cuda.get_device_name(), torch.cuda.get_device_capability() >= (8, 0)
    return memory_problem(recipe, shapes, world, *torch.cuda.mem_get_info(), name=name, ampere=ampere, base=base)


def memory_problem(
    recipe: Recipe,
    shapes: Shapes,
    world: int,
    free: int,
    total: int,
    name: str = "",
    *,
    ampere: bool = True,
    base: Path | None = None,
) -> str | None:
    """Return a message if even the smallest training settings need more bytes than a GPU with `total` bytes has, of
    which `free` are unused.
    """
    held = total - free
    # This process already holds the context that the prediction counts as the device's own.
    room = min(total, free + estimate_memory.CONTEXT_BYTES)
    device = device_like(name, room, ampere)
    trainings = [("training", "row", "render", estimate_memory.Training.of(recipe, base))] if recipe.train else []
    if recipe.preference is not None:
        trainings.append(("aligning", "pair", "preference", estimate_memory.Training.of_preference(recipe)))
    in_use = f" ({held / 1e9:.1f} GB are in use: stop the processes that hold them)"
    others = in_use if held > 2 * estimate_memory.CONTEXT_BYTES else ""
    for what, unit, section, run in trainings:
        choice = Options(shapes, run, world).best(device)
        if not choice.fits:
            return (
                f"{what} {recipe.model.id} takes at least {choice.total / 1e9:.1f} GB of GPU memory ({choice.rows} "
                f"{unit}{'s' if choice.rows > 1 else ''} at once, checkpointing {choice.policy}) and there are "
                f"{choice.budget_bytes / 1e9:.1f}{others}; lower {section}.max_length_tokens or lora.r, or leave "
                "runtime.micro_batch_rows and runtime.checkpointing to auto (`finetune plan` shows what each takes)"
            )
    return None
