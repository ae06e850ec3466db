"""Plan and build the stages of a recipe in order."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from finetune.context import Context
from finetune.engine.kept import Kept
from finetune.errors import (
    KEPT,
    FinetuneError,
    GateRefused,
    InputError,
    Stopped,
    disk_full,
    has_no_memory,
    memory_full,
)
from finetune.pipeline.leases import Lease, is_being_built
from finetune.pipeline.run_view import with_start
from finetune.pipeline.runs import Run, StageRecord
from finetune.pipeline.stage_list import STAGES, Stage, needs_of, spec_of
from finetune.pipeline.store import BUILDING, Hashed, Manifest, Store, is_full, make_key, output_digest
from finetune.recipe import Recipe
from finetune.recipe.keys import key_form
from finetune.utils import links
from finetune.utils.files import read_json
from finetune.utils.limits import memory_is_short
from finetune.utils.runtime import describe_environment, peak_memory_bytes

NO_SPACE = ("No space left on device", "os error 28", "PytorchStreamWriter failed writing file")


@dataclass(frozen=True)
class Output:
    """A finished stage's folder and its digest, which enters the keys of later stages."""

    folder: Path
    digest: str


@dataclass(frozen=True)
class Step:
    """A stage of one recipe: `status` is off, done, partial, missing, or unknown (an input is not there yet)."""

    stage: Stage
    status: str
    spec: BaseModel | None = None
    key: str = ""
    folder: Path | None = None
    manifest: Manifest | None = None
    inputs: Mapping[str, Output] = dataclasses.field(default_factory=dict)
    fingerprint: Mapping[str, object] = dataclasses.field(default_factory=dict)
    older_version: int | None = None  # newest earlier version of the stage with output in the store


def locate(stage: Stage, recipe: Recipe, store: Store, outputs: Mapping[str, Output]) -> Step:
    """Return the status of one stage, given the outputs of the stages before it."""
    spec = spec_of(stage, recipe)
    if spec is None:
        return Step(stage, "off")
    needs = (*needs_of(stage, recipe), *stage.also(spec))
    if any(need not in outputs for need in needs):
        return Step(stage, "unknown", spec)
    inputs = {need: outputs[need] for need in needs}
    fingerprint = stage.fingerprint(spec)
    digests = {name: output.digest for name, output in inputs.items()}
    form = key_form(spec)
    key = make_key(stage.name, stage.version, form, fingerprint, digests)
    folder = store.folder(stage.name, key, large=stage.large)
    manifest = store.find(folder)
    links.require_inside(folder, store.root(folder))
    status = "done" if manifest else "partial" if folder.is_dir() and any(folder.iterdir()) else "missing"
    older = None if manifest else store.older_version(folder.parent, stage.version, form, digests)
    return Step(stage, status, spec, key, folder, manifest, inputs, fingerprint, older)


def plan(recipe: Recipe, store: Store) -> list[Step]:
    """Return every stage with its status, without building. A stage after an unbuilt one is unknown, as is one whose
    Hub revision cannot be resolved now. Raises InputError for a missing file.
    """
    recipe = with_start(recipe, store)
    outputs: dict[str, Output] = {}
    steps = []
    for stage in STAGES:
        try:
            step = locate(stage, recipe, store, outputs)
        except (InputError, GateRefused):
            raise
        except FinetuneError:
            step = Step(stage, "unknown", spec_of(stage, recipe))
        _add_output(outputs, step)
        steps.append(step)
    return steps


def _add_output(outputs: dict[str, Output], step: Step) -> None:
    stage = step.stage
    if step.status == "off" and stage.needs and stage.needs[0] in outputs:
        outputs[stage.name] = outputs[stage.needs[0]]
    elif step.manifest and step.folder:
        outputs[stage.name] = Output(step.folder, step.manifest.digest)
    if stage.replaces and step.status != "off":
        outputs.pop(stage.replaces, None)  # what needs it must not be given it before this stage is built
        if stage.name in outputs:
            outputs[stage.replaces] = outputs[stage.name]


def run(
    recipe: Recipe,
    store: Store,
    ctx: Context,
    record: Run,
    *,
    until: str | None = None,
    fresh: bool = False,
    before_building: Callable[[list[Step]], None] = lambda steps: None,
    after_building: Callable[[Step], None] = lambda step: None,
) -> list[Step]:
    """Build the missing stages up to `until`.

    `before_building` is called once, with the plan, before the first stage is built, and `after_building` with every
    stage that was built: either may refuse.
    Raises GateRefused, InputError, FinetuneError or Stopped; the run's record then has the stage and the reason.
    """
    recipe = with_start(recipe, store, ctx.say)
    outputs: dict[str, Output] = {}
    steps: list[Step] = []
    checked = False
    for stage in STAGES:
        ctx.stop.check()
        step = locate(stage, recipe, store, outputs)
        if step.status not in ("off", "done"):
            if not checked:
                before_building(plan(recipe, store))
                checked = True
            step = _build_recorded(step, recipe, store, ctx, record, fresh)
            after_building(step)
        else:
            record.note(StageRecord.of(step.stage.name, step.status, step.folder, step.manifest))
        _add_output(outputs, step)
        steps.append(step)
        if stage.name == until or (ctx.rank and not any(s.collective for s in STAGES[len(steps) :])):
            break  # ranks above 0 are done after the last collective stage
    return steps


