"""Which base to merge into, and how far that merge is from what was trained: measured before anything is merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from finetune.context import Context
from finetune.errors import FinetuneError, GateRefused, InputError
from finetune.eval.compare import ENOUGH_TOKENS
from finetune.metrics import CertifyMetrics, Headline
from finetune.recipe import Certify, Model, Quantization, Recipe, Section
from finetune.utils.files import write_json
from finetune.utils.format import six

if TYPE_CHECKING:
    import torch

    from finetune.eval.compare import Comparison, HeldOut
    from finetune.merge.nf4_round_trip import RoundTrip
    from finetune.merge.plan import MergePlan
    from finetune.models.layerwise import StreamedModel


SURE_ROWS = 8  # with fewer, even a paired interval of the difference proves nothing


class Spec(Section):
    """The certify section, and what is needed to load the model as it was trained and to merge it."""

    seed: int
    model: Model
    quantization: Quantization | None
    precision: Literal["auto", "bf16", "fp16", "fp32"]
    merge_dtype: str
    certify: Certify


def spec(recipe: Recipe) -> Spec | None:
    """Off if the recipe has certify: null, if nothing is merged, or if no row is held out."""
    if recipe.certify is None or recipe.merge is None or not recipe.holds_out:
        return None
    return Spec(
        seed=recipe.seed,
        model=recipe.model,
        quantization=recipe.quantization,
        precision=recipe.training.precision,
        merge_dtype=recipe.merge.dtype,
        certify=recipe.certify,
    )


def fingerprint(spec: Spec) -> Mapping[str, object]:
    """Nothing outside the recipe and the inputs."""
    return {}


def run(spec: Spec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> CertifyMetrics:
    """Compare what was trained with each candidate merge on the same rows; refuse one that is too far away."""
    from finetune.eval import compare
    from finetune.merge.plan import output_dtype, plan_merge
    from finetune.models import loading
    from finetune.models.device import DTYPES, pick_device, pick_precision
    from finetune.models.new_tokens import read_new_tokens

    base, adapter = inputs["base"], inputs["train"] / "adapter"
    device = pick_device(ctx.device)
    precision, _ = pick_precision(spec.precision, device)
    compute = DTYPES[precision]
    seen, trips = _candidates(spec, compute, device)
    dtype = output_dtype(spec.merge_dtype, base)
    folder = loading.ensure_base(spec.model, base, ctx)
    # Everything that cannot be merged is refused here, before the slow part.
    own_code, tokens = spec.model.trust_remote_code, read_new_tokens(base)
    plans = {n: plan_merge(folder, adapter, dtype, t, own_code, tokens) for n, t in trips.items()}
    held_out, whole = _held_out(spec.certify.tokens, inputs["render"] / "eval.parquet")
    if held_out.rows < whole:
        more = f"certify.tokens {spec.certify.tokens:,}; --set certify.tokens=N reads more"
        ctx.say(f"certify: compares on {held_out.rows:,} of {whole:,} held-out rows ({more})")
    unmerged = plan_merge(folder, adapter, compute, seen, own_code, tokens)
    own = _trained(spec.model, base, adapter, unmerged, compute, device)
    merged = {name: _merged(spec.model, base, plan, compute, device) for name, plan in plans.items()}
    trained, *others = _hidden([own, *merged.values()], held_out, ctx)

    def compared(model: StreamedModel, states: torch.Tensor) -> Comparison:
        with own.head() as first, model.head() as second:
            return compare.compare(trained, first, states, second, held_out.labels)

    comparisons = {n: compared(m, states) for (n, m), states in zip(merged.items(), others, strict=True)}
    certificate = _certificate(spec, dtype, comparisons, held_out)
    if not _passes(spec.certify, certificate) and (gain := _gain(spec, certificate, comparisons, held_out)):
        control = comparisons.get("dequantized")
        if control is None:  # certify.base: original
            plan = plan_merge(folder, adapter, dtype, seen, own_code, tokens)
            model = _merged(spec.model, base, plan, compute, device)
            control = compared(model, _hidden([model], held_out, ctx)[0])
        same = _figures(control, held_out, spec.seed)
        if _passes(spec.certify, same):
            certificate = _certificate(
                spec, dtype, comparisons, held_out, {**gain, "control_agreement": same["agreement"]}
            )
    near = [n for n, c in certificate["candidates"].items() if _passes(spec.certify, c)]
    if near and certificate["base"] not in near and "better_than_trained" not in certificate:  # certify.base: auto
        far = certificate
        certificate = _certificate(spec, dtype, comparisons, held_out, base=near[0])
        ctx.say(
            f"certify: merged into the {near[0]} base: into the {far['base']} one it would agree with what was trained "
            f"on {far['agreement']:.1%} of the next tokens (at least {spec.certify.min_agreement:.1%} is needed) at a "
            f"perplexity ratio of {far['perplexity_ratio']:.4g} (at most {spec.certify.max_perplexity_ratio:g})"
        )
    certificate["round_trip_dtype"] = compute  # merge may run on another machine
    write_json(out / "certificate.json", certificate)  # also when the gate refuses: the figures are for the person
    _gate(spec.certify, certificate)
    ctx.say(f"certify: {certificate['words']}")
    return cast("CertifyMetrics", {key: certificate[key] for key in CertifyMetrics.__annotations__})


def headline(m: CertifyMetrics) -> Headline:
    """Return the row of this stage in a table of stages."""
    few = f", on {m['tokens']} tokens only" if m["tokens"] < ENOUGH_TOKENS else ""
    return Headline(f"{m['base']}: agreement {m['agreement']:.1%}, KL {m['mean_kl']:.2g}{few}")


def _hidden(models: Sequence[StreamedModel], held_out: HeldOut, ctx: Context) -> list[torch.Tensor]:
    """Final hidden states (P, d) of the supervised positions, of each model."""
    from finetune.eval.compare import supervised_hidden
    from finetune.models.layerwise import hidden_states

    every = hidden_states(models, held_out.batches, lambda layers: ctx.track(layers, "certify", len(layers)))
    return [supervised_hidden(states, held_out) for states in every]


def _candidates(spec: Spec, dtype: str, device: str) -> tuple[RoundTrip | None, dict[str, RoundTrip | None]]:
    """How training stored a quantised module's weight (None: as it is in the file), and so for each base to try."""
    from finetune.merge.nf4_round_trip import RoundTrip

    if spec.quantization is None:
        if spec.certify.base == "dequantized":
            raise InputError("certify.base is dequantized, but quantization is null: set certify.base to original")
        return None, {"original": None}
    trip = RoundTrip(spec.quantization.type, spec.quantization.double, dtype, device)
    every: dict[str, RoundTrip | None] = {"original": None, "dequantized": trip}
    return trip, every if spec.certify.base == "auto" else {spec.certify.base: every[spec.certify.base]}


