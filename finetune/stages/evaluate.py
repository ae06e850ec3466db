"""Evaluate base and adapter on held-out rows: perplexity, use of the prompt, stop rate, benchmarks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from finetune.context import Context
from finetune.errors import GateRefused, InputError
from finetune.eval.answer_metrics import missing
from finetune.eval.answer_metrics import words_of as answer_words
from finetune.eval.metrics import never_stops
from finetune.metrics import EvaluateMetrics, Headline
from finetune.recipe import Evaluate, Judge, Model, Quantization, Recipe, Section
from finetune.synth.judge import words_of as judge_words
from finetune.utils.files import canonical_json, read_json, replace_bytes, write_bytes, write_json

if TYPE_CHECKING:
    import numpy as np
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from finetune.eval.generation import Answer
    from finetune.tokenization.token_rows import TokenRow

JUDGE = "evaluate.judge.model.endpoint"


class Gates(Section):
    """Bounds on the figures of stage align. They are checked here, so that another bound trains nothing again."""

    min_accuracy: float | None
    max_perplexity_ratio: float | None


class Spec(Section):
    """The evaluation section, and what is needed to load the model as it was trained."""

    seed: int
    model: Model
    quantization: Quantization | None
    precision: Literal["auto", "bf16", "fp16", "fp32"]
    evaluate: Evaluate
    gates: Gates | None = None
    judge: Judge | None = Field(default=None, exclude=True)  # as written, with the speed that the key leaves out


def spec(recipe: Recipe) -> Spec | None:
    """Off if the recipe has evaluate: null, or holds nothing out."""
    if recipe.evaluate is None or not recipe.holds_out:
        return None
    return Spec(
        seed=recipe.seed,
        model=recipe.model,
        quantization=recipe.quantization,
        precision=recipe.training.precision,
        evaluate=recipe.evaluate.with_slow_judge,
        gates=_gates(recipe),
        judge=recipe.evaluate.judge,
    )


def _gates(recipe: Recipe) -> Gates | None:
    asked = recipe.preference
    return Gates(**{n: getattr(asked, n) for n in Gates.model_fields}) if asked else None


def fingerprint(spec: Spec) -> Mapping[str, object]:
    """The files of the recipe's own tasks. The harness's tasks are identified by the versions in the result."""
    from finetune.eval.lm_eval import digests

    outside: dict[str, object] = {"task_files": digests(spec.evaluate.task_path)} if spec.evaluate.tasks else {}
    if spec.judge is not None:
        from finetune.synth.asking import identity
        from finetune.synth.prompts import digests as prompt_digests

        outside["judge"] = {"model": identity(spec.judge.model), "prompt": prompt_digests(None)["judge"], "reading": 2}
    return outside


def run(spec: Spec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> EvaluateMetrics:
    """Perplexities of base and adapter, `nll_true` against `nll_shuffled`, greedy samples of both, and benchmarks.

    Before a judge is asked, all of it is kept in scratch: if the judge fails, the next run measures nothing again.
    """
    from finetune.preference import gates
    from finetune.synth.asking import free_gpu
    from finetune.synth.forecast import require_askable

    if spec.gates is not None:
        figures = read_json(inputs["train"] / "preference.json")
        gates.check(figures, spec.gates.min_accuracy, spec.gates.max_perplexity_ratio)
    if spec.judge is None:
        result, samples = _measured(spec, inputs, ctx)
    else:
        require_askable(spec.judge.model, inputs["base"], ctx, JUDGE)
        kept = ctx.scratch / f"evaluate-{out.name}.json"  # the folder's name is the stage's key
        if not kept.is_file():
            kept.parent.mkdir(parents=True, exist_ok=True)
            replace_bytes(kept, canonical_json(_measured(spec, inputs, ctx)).encode())
            free_gpu()  # the judge may need the memory
        result, samples = read_json(kept)
        questions = [line["question"] for line in samples]
        result["judge"] = _judge(spec.judge, questions, samples, inputs["base"], spec.seed, ctx)
    for line in samples:
        del line["question"]
    write_bytes(out / "samples.jsonl", "".join(canonical_json(line) + "\n" for line in samples).encode())
    write_json(out / "eval.json", result)
    if spec.judge is not None:
        kept.unlink(missing_ok=True)
    _warn(result, ctx)
    return result


def headline(m: EvaluateMetrics) -> Headline:
    """Return the row of this stage in a table of stages."""
    stops = "–" if m["stop_rate"] is None else f"{m['stop_rate']:.0%}"
    rate = m["judge"]["win_rate"] if "judge" in m else None
    judged = f", judged better in {rate:.0%}" if rate is not None else ""
    return Headline(f"perplexity {m['perplexity_base']:.3g} → {m['perplexity_adapter']:.3g}, stops {stops}{judged}")


def _measured(spec: Spec, inputs: Mapping[str, Path], ctx: Context) -> tuple[EvaluateMetrics, list[dict[str, Any]]]:
    """Return all figures but the judge's, and a line for each sample.

    Base and adapter are one model in memory, the adapter switched on and off.
    """
    from finetune.eval import lm_eval
    from finetune.models import loading
    from finetune.models.device import pick_device, pick_precision
    from finetune.tokenization.token_rows import read_token_rows
    from finetune.utils import runtime

    device = pick_device(ctx.device)
    precision, _ = pick_precision(spec.precision, device)
    rows = read_token_rows(inputs["render"] / "eval.parquet", spec.evaluate.max_rows)
    if not rows:
        raise GateRefused(
            "no held-out row is whole: all were cut at render.max_length_tokens; raise it, or set evaluate: null"
        )
    template = json.loads((inputs["render"] / "template" / "template.json").read_text(encoding="utf-8"))
    tokenizer = loading.load_tokenizer(inputs["base"])
    settings = spec.evaluate
    if lacks := missing(settings.metrics):
        raise InputError("\n".join(f"evaluate.metrics: {why}" for why in lacks))
    # Read before the slow part: a task that cannot be loaded must not cost it.
    tasks = lm_eval.load(settings.tasks, settings.task_path, spec.seed) if settings.tasks else None
    base = loading.load_base(spec.model, inputs["base"], ctx, spec.quantization, precision, device)
    model = loading.attach_adapter(base, inputs["train"] / "adapter").eval()
    with runtime.fitting(inputs["base"], device):
        result, samples = _measure(model, tokenizer, rows, template, spec, ctx)
        if tasks is not None:
            own = loading.load_tokenizer(inputs["base"])  # the harness changes it
            limit, width = settings.tasks_limit, settings.batch_tokens
            result["tasks_harness"] = lm_eval.version()
            result["tasks"] = lm_eval.score(model, own, tasks, limit, width, spec.seed, ctx)
    return result, samples


def _warn(result: EvaluateMetrics, ctx: Context) -> None:
    """Say what the figures do not show."""
    ratio = result["perplexity_ratio_interval"]
    if ratio is not None and ratio[0] <= 1 <= ratio[1]:
        ends = f"{ratio[0]:.4g} to {ratio[1]:.4g}"
        ctx.say(
            f"evaluate: perplexity does not distinguish base and adapter (ratio {ends}, the 95 % interval includes 1)"
        )
    if words := never_stops(result):
        ctx.say(f"evaluate: {words}")
    for name, figures in result.get("metrics", {}).items():
        ctx.say(f"evaluate: {answer_words(name, figures)}")
    if "judge" in result:
        ctx.say(f"evaluate: {judge_words(result['judge'])}")
    interval = result["nll_difference_interval"]
    if interval is None:
        ctx.say("evaluate: one held-out row has no other prompt to be compared with")
    elif interval[0] <= 0:
        ctx.say(
            "evaluate: the answers are no likelier under their own prompt than under another's "
            f"(difference {interval[0]:.3g} to {interval[1]:.3g} nats): the model may have learned their style only"
        )


def _measure(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenRow],
    template: Mapping[str, Any],
    spec: Spec,
    ctx: Context,
) -> tuple[EvaluateMetrics, list[dict[str, Any]]]:
    """The figures, and a line for each sample."""
    from finetune.eval import scoring
    from finetune.tokenization.token_rows import under_other_prompts, with_prompt

    settings = spec.evaluate
    nll, counts = scoring.row_nll(model, rows, settings.batch_tokens, ctx, "perplexity (adapter)")
    with model.disable_adapter():
        base_nll, _ = scoring.row_nll(model, rows, settings.batch_tokens, ctx, "perplexity (base)")
    own = [with_prompt(r, r) for r in rows]
    shuffled = under_other_prompts(rows, spec.seed)
    if all(_same(a, b) for a, b in zip(own, rows, strict=True)):  # one answer each: scored above
        true_nll, answer_counts = nll, counts
    else:
        true_nll, answer_counts = scoring.row_nll(model, own, settings.batch_tokens, ctx, "own prompts")
    other_nll, _ = scoring.row_nll(model, shuffled, settings.batch_tokens, ctx, "other prompts")
    prompt_use = _prompt_use(true_nll, other_nll, answer_counts, spec.seed)

    chosen = rows[: max(settings.generations, spec.judge.rows if spec.judge else 0)]
    pad_id = tokenizer.get_vocab()[template["pad_token"]]
    answers, base_answers = _generate(model, chosen, template, pad_id, settings.batch_tokens, ctx)
    lines = [_sample(tokenizer, r, a, b) for r, a, b in zip(chosen, answers, base_answers, strict=True)]
    stopped = sum(a.finish == "stop" for a in answers)
    result: EvaluateMetrics = {
        "rows": len(rows),
        "tokens": int(counts.sum()),
        **_perplexities(base_nll, nll, counts, spec.seed),
        **prompt_use,
        "generations": len(answers),
        "stop_rate": stopped / len(answers) if answers else None,
        "stop_rate_base": sum(a.finish == "stop" for a in base_answers) / len(answers) if answers else None,
    }
    if settings.metrics:
        result["metrics"] = _score_answers(lines, settings.metrics, spec.seed)
    return result, lines


def _same(a: TokenRow, b: TokenRow) -> bool:
    return a.ids.tolist() == b.ids.tolist() and a.mask.tolist() == b.mask.tolist()


def _judge(
    judge: Judge, questions: Sequence[str], samples: list[dict[str, Any]], base: Path, seed: int, ctx: Context
) -> dict[str, Any]:
    """Compare the answers of base and adapter; every line gets its scores, in both orders. Verdicts are kept."""
    from finetune.synth.asking import Budget, open_asker
    from finetune.synth.judge import Pair, compare, figures
    from finetune.synth.prompts import Prompts

    lines = samples[: judge.rows]
    asked = zip(questions, lines, strict=False)
    pairs = [Pair(question, line["base"]["text"], line["adapter"]["text"]) for question, line in asked]
    with open_asker(judge.model, base, Budget(), ctx, JUDGE) as asker:
        verdicts = compare(asker, Prompts(), pairs, judge.max_new_tokens, "verdicts")
        requests = asker.budget.requests
    for line, verdict in zip(lines, verdicts, strict=True):
        line["judge"] = [verdict.forward, verdict.backward]
    return {"model": judge.model.label, "requests": requests, **figures(verdicts, seed)}


def _score_answers(lines: list[dict[str, Any]], names: Sequence[str], seed: int) -> dict[str, Any]:
    """Base beside adapter by each measure; every line gets its own scores, [base, adapter]."""
    from finetune.eval.answer_metrics import compare

    references = [line["reference"] for line in lines]
    base, adapter = ([line[side]["text"] for line in lines] for side in ("base", "adapter"))
    figures, rows = compare(names, references, base, adapter, seed)
    for line, scores in zip(lines, rows, strict=True):
        line["scores"] = {name: list(pair) for name, pair in scores.items()}
    return figures


def _perplexities(base: np.ndarray, adapter: np.ndarray, counts: np.ndarray, seed: int) -> EvaluateMetrics:
    """Both, and adapter / base, each with its 95 % bootstrap interval over rows; null for a single row.

    The ratio's draws are paired (each takes both figures of a row), so it separates the two where their own
    intervals overlap.
    """
    from finetune.eval.metrics import Interval, perplexity, perplexity_interval, perplexity_ratio_interval

    values, tokens = (perplexity(base, counts), perplexity(adapter, counts)), counts.astype(float)

    def ends(measure: Callable[..., Interval], *sums: np.ndarray) -> list[float] | None:
        if len(base) < 2:
            return None
        figures = measure(*sums, tokens, seed)
        return [figures.low, figures.high]

    return {
        "perplexity_base": values[0],
        "perplexity_base_interval": ends(perplexity_interval, base),
        "perplexity_adapter": values[1],
        "perplexity_adapter_interval": ends(perplexity_interval, adapter),
        "perplexity_ratio": values[1] / values[0],
        "perplexity_ratio_interval": ends(perplexity_ratio_interval, adapter, base),
    }


def _prompt_use(true: np.ndarray, other: np.ndarray, counts: np.ndarray, seed: int) -> EvaluateMetrics:
    """Nats per token of the answers under their own and under another row's prompt, with a paired interval."""
    from finetune.eval.metrics import paired_interval

    if len(true) < 2:
        return {"nll_true": float(true.sum() / counts.sum()), "nll_shuffled": None, "nll_difference_interval": None}
    difference = paired_interval(other, true, counts.astype(float), seed)
    return {
        "nll_true": float(true.sum() / counts.sum()),
        "nll_shuffled": float(other.sum() / counts.sum()),
        "nll_difference_interval": [difference.low, difference.high],
    }


