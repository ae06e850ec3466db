"""Measure the effect of preference training on held-out pairs and SFT rows: policy against its start adapter.

Policy and reference are one model in memory; the active adapter is switched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from peft import PeftModel

from finetune.context import Context
from finetune.eval.generation import Answer, greedy
from finetune.eval.metrics import Interval, paired_interval, perplexity, perplexity_ratio_interval, ratio_interval
from finetune.eval.scoring import POSITIONS, batches, padded, row_nll
from finetune.preference.records import SIDES
from finetune.preference.reference import as_reference
from finetune.tokenization.token_rows import TokenRow

Floats = NDArray[np.float64]
BATCH_TOKENS = 4096  # scored at once, padding included
KL_ROWS = 128  # held-out answers on which the whole distributions are compared, at most
SFT_ROWS = 64
ANSWERS = 32  # greedy answers before and after: the least of DESIGN.md's stop rate


@dataclass(frozen=True)
class Scored:
    """Held-out answers of one side: log-probabilities (rows,) float64 in nats, and supervised tokens (rows,)."""

    policy: Floats
    start: Floats
    tokens: Floats

    @property
    def drift(self) -> Floats:
        """Policy minus start, a row."""
        return self.policy - self.start


def held_out_sides(path: Path, method: str) -> tuple[dict[str, list[TokenRow]], list[str]]:
    """The held-out answers by side, and the source of each row: chosen and rejected of dpo, row for row; of kto the
    answers with label true (chosen) and false (rejected).
    """
    rows = pq.read_table(path).to_pylist()
    by_side: dict[str, list[TokenRow]] = {"chosen": [], "rejected": []}
    for row in rows:
        for side in SIDES[method]:
            name = side if method == "dpo" else ("chosen" if row["label"] else "rejected")
            ids = np.array([*row["prompt_ids"], *row[f"{side}_ids"]])
            mask = np.array([*[0] * len(row["prompt_ids"]), *row[f"{side}_mask"]], dtype=bool)
            by_side[name].append(TokenRow(row["pair_id"], ids, mask))
    return by_side, [row["source"] for row in rows]


def measure_pairs(model: PeftModel, path: Path, method: str, beta: float, seed: int, ctx: Context) -> dict[str, Any]:
    """Figures on the held-out pairs of stage pairs; {"eval_pairs": 0} if there are none.

    `model` holds the adapters `default` and `ref` and runs under the caller's autocast. Keys: accuracy (dpo: the share
    of pairs whose chosen answer gained more log-probability than the rejected one; kto: of all pairs of a desirable
    and an undesirable answer) and margin (β × that difference, nats) with 95 % bootstrap intervals over rows, for dpo
    by source too; drift_chosen and drift_rejected (nats a token), displacement (both fell, by their intervals),
    mean_kl_from_start (nats a token).
    """
    sides, sources = held_out_sides(path, method)
    if not sides["chosen"] or not sides["rejected"]:
        return {"eval_pairs": 0}
    scored = {}
    for name, rows in sides.items():
        policy, counts = _log_probabilities(model, rows, ctx, f"{name} answers (aligned)")
        with as_reference(model):
            start, _ = _log_probabilities(model, rows, ctx, f"{name} answers (start)")
        scored[name] = Scored(policy, start, counts)
    chosen, rejected = scored["chosen"], scored["rejected"]
    figures: dict[str, Any] = {"eval_pairs": len(sources)}
    if method == "dpo":
        figures |= _paired(chosen.drift - rejected.drift, beta, seed)
        names = np.array(sources)
        if len(set(sources)) > 1:
            own = {s: (chosen.drift - rejected.drift)[names == s] for s in sorted(set(sources))}
            figures["by_source"] = {s: {"pairs": len(gains), **_paired(gains, beta, seed)} for s, gains in own.items()}
    else:
        figures |= _unpaired(chosen.drift, rejected.drift, beta, seed)
    for name, side in scored.items():
        drift = paired_interval(side.policy, side.start, side.tokens, seed)
        figures |= {f"drift_{name}": drift.value, f"drift_{name}_interval": [drift.low, drift.high]}
    figures["displacement"] = figures["drift_chosen_interval"][1] < 0 and figures["drift_rejected_interval"][1] < 0
    figures["mean_kl_from_start"] = _mean_kl(model, [*sides["chosen"], *sides["rejected"]], ctx)
    return figures


def _log_probabilities(model: PeftModel, rows: Sequence[TokenRow], ctx: Context, label: str) -> tuple[Floats, Floats]:
    nll, counts = row_nll(model, rows, BATCH_TOKENS, ctx, label)
    return -nll, counts.astype(np.float64)


def _paired(gains: Floats, beta: float, seed: int) -> dict[str, Any]:
    """`gains` (pairs,): by how much more the chosen answer gained. A tie counts as half."""
    one = np.ones(len(gains))
    right = ratio_interval(_right(gains), one, seed)
    margin = ratio_interval(beta * gains, one, seed)
    return _figures(right, margin)


def _right(gains: Floats) -> Floats:
    return np.where(gains == 0, 0.5, (gains > 0).astype(np.float64))


def _unpaired(chosen: Floats, rejected: Floats, beta: float, seed: int, samples: int = 2000) -> dict[str, Any]:
    """The same over all pairs of a row of `chosen` and one of `rejected`; both are drawn again, each from its own."""
    wins = _right(np.subtract.outer(chosen, rejected))  # (C, R)
    rng = np.random.default_rng(seed)
    drawn = [
        rng.multinomial(len(side), np.full(len(side), 1 / len(side)), size=samples) / len(side)
        for side in (chosen, rejected)
    ]
    accuracies = np.einsum("sc,cr,sr->s", drawn[0], wins, drawn[1], optimize=True)
    margins = beta * (drawn[0] @ chosen - drawn[1] @ rejected)
    bounds = [np.quantile(values, [0.025, 0.975]) for values in (accuracies, margins)]
    return _figures(
        Interval(float(wins.mean()), float(bounds[0][0]), float(bounds[0][1])),
        Interval(float(beta * (chosen.mean() - rejected.mean())), float(bounds[1][0]), float(bounds[1][1])),
    )


def _figures(right: Interval, margin: Interval) -> dict[str, Any]:
    return {
        "accuracy": right.value, "accuracy_interval": [right.low, right.high],
        "margin": margin.value, "margin_interval": [margin.low, margin.high],
    }  # fmt: skip


def _mean_kl(model: PeftModel, rows: Sequence[TokenRow], ctx: Context) -> float:
    """KL(policy ‖ start) in nats, over the whole vocabulary, mean over the supervised tokens of up to KL_ROWS rows."""
    rows = rows[:: -(-len(rows) // KL_ROWS)]
    total, count = 0.0, 0
    todo = list(batches([len(r.ids) for r in rows], BATCH_TOKENS // 4))
    with torch.inference_mode():
        for batch in ctx.track(todo, "KL from the start", len(todo)):
            ids, attention, wanted = (t.to(model.device) for t in padded([rows[i] for i in batch]))
            keep = wanted[:, 1:]
            policy = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1][keep]
            with as_reference(model):
                start = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1][keep]
            for part in (slice(k, k + POSITIONS) for k in range(0, len(policy), POSITIONS)):
                first, second = (torch.log_softmax(x[part].float(), -1) for x in (policy, start))
                total += float((first.exp() * (first - second)).sum(-1).double().sum())
            count += len(policy)
    return total / count


def measure_answers(
    model: PeftModel,
    rows: Sequence[TokenRow],
    template: Mapping[str, Any],
    pad_id: int,
    seed: int,
    ctx: Context,
) -> dict[str, Any]:
    """Perplexity of SFT's held-out rows, and greedy answers to their prompts, before (start) and after.

    `rows` are whole held-out rows; {} without any. Keys: perplexity_start, perplexity_aligned, perplexity_ratio and its
    paired interval (null for one row); answers, stop_rate_start, stop_rate, answer_tokens_start, answer_tokens (mean).
    """
    if not rows:
        return {}
    rows = rows[:SFT_ROWS]
    after, counts = _log_probabilities(model, rows, ctx, "perplexity (aligned)")
    answers = _answers(model, rows[:ANSWERS], template, pad_id, ctx)
    with as_reference(model):
        before, _ = _log_probabilities(model, rows, ctx, "perplexity (start)")
        answers_before = _answers(model, rows[:ANSWERS], template, pad_id, ctx)
    ratio = perplexity_ratio_interval(-after, -before, counts, seed)
    figures: dict[str, Any] = {
        "sft_rows": len(rows), "perplexity_start": perplexity(-before, counts),
        "perplexity_aligned": perplexity(-after, counts), "perplexity_ratio": ratio.value,
        "perplexity_ratio_interval": [ratio.low, ratio.high] if len(rows) > 1 else None, "answers": len(answers),
    }  # fmt: skip
    for ending, given in (("_start", answers_before), ("", answers)):
        figures[f"stop_rate{ending}"] = sum(a.finish == "stop" for a in given) / len(given)
        figures[f"answer_tokens{ending}"] = sum(len(a.ids) for a in given) / len(given)
    return figures


def _answers(
    model: PeftModel,
    rows: Sequence[TokenRow],
    template: Mapping[str, Any],
    pad_id: int,
    ctx: Context,
) -> list[Answer]:
    prompts = [r.ids[: r.answer_start] for r in rows]
    limits = [2 * (len(r.ids) - r.answer_start) + 64 for r in rows]
    return greedy(model, prompts, limits, template["terminators"], pad_id, ctx, 4 * BATCH_TOKENS)