def _build_recorded(step: Step, recipe: Recipe, store: Store, ctx: Context, record: Run, fresh: bool) -> Step:
    name = step.stage.name
    record.note(StageRecord(name, "partial", step.folder, step.key))
    record.save()  # if the process is killed, the record shows its stage
    try:
        done = build(step, recipe, store, ctx, fresh=fresh)
    except (Stopped, KeyboardInterrupt):
        record.note(StageRecord(name, "partial", step.folder, step.key))
        raise
    except Exception as error:
        status, reported = _failure(error, step, ctx)
        words = str(reported) if isinstance(reported, FinetuneError) else f"{type(reported).__name__}: {reported}"
        record.note(StageRecord(name, status, step.folder, step.key, message=words if status != "partial" else ""))
        if reported is error:
            raise
        raise reported from error
    record.note(StageRecord.of(name, "done", done.folder, done.manifest))
    return done


def _failure(error: Exception, step: Step, ctx: Context) -> tuple[str, Exception]:
    """Return the recorded status of a failure and the error to raise; a bug is raised unchanged, with its traceback."""
    if isinstance(error, GateRefused):
        return "refused", error
    if ctx.stop.signal_number:  # a library turned the interruption into its own error
        return "partial", Stopped(ctx.stop.signal_number)
    if isinstance(error, FinetuneError):
        return "failed", error
    name = step.stage.name
    if _has_no_space(error) or (
        step.folder and is_full(step.folder)
    ):  # torch and safetensors have their own messages for it
        return "failed", disk_full(f"{name}: {step.folder}")
    if has_no_memory(error) or memory_is_short():
        return "failed", memory_full(name)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return "failed", FinetuneError(f"{name}: {where}{error.strerror or error} {KEPT}")
    return "failed", error


def _has_no_space(error: BaseException | None) -> bool:
    """Return whether an error is caused by a full disk or quota; C++ and Rust libraries report it only as text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(words in str(error) for words in NO_SPACE):
            return True
        error = error.__cause__ or error.__context__
    return False


def build(step: Step, recipe: Recipe, store: Store, ctx: Context, *, fresh: bool = False) -> Step:
    """Build one stage, or wait for another process that is building it; return the finished step."""
    assert step.folder is not None and step.spec is not None  # noqa: S101 - locate() gave both, or nothing is built
    stage, folder = step.stage, step.folder
    if stage.collective:
        _refuse_stale_partials(step, recipe, store, ctx, fresh)
    if ctx.rank != 0:
        if stage.collective and _begins(folder, store, ctx):
            stage.run(step.spec, {n: o.folder for n, o in step.inputs.items()}, folder, ctx)
        return dataclasses.replace(step, status="done", manifest=_wait_for(folder, store, ctx))
    with store.lease(folder, lambda line: ctx.say(f"{stage.name}: {line}"), ctx.stop.check) as lease:
        manifest = store.find(folder)  # the previous owner may have finished it
        if manifest is None:
            lease.on_lost, ctx.stop.require_own = ctx.stop.lose, lease.require
            try:
                manifest = _build_leased(step, recipe, store, ctx.heard_by(lease.say), fresh, lease)
            finally:
                lease.on_lost, ctx.stop.require_own = (lambda error: None), (lambda: None)
    return dataclasses.replace(step, status="done", manifest=manifest)


def _build_leased(step: Step, recipe: Recipe, store: Store, ctx: Context, fresh: bool, lease: Lease) -> Manifest:
    import pyarrow.parquet as pq

    stage, folder = step.stage, step.folder
    assert folder is not None and step.spec is not None  # noqa: S101
    _verify_inputs(step, store)
    if not stage.collective or fresh or not (folder / BUILDING).exists():
        if stage.collective and (lost := sorted(p.parent.name for p in folder.glob("checkpoints/*/COMPLETE"))):
            ctx.say(f"{stage.name}: --fresh removes {', '.join(lost)} in {folder}")
        store.clear(folder, "" if stage.collective or fresh else stage.working)
    digests = {name: output.digest for name, output in step.inputs.items()}
    about: dict[str, Any] = {
        "recipe": recipe.name,
        "stage": stage.name,
        "key": step.key,
        "spec": key_form(step.spec),
        "fingerprint": dict(step.fingerprint),
        "inputs": digests,
        "launch": ctx.launch,
    }
    (folder / BUILDING).write_text(json.dumps(about, sort_keys=True, indent=1), encoding="utf-8")
    if step.older_version:
        ctx.say(
            f"{stage.name}: the artifact in the store is of an earlier version ({step.older_version}) of this stage; "
            f"building version {stage.version}"
        )
    ctx.say(f"{stage.name} …")
    ctx.stop.check()
    start = time.monotonic()
    hashed = Hashed()
    if stage.collective or "train" in stage.needs:
        ctx.engine.close()  # the memory of idle workers is the model's
    engine = ctx.engine if stage.collective or not stage.working else Kept(ctx.engine, folder / stage.working, step.key)
    ctx = dataclasses.replace(ctx, hashed=hashed.note, engine=engine)
    metrics = stage.run(step.spec, {n: o.folder for n, o in step.inputs.items()}, folder, ctx)
    ctx.stop.check()  # a library may have swallowed the interruption
    seconds = time.monotonic() - start
    if stage.fingerprint(step.spec) != step.fingerprint:
        raise FinetuneError(
            f"{stage.name}: a file or Hub revision that it reads changed meanwhile; run again to read the new one"
        )
    rows = {p.relative_to(folder).as_posix(): pq.read_metadata(p).num_rows for p in folder.rglob("*.parquet")}
    files = store.read_files(folder, rows, skip=stage.working, hashed=hashed)
    manifest = Manifest(
        stage=stage.name,
        version=stage.version,
        key=step.key,
        spec=about["spec"],
        fingerprint=dict(step.fingerprint),
        inputs=digests,
        files=files,
        digest=output_digest(files, stage.logs),
        metrics=dict(metrics),
        seconds=round(seconds, 3),
        peak_memory_bytes=peak_memory_bytes(),
        environment=describe_environment(),
    )
    with ctx.stop.at_checks_only():
        lease.require()
        store.commit(folder, manifest)
        if stage.working:
            shutil.rmtree(folder / stage.working, ignore_errors=True)
    return manifest


def _verify_inputs(step: Step, store: Store) -> None:
    """Refuse to build on files that changed after they were committed (a flipped bit, an edited file)."""
    for name, output in step.inputs.items():
        manifest = store.find(output.folder)
        problems = store.verify(output.folder, manifest) if manifest else [f"{output.folder}: no longer complete"]
        if problems:
            raise FinetuneError(
                f"{step.stage.name}: refuses to build on {name}, whose files differ from its manifest: "
                f"{'; '.join(problems[:3])}. Remove {output.folder} and run again: it is then rebuilt"
            )


def _begins(folder: Path, store: Store, ctx: Context) -> bool:
    """Wait until rank 0 of this launch has begun the stage (True), or another run has finished it (False): a rank that
    begins alone would wait for the others until torch's timeout.
    """
    while store.find(folder) is None:
        ctx.stop.check()
        try:
            if json.loads((folder / BUILDING).read_text(encoding="utf-8")).get("launch") == ctx.launch:
                return True
        except (OSError, ValueError, AttributeError):
            pass  # not there yet, being written, or edited
        time.sleep(0.1)
    return False


def _wait_for(folder: Path, store: Store, ctx: Context) -> Manifest:
    """Wait on ranks above 0 for rank 0's build; if rank 0 fails, the launcher ends all ranks."""
    while (manifest := store.find(folder)) is None:
        ctx.stop.check()
        time.sleep(0.25)
    return manifest


