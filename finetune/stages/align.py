"""Preference training (DPO or KTO): the trained adapter and rendered pairs in, the aligned adapter out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import Field

from finetune.context import Context
from finetune.metrics import AlignMetrics, Headline
from finetune.preference.reference import Objective
from finetune.recipe import Lora, Model, Quantization, Recipe, Train
from finetune.utils import runtime
from finetune.utils.files import read_json, write_bytes, write_json

if TYPE_CHECKING:
    from finetune.models.device import Precision
    from finetune.train.trainer import Result

FIGURES = "preference.json"
CHECKPOINT_FROM_PARAMETERS = 500_000_000


class Spec(Objective):
    """Settings that decide the adapter, beside the pairs, the adapter that it begins from and the base."""

    seed: int
    model: Model
    quantization: Quantization | None
    train: Train
    lora: Annotated[Lora, Field(exclude=True)] = Lora()  # for the memory only: the adapter itself is an input


def spec(recipe: Recipe) -> Spec | None:
    """Off without a preference section. Settings of the optimisation that it lacks are those of the train section."""
    asked = recipe.preference
    if asked is None:
        return None
    return Spec(
        seed=recipe.seed,
        model=recipe.model,
        quantization=recipe.quantization,
        train=recipe.alignment,
        method=asked.method,
        loss=asked.loss_type,
        beta=asked.beta,
        label_smoothing=asked.label_smoothing,
        desirable_weight=asked.desirable_weight,
        undesirable_weight=asked.undesirable_weight,
        lora=recipe.lora,
    )


def fingerprint(spec: Spec) -> Mapping[str, object]:
    """Nothing outside the recipe and the inputs."""
    return {}


def run(spec: Spec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> AlignMetrics:
    """Align the adapter of stage train; a stop signal leaves a checkpoint and raises Stopped.

    Writes adapter/ (as stage train does), metrics.jsonl and preference.json, what the alignment changed.
    """
    from finetune.models import attention, loading
    from finetune.models import compile as models_compile
    from finetune.models.device import pick_device
    from finetune.preference.align import align
    from finetune.train import cpu_precision
    from finetune.train.arguments import Job
    from finetune.train.trainer import save_adapter

    adapter = inputs["train"] / "adapter"
    device = pick_device(ctx.device)
    precision, why = cpu_precision.decide(spec.train.precision, device, inputs["base"], out / "checkpoints", ctx)
    ctx.say(f"align: {spec.method} ({spec.loss}), {precision} on {device}: {why}")
    tokenizer = loading.load_tokenizer(inputs["base"])
    template = adapter / "template" if (adapter / "template").is_dir() else inputs["pairs"] / "template"
    facts = read_json(template / "template.json")
    tokenizer.pad_token = facts["pad_token"]
    remote_code = spec.model.trust_remote_code

    def say(line: str) -> None:
        ctx.say(f"align: {line}")

    attending = attention.choose(device, False, precision, inputs["base"], say, trust_remote_code=remote_code)
    policy, micro = _decide(spec, inputs, device, ctx)
    base = loading.load_base(spec.model, inputs["base"], ctx, spec.quantization, precision, device, attending)
    models_compile.speed_up(base, ctx)
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
        documents=inputs["pairs"] / "train.parquet",
        stage="align",
    )
    with runtime.fitting(inputs["base"], device):
        result = align(job, spec, base, tokenizer, inputs["pairs"] / "train.parquet", adapter, ctx)
        if ctx.rank != 0:
            return {}
        figures = _measure(spec, result, inputs, facts, int(tokenizer.pad_token_id), precision, ctx)
    pinned = read_json(inputs["base"] / "base.json")
    save_adapter(result.model, out / "adapter", pinned["id"], pinned["revision"], result.sharded)
    _copy_beside(adapter, template, out / "adapter")
    write_json(out / FIGURES, figures)
    return {**_trained(spec, result, precision, attending, policy, ctx), **cast("AlignMetrics", figures)}


def headline(m: AlignMetrics) -> Headline:
    """Return the row of this stage in a table of stages."""
    accuracy = ""
    if "accuracy" in m:
        low, high = m["accuracy_interval"]
        accuracy = f", {m['accuracy']:.1%} of held-out pairs ranked correctly ({low:.1%} to {high:.1%})"
    return Headline(f"loss {m['first_loss']:.3g} → {m['loss']:.3g}{accuracy}")


def _decide(spec: Spec, inputs: Mapping[str, Path], device: str, ctx: Context) -> tuple[str, int | None]:
    """The checkpointing policy, and the pairs at once (None: as runtime has it); as stage train decides them."""
    import pyarrow.parquet as pq

    from finetune.estimate.choice import Options, device_like, this_gpu
    from finetune.estimate.memory import Training
    from finetune.estimate.shapes import shapes_in
    from finetune.preference.batches import longest

    asked = ctx.runtime.checkpointing
    shapes = shapes_in(inputs["base"])
    if device == "cpu" or shapes is None:
        large = read_json(inputs["base"] / "base.json")["parameters"] >= CHECKPOINT_FROM_PARAMETERS
        return (("full" if large else "none") if asked == "auto" else asked), None
    run = Training(
        lora=spec.lora,
        quantization=spec.quantization,
        train=spec.train,
        runtime=ctx.runtime,
        packed=False,
        row_tokens=longest(pq.read_table(inputs["pairs"] / "train.parquet"), spec.method),
        sequences=2 if spec.method == "dpo" else 1,
        reference=True,
    )
    choice = Options(shapes, run, ctx.world).best(device_like(*this_gpu(device, ctx.world)))
    ctx.say(f"align: {choice.describe()}")
    return choice.policy, choice.rows


def _measure(
    spec: Spec,
    result: Result,
    inputs: Mapping[str, Path],
    facts: Mapping[str, Any],
    pad_id: int,
    precision: Precision,
    ctx: Context,
) -> dict[str, Any]:
    """Measure what the alignment changed, under the autocast of training."""
    import torch

    from finetune.models.device import DTYPES, autocast
    from finetune.preference import measure
    from finetune.preference.words import words_of
    from finetune.tokenization.token_rows import read_token_rows

    model = result.model.eval()
    dtype = None if precision == "fp32" else getattr(torch, DTYPES[precision])
    held_out = inputs["render"] / "eval.parquet" if "render" in inputs else None
    rows = read_token_rows(held_out, measure.SFT_ROWS) if held_out is not None and held_out.is_file() else []
    with autocast(str(model.device), dtype):
        figures = measure.measure_pairs(model, inputs["pairs"] / "eval.parquet", spec.method, spec.beta, spec.seed, ctx)
        figures |= measure.measure_answers(model, rows, facts, pad_id, spec.seed, ctx)
    for line in words_of(figures):
        ctx.say(f"align: {line}")
    return figures


def _trained(
    spec: Spec, result: Result, precision: str, attention: str, checkpointing: str, ctx: Context
) -> AlignMetrics:
    metrics: AlignMetrics = {
        "method": spec.method,
        "loss_type": spec.loss,
        "loss": result.loss,
        "first_loss": result.first_loss,
        "steps": result.steps,
        "epochs": result.epochs,
        "tokens": result.tokens,
        "tokens_per_second": result.tokens_per_second,
        "peak_memory_bytes": result.peak_memory_bytes,
        "trainable_parameters": result.trainable_parameters,
        "precision": precision,
        "attention": attention,
        "device": result.device_name,
        "batch_pairs": spec.train.batch_rows,
        "micro_batch_pairs": result.micro_batch_rows,
        "checkpointing": checkpointing,
        "processes": ctx.world,
        "resumed_from_steps": result.resumed_from,
    }
    return {**metrics, "shared_before": list(result.before)} if result.before else metrics


def _copy_beside(start: Path, template: Path, adapter: Path) -> None:
    """Tokenizer and template travel with the aligned adapter as with the one it began from; an adapter that was
    imported without rows has no template, and gets that of the pairs.
    """
    copied = {p.relative_to(start): p for p in sorted(start.rglob("*")) if p.is_file()}
    copied |= {Path("template") / p.name: p for p in sorted(template.iterdir())}
    copied.setdefault(Path("chat_template.jinja"), template / "inference.jinja")
    for name, file in copied.items():
        if not (adapter / name).exists():
            (adapter / name).parent.mkdir(exist_ok=True)
            write_bytes(adapter / name, file.read_bytes())
