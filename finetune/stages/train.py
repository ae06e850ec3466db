"""QLoRA fine-tuning through TRL: packed rows in, an adapter out. Resumes from its own checkpoints.

With `train: null` the adapter is one that any tool has made: lora/imported.py checks and copies it. Without one it is
new, for preference training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.context import Context
from finetune.metrics import Headline, TrainMetrics
from finetune.recipe import Lora, Model, Quantization, Recipe, Section, Train
from finetune.utils.files import read_json

if TYPE_CHECKING:
    import pyarrow as pa

CHECKPOINT_FROM_PARAMETERS = 500_000_000


class Spec(Section):
    """Settings that determine the adapter, apart from rows and base."""

    seed: int
    model: Model
    lora: Lora
    quantization: Quantization | None
    train: Train | None


def spec(recipe: Recipe) -> Spec:
    """Never off: without a train section the stage imports the adapter that lora.start_from names."""
    return Spec(
        seed=recipe.seed,
        model=recipe.model,
        lora=recipe.lora,
        quantization=recipe.quantization,
        train=recipe.train,
    )


def fingerprint(spec: Spec) -> Mapping[str, object]:
    """The earlier adapter that training continues from; the base's files and the rows are inputs."""
    from finetune.lora import resume as lora_resume

    return lora_resume.fingerprint(spec.lora)