def _held_out(tokens: int, path: Path) -> tuple[HeldOut, int]:
    """The rows that are compared, and how many there are to choose from."""
    from finetune.eval.compare import choose_rows, lay_out
    from finetune.tokenization.token_rows import read_token_rows

    rows = [r for r in read_token_rows(path) if r.mask[1:].any()]
    if not rows:
        raise FinetuneError(
            "certify: every held-out row is truncated or has no supervised token; raise split.eval_fraction or "
            "render.max_length_tokens, or set certify: null"
        )
    return lay_out(choose_rows(rows, tokens)), len(rows)


def _trained(model: Model, folder: Path, adapter: Path, plan: MergePlan, dtype: str, device: str) -> StreamedModel:
    """The model as it was trained: the base that the adapter saw, and the adapter beside it."""
    from finetune.merge.unmerged import attach_empty
    from finetune.models.layerwise import StreamedModel, empty_model
    from finetune.utils.safetensors_io import torch_dtype

    empty = empty_model(folder, dtype, trust_remote_code=model.trust_remote_code)
    autocast = None if dtype == "float32" else torch_dtype(dtype)
    return StreamedModel(empty, attach_empty(empty, adapter, plan), device, autocast)


def _merged(model: Model, folder: Path, plan: MergePlan, dtype: str, device: str) -> StreamedModel:
    """The merged model, its weights made when a layer needs them."""
    from finetune.merge.blocks import merged_tensor
    from finetune.models.layerwise import StreamedModel, empty_model

    empty = empty_model(folder, dtype, trust_remote_code=model.trust_remote_code, untie=plan.untie)
    return StreamedModel(empty, partial(merged_tensor, plan), device)


def _gain(
    spec: Spec, certificate: Mapping[str, Any], comparisons: Mapping[str, Comparison], held_out: HeldOut
) -> dict[str, Any] | None:
    """How much better than what was trained the merge into 16 bits predicts held-out rows; None unless that is sure.

    `nll_per_token`: nats a token, merged minus trained, below 0; `interval`: 95 %, paired over rows. 4 bits can cost a
    small base more than an adapter gives it; only the merge into its 16-bit weights is rid of that.
    """
    from finetune.eval.compare import per_row
    from finetune.eval.metrics import paired_interval

    if spec.quantization is None or certificate["base"] != "original" or held_out.rows < SURE_ROWS:
        return None
    merge = comparisons["original"]
    nll = [per_row(values, held_out) for values in (merge.nll_second, merge.nll_first)]
    apart = paired_interval(nll[0], nll[1], per_row(None, held_out), spec.seed)
    if apart.high >= 0:
        return None
    return {"nll_per_token": six(apart.value), "interval": [six(apart.low), six(apart.high)]}