def _generate(
    model: PeftModel,
    rows: Sequence[TokenRow],
    template: Mapping[str, Any],
    pad_id: int,
    batch_tokens: int,
    ctx: Context,
) -> tuple[list[Answer], list[Answer]]:
    from finetune.eval.generation import greedy

    prompts = [r.ids[: r.answer_start] for r in rows]
    limits = [2 * (len(r.ids) - r.answer_start) + 64 for r in rows]
    if not rows:
        return [], []
    most = 4 * batch_tokens  # cached keys and values: 2 GB for a 7B at the default
    answers = greedy(model, prompts, limits, template["terminators"], pad_id, ctx, most)
    with model.disable_adapter():
        base_answers = greedy(model, prompts, limits, template["terminators"], pad_id, ctx, most)
    return answers, base_answers


def _sample(tokenizer: PreTrainedTokenizerBase, row: TokenRow, answer: Answer, base: Answer) -> dict[str, Any]:
    start = row.answer_start
    return {
        "id": row.id,
        "prompt": tokenizer.decode(row.ids[:start], skip_special_tokens=False),
        "question": str(tokenizer.decode(row.ids[:start], skip_special_tokens=True)).strip(),
        "reference": tokenizer.decode(row.ids[start:], skip_special_tokens=True),
        "adapter": {"text": tokenizer.decode(answer.ids, skip_special_tokens=True), "finish": answer.finish},
        "base": {"text": tokenizer.decode(base.ids, skip_special_tokens=True), "finish": base.finish},
    }