def run(spec: Spec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> TrainMetrics:
    """Train until the recipe's steps are done; a stop signal leaves a checkpoint and raises Stopped."""
    import os

    from finetune.lora import config as lora_config
    from finetune.lora import fused_linear
    from finetune.lora import resume as lora_resume
    from finetune.models import attention, loading, new_tokens
    from finetune.models import compile as models_compile
    from finetune.models.device import pick_device
    from finetune.tokenization.token_rows import read_rendered, read_token_rows
    from finetune.train import cpu_precision
    from finetune.train import trainer as train_trainer
    from finetune.train.arguments import Job
    from finetune.utils import runtime

    if spec.train is None:
        return import_adapter(spec, inputs, out, ctx)
    lora_config.check_targets(spec.lora, inputs["base"], spec.model.trust_remote_code)
    start = lora_resume.folder_of(spec.lora, ctx)
    if start is not None:
        lora_resume.check(spec.lora, start, inputs["base"], spec.model.id, spec.model.trust_remote_code)
    device = pick_device(ctx.device)
    precision, why = cpu_precision.decide(spec.train.precision, device, inputs["base"], out / "checkpoints", ctx)
    ctx.say(f"train: {precision} on {device}: {why}")
    packed = inputs["pack"] / "packed.parquet"
    rows = packed if packed.exists() else read_rendered(inputs["render"] / "train.parquet")
    template = json.loads((inputs["render"] / "template" / "template.json").read_text(encoding="utf-8"))
    tokenizer = loading.load_tokenizer(inputs["base"])
    tokenizer.pad_token = template["pad_token"]
    remote_code = spec.model.trust_remote_code

    def say(line: str) -> None:
        ctx.say(f"train: {line}")

    attending = attention.choose(device, packed.exists(), precision, inputs["base"], say, trust_remote_code=remote_code)
    varlen = attention.is_varlen(attending)
    policy, micro, worth_fusing, compiled = _decide(spec, inputs["base"], rows, device, ctx, varlen=varlen)
    base = loading.load_base(spec.model, inputs["base"], ctx, spec.quantization, precision, device, attending)
    models_compile.speed_up(base, ctx, compiled)
    settings = spec.train
    held_out = read_token_rows(inputs["render"] / "eval.parquet", settings.eval_rows) if settings.eval_steps else ()
    job = Job(
        seed=spec.seed,
        lora=spec.lora,
        train=spec.train,
        precision=precision,
        device=device,
        checkpointing=policy,
        micro_batch_rows=micro,
        checkpoints=out / "checkpoints",
        metrics_file=out / "metrics.jsonl",
        documents=inputs["pack"] / "row_ids.parquet" if packed.exists() else inputs["render"] / "train.parquet",
        held_out=held_out,
        start=start,
        tokens=new_tokens.read_new_tokens(inputs["base"]),
        fused_adapters=fused_linear.wanted(ctx.runtime.fused_adapters, precision, os.environ, worth=worth_fusing),
    )
    with runtime.fitting(inputs["base"], device):
        result = train_trainer.train(job, base, tokenizer, rows, ctx)
    if ctx.rank == 0:
        pinned = json.loads((inputs["base"] / "base.json").read_text(encoding="utf-8"))
        train_trainer.save_adapter(result.model, out / "adapter", pinned["id"], pinned["revision"], result.sharded)
        _add_template(inputs["render"] / "template", inputs["base"], out / "adapter", template["pad_token"])
    metrics: TrainMetrics = {
        "loss": result.loss,
        "first_loss": result.first_loss,
        "steps": result.steps,
        "epochs": result.epochs,
        "tokens": result.tokens,
        "tokens_per_second": result.tokens_per_second,
        "peak_memory_bytes": result.peak_memory_bytes,
        "trainable_parameters": result.trainable_parameters,
        "precision": precision,
        "attention": attending,
        "fused_adapters": job.fused_adapters,
        "compiled": models_compile.is_compiled(base),
        "device": result.device_name,
        "batch_rows": spec.train.batch_rows,
        "micro_batch_rows": result.micro_batch_rows,
        "checkpointing": policy,
        "processes": ctx.world,
        "resumed_from_steps": result.resumed_from,
        **result.held_out,
    }
    return {**metrics, "shared_before": list(result.before)} if result.before else metrics


def headline(m: TrainMetrics) -> Headline:
    """Return the row of this stage in a table of stages."""
    if "imported" in m:
        return Headline(f"imported {m['imported']}")
    return Headline(f"loss {m['first_loss']:.3g} → {m['loss']:.3g}, {m['tokens_per_second']:,.0f} tokens/s")


def import_adapter(spec: Spec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> TrainMetrics:
    """Copy the adapter that lora.start_from names, once it is proved to fit the base and the rendered template."""
    from finetune.lora import imported
    from finetune.lora import resume as lora_resume

    start = lora_resume.folder_of(spec.lora, ctx)
    if start is None:
        return _zero_adapter(spec, inputs, out, ctx)
    model = spec.model
    lora_resume.require_same(spec.lora, start, inputs["base"], model.id, model.trust_remote_code, importing=True)
    template = inputs["render"] / "template" if "render" in inputs else None
    if template is not None:
        imported.require_same_tokens(start, inputs["base"], ctx.say)
        imported.require_same_template(start, inputs["base"], template)
    if ctx.rank != 0:
        return {}
    adapter = out / "adapter"
    counts = imported.copy_adapter(start, inputs["base"], adapter)
    if template is not None:
        facts = read_json(template / "template.json")
        _add_template(template, inputs["base"], adapter, facts["pad_token"])
    else:
        imported.copy_tokenizer(start, inputs["base"], adapter)
    ctx.say(f"train: imported the adapter {spec.lora.start_from}; nothing was trained")
    return {"imported": str(spec.lora.start_from).removeprefix("folder:"), **counts}


def _zero_adapter(spec: Spec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> TrainMetrics:
    """An adapter that changes nothing: what preference training begins from in a recipe without SFT."""
    from finetune.lora import config as lora_config
    from finetune.lora import fresh

    model = spec.model
    lora_config.check_targets(spec.lora, inputs["base"], model.trust_remote_code)
    if ctx.rank != 0:
        return {}
    counts = fresh.write_zero_adapter(spec.lora, inputs["base"], out / "adapter", spec.seed, model.trust_remote_code)
    if "render" in inputs:
        template = inputs["render"] / "template"
        _add_template(template, inputs["base"], out / "adapter", read_json(template / "template.json")["pad_token"])
    ctx.say("train: train is null and lora.start_from too: preference training begins with a new adapter")
    return {"imported": "nothing: a new adapter", **counts}


def _decide(
    spec: Spec, base: Path, rows: Path | pa.Table, device: str, ctx: Context, *, varlen: bool
) -> tuple[str, int | None, bool, bool]:
    """The checkpointing policy, the rows at once (None: as runtime has it), whether fused adapters are faster, and
    compiled layers.

    On a GPU what is `auto` becomes the fastest that fits its free memory; a CPU recomputes for large bases only.
    """
    from finetune.estimate.choice import Options, device_like, this_gpu
    from finetune.estimate.memory import Training
    from finetune.estimate.shapes import shapes_in
    from finetune.train import batch

    assert spec.train is not None  # noqa: S101 - run() imports an adapter otherwise
    asked = ctx.runtime.checkpointing
    shapes = shapes_in(base)
    if device == "cpu" or shapes is None:
        large = read_json(base / "base.json")["parameters"] >= CHECKPOINT_FROM_PARAMETERS
        return (("full" if large else "none") if asked == "auto" else asked), None, False, ctx.runtime.compile is True
    run = Training(
        lora=spec.lora,
        quantization=spec.quantization,
        train=spec.train,
        runtime=ctx.runtime,
        packed=isinstance(rows, Path),
        row_tokens=batch.longest_row(rows),
    )
    gpu = this_gpu(device, ctx.world)
    options = Options(shapes, run, ctx.world)
    choice = options.best(device_like(*gpu), varlen=varlen)
    ctx.say(f"train: {choice.describe()}")
    compiled = options.worth_compiling(choice, batch.total_steps(batch.count_rows(rows), spec.train))
    return choice.policy, choice.rows, options.worth_fusing(choice), compiled


def _add_template(template: Path, base: Path, adapter: Path, pad_token: str) -> None:
    """The tokenizer and the template that were trained travel with the adapter."""
    from finetune.models import loading

    loading.copy_tokenizer(base, adapter)
    loading.set_pad_token(adapter, pad_token)
    (adapter / "chat_template.jinja").write_bytes((template / "inference.jinja").read_bytes())
    target = adapter / "template"
    target.mkdir(exist_ok=True)
    for file in sorted(template.iterdir()):
        (target / file.name).write_bytes(file.read_bytes())