def _figures(comparison: Comparison, held_out: HeldOut, seed: int) -> dict[str, Any]:
    """Return the figures of one candidate in the certificate."""
    from finetune.eval.compare import per_row
    from finetune.eval.metrics import agreement, perplexity_interval

    tokens = per_row(None, held_out)
    own = perplexity_interval(per_row(comparison.nll_second, held_out), tokens, seed)
    trained = perplexity_interval(per_row(comparison.nll_first, held_out), tokens, seed)
    return {
        "perplexity": six(own.value),
        "perplexity_interval": [six(own.low), six(own.high)],
        "perplexity_ratio": six(own.value / trained.value),
        "mean_kl": six(float(comparison.kl.mean())),
        "agreement": six(agreement(comparison.greedy_first, comparison.greedy_second)),
    }


def _certificate(
    spec: Spec,
    dtype: str,
    comparisons: Mapping[str, Comparison],
    held_out: HeldOut,
    better: Mapping[str, Any] | None = None,
    base: str | None = None,
) -> dict[str, Any]:
    """Return the content of certificate.json, with six significant digits: the last bits of a sum do not change it.

    `base`: the candidate to take; None: the dequantized one if it is surely better, else the original one.
    `better`: that the merge is surely better than what was trained (`_gain`), and the agreement of its control, the
    merge into the base as the adapter saw it: what the two merges differ by is what 4 bits cost this base.
    """
    from finetune.eval.compare import per_row
    from finetune.eval.metrics import paired_interval, perplexity_interval

    tokens = per_row(None, held_out)
    nll = {name: per_row(c.nll_second, held_out) for name, c in comparisons.items()}
    first = next(iter(comparisons.values()))
    trained = perplexity_interval(per_row(first.nll_first, held_out), tokens, spec.seed)
    candidates = {name: _figures(comparison, held_out, spec.seed) for name, comparison in comparisons.items()}
    chosen, difference = next(iter(comparisons)), None
    if len(comparisons) == 2:
        apart = paired_interval(nll["dequantized"], nll["original"], tokens, spec.seed)
        chosen = base or ("dequantized" if apart.high < 0 else "original")
        difference = {
            "nll_per_token": six(apart.value),
            "interval": [six(apart.low), six(apart.high)],
        }
    best = candidates[chosen]
    words = _words(best, six(trained.value), len(held_out.labels), better)
    return {
        "base": chosen,
        "dtype": dtype,
        "perplexity_trained": six(trained.value),
        "perplexity_trained_interval": [six(trained.low), six(trained.high)],
        "perplexity_merged": best["perplexity"],
        "perplexity_ratio": best["perplexity_ratio"],
        "mean_kl": best["mean_kl"],
        "agreement": best["agreement"],
        "rows": held_out.rows,
        "tokens": len(held_out.labels),
        "candidates": candidates,
        "dequantized_minus_original": difference,
        **({"better_than_trained": better} if better else {}),
        "words": f"merged into the {chosen} base in {dtype}, {words}",
    }


def _words(figures: Mapping[str, Any], trained: float, tokens: int, better: Mapping[str, Any] | None) -> str:
    why = ""
    if better:
        low, high = better["interval"]
        why = (
            f"; it predicts these rows better than what was trained ({better['nll_per_token']:.2g} nats a token, "
            f"95 % {low:.2g} to {high:.2g}), and the same merge into the dequantized base agrees on "
            f"{better['control_agreement']:.1%}: the rest is what 4 bits cost this base"
        )
    few = f"; measured on {tokens} tokens only: {ENOUGH_TOKENS:,} or more would make its intervals worth reading"
    return (
        f"it agrees with what was trained on {figures['agreement']:.1%} of {tokens} held-out next tokens; "
        f"its perplexity is {figures['perplexity']:.4g} against {trained:.4g} "
        f"(ratio {figures['perplexity_ratio']:.4g}, mean KL {figures['mean_kl']:.2g} nats)"
        f"{why}{few if tokens < ENOUGH_TOKENS else ''}"
    )


def _gate(limits: Certify, certificate: Mapping[str, Any]) -> None:
    """Refuse a merge that is not the model that was trained, unless 4 bits are why and it is surely better."""
    if _passes(limits, certificate) or "better_than_trained" in certificate:
        return
    raise GateRefused(
        f"certify: {certificate['words']}; allowed are at least {limits.min_agreement:.1%} and at most a ratio of "
        f"{limits.max_perplexity_ratio:g}; publish the adapter instead (merge: null), or lower certify.min_agreement "
        "or raise certify.max_perplexity_ratio if you accept this"
    )


def _passes(limits: Certify, figures: Mapping[str, Any]) -> bool:
    near = figures["agreement"] >= limits.min_agreement
    return bool(near and figures["perplexity_ratio"] <= limits.max_perplexity_ratio)
