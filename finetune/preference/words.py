"""Text about what stage align measured: sentences, and (name, value) pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.utils.format import interval, number, percent


def words_of(figures: Mapping[str, Any]) -> list[str]:
    """Return sentences that explain the figures to a person."""
    if not figures.get("eval_pairs"):
        return ["no pair is held out, so it is not known whether the preferences were learned"]
    low, high = figures["accuracy_interval"]
    lines = [
        f"{figures['accuracy']:.1%} of {figures['eval_pairs']} held-out pairs are ranked correctly ({low:.1%} to "
        f"{high:.1%}), margin {figures['margin']:.3g} nats; "
        f"KL from the start {figures['mean_kl_from_start']:.3g} nats a token"
    ]
    if figures["displacement"]:
        lines.append(
            f"displacement: chosen answers lost {-figures['drift_chosen']:.3g} nats a token, rejected ones "
            f"{-figures['drift_rejected']:.3g}: both became less likely (arXiv:2410.08847); a higher "
            "preference.beta or fewer epochs keep the chosen ones"
        )
    if "perplexity_ratio" in figures:
        lines.append(
            f"perplexity of held-out SFT rows {figures['perplexity_start']:.4g} → {figures['perplexity_aligned']:.4g}; "
            f"answers of {figures['answer_tokens_start']:.0f} → {figures['answer_tokens']:.0f} tokens, of which "
            f"{figures['stop_rate_start']:.0%} → {figures['stop_rate']:.0%} end by themselves"
        )
    return lines


def figures_of(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of what stage align measured, for the report and the model card; empty without metrics."""
    if not metrics:
        return []
    figures = [
        ("method", f"{metrics.get('method')}, loss {metrics.get('loss_type')}"),
        ("loss", f"{number(metrics.get('first_loss'))} → {number(metrics.get('loss'))}"),
        ("steps", f"{number(metrics.get('steps'))} of {number(metrics.get('batch_pairs'))} pairs"),
    ]
    if "accuracy" in metrics:
        accuracy = f"{percent(metrics['accuracy'])}, 95 % {interval(metrics.get('accuracy_interval'))}"
        figures += [
            ("held-out pairs", number(metrics["eval_pairs"])),
            ("ranked correctly", accuracy),
            ("margin", f"{number(metrics['margin'])} nats, 95 % {interval(metrics.get('margin_interval'))}"),
            ("mean KL from the start", f"{number(metrics['mean_kl_from_start'])} nats a token"),
        ]
        for side in ("chosen", "rejected"):
            ends = interval(metrics.get(f"drift_{side}_interval"))
            drift = f"{number(metrics[f'drift_{side}'])} nats a token, 95 % {ends}"
            figures.append((f"drift of {side} answers", drift))
        for source, own in metrics.get("by_source", {}).items():
            accuracy = (
                f"{percent(own['accuracy'])} of {number(own['pairs'])}, 95 % {interval(own['accuracy_interval'])}"
            )
            figures.append((f"ranked correctly: {source}", accuracy))
    for label, name, change in (
        ("perplexity of SFT rows", "perplexity", ("perplexity_start", "perplexity_aligned")),
        ("answers that end", "stop_rate", ("stop_rate_start", "stop_rate")),
        ("tokens of an answer", "answer_tokens", ("answer_tokens_start", "answer_tokens")),
    ):
        if change[0] in metrics:
            show = percent if name == "stop_rate" else number
            figures.append((label, f"{show(metrics[change[0]])} → {show(metrics[change[1]])}"))
    return figures