def _refuse_stale_partials(step: Step, recipe: Recipe, store: Store, ctx: Context, fresh: bool) -> None:
    """Stop if there is an unfinished training of this recipe under another key, and report what differs."""
    assert step.folder is not None and step.spec is not None  # noqa: S101
    now = key_form(step.spec)
    for building in sorted((store.artifacts / step.stage.name).glob(f"*/{BUILDING}")):
        folder = building.parent
        if links.way_out(building, store.artifacts) is not None:
            continue
        if folder == step.folder or not any(folder.glob("checkpoints/*/COMPLETE")):
            continue
        if store.find(folder) is not None or is_being_built(folder):
            continue
        try:
            was = read_json(building)
            if was.get("recipe") != recipe.name:
                continue
            changes = _differences(was.get("spec", {}), now)
            digests = {name: output.digest for name, output in step.inputs.items()}
            changes += [f"the output of {n}" for n in digests if was.get("inputs", {}).get(n) != digests[n]]
            outside = was.get("fingerprint", {})
            changes += [
                f"what {n} names" for n in {**outside, **step.fingerprint} if outside.get(n) != step.fingerprint.get(n)
            ]
        except (OSError, ValueError, AttributeError, TypeError):
            continue  # cut off or edited: no run can continue it
        if fresh:
            ctx.say(f"{step.stage.name}: leaving the unfinished training in {folder} ({'; '.join(changes)})")
            if ctx.rank == 0:  # printed once; the marker stays, so that undoing the change resumes it
                building.write_text(json.dumps(was | {"recipe": ""}), encoding="utf-8")
            continue
        raise GateRefused(
            f"an unfinished training of {recipe.name} is in {folder}, from another recipe: "
            f"{'; '.join(changes) or 'other code'}. Undo the change to resume it, or add --fresh to start again"
        )


def _differences(was: Mapping[str, Any], now: Mapping[str, Any], at: str = "") -> list[str]:
    lines = []
    for name in sorted({*was, *now}):
        old, new = was.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += _differences(old, new, f"{at}{name}.")
        elif old != new:
            lines.append(f"{at}{name} was {old!r}, is {new!r}")
    return lines
