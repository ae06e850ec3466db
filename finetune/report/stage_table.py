"""Tables of stages for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.eval.compare import ENOUGH_TOKENS
from finetune.utils.format import size

ROWS = {  # stage → its metrics of rows in and out
    "generate": ("candidates", "rows_out"),
    "ingest": (None, "rows_out"),
    "filter": ("rows_in", "rows_out"),
    "embed": ("rows", "rows"),
    "dedup": ("rows_in", "rows_out"),
    "decontaminate": ("rows_in", "rows_out"),
    "sample": ("rows_in", "rows_out"),
    "split": ("rows_in", "train_rows"),
    "render": (None, "rows"),
    "pack": (None, "bins"),
    "pairs": ("rows_in", "rows"),
}
HOLDING_OUT = ("split", "render", "pairs")


def stage_rows(name: str, metrics: Mapping[str, Any]) -> str:
    """Return `in → out` for the table."""
    before, after = ROWS.get(name, (None, None))
    if after is None or after not in metrics:
        return ""
    start = f"{metrics[before]:,} → " if before and before in metrics else ""
    held = f" + {metrics['eval_rows']:,} held out" if name in HOLDING_OUT and "eval_rows" in metrics else ""
    return f"{start}{metrics[after]:,}{held}"


def stage_figure(name: str, m: Mapping[str, Any]) -> str:  # noqa: C901 - one line a stage, read as a table
    """Return the most important metric of a stage."""

    def number(key: str, form: str = ".3g") -> str:
        value = m.get(key)
        return format(value, form) if isinstance(value, (int, float)) else "–"

    match name:
        case "base":
            return f"{number('parameters', ',')} parameters"
        case "generate":
            return f"{m.get('method')} by {m.get('model')}, {number('requests', ',')} requests"
        case "ingest":
            refused = sum((m.get("refused") or {}).values())
            return f"{refused:,} refused" if refused else ""
        case "filter":
            reasons = m.get("rejected") or {}
            return ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()))
        case "embed":
            return f"{m.get('model', '')}, {number('rows_per_second', ',.0f')} rows/s"
        case "dedup":
            near = int(m.get("minhash") or 0) + int(m.get("embedding") or 0)
            return f"{number('exact', ',')} exact, {near:,} near-duplicates dropped"
        case "split":
            return f"{number('groups', ',')} groups, {number('leaks', ',')} leaks"
        case "render":
            dropped = f", {m['dropped']:,} dropped" if m.get("dropped") else ""
            return f"{number('supervised_fraction', '.1%')} supervised, {number('truncated', ',')} truncated{dropped}"
        case "pack":
            return f"{number('efficiency', '.1%')} full"
        case "pairs":
            lost = sum((m.get("refused") or {}).values()) + int(m.get("dropped") or 0)
            bias = f", chosen longer in {number('length_bias', '.0%')}" if m.get("length_bias") is not None else ""
            return f"{lost:,} left out, {number('contradictions', ',')} contradict{bias}"
        case "train" if "imported" in m:
            return f"imported {m['imported']}"
        case "train":
            return f"loss {number('first_loss')} → {number('loss')}, {number('tokens_per_second', ',.0f')} tokens/s"
        case "align":
            ends = m.get("accuracy_interval")
            apart = (
                f", {m['accuracy']:.1%} of held-out pairs told apart ({ends[0]:.1%} to {ends[1]:.1%})" if ends else ""
            )
            return f"loss {number('first_loss')} → {number('loss')}{apart}"
        case "evaluate":
            rate = (m.get("judge") or {}).get("win_rate")
            judged = f", judged better in {rate:.0%}" if rate is not None else ""
            return (
                f"perplexity {number('perplexity_base')} → {number('perplexity_adapter')}, "
                f"stops {number('stop_rate', '.0%')}{judged}"
            )
        case "certify":
            few = f", on {m['tokens']} tokens only" if m.get("tokens", ENOUGH_TOKENS) < ENOUGH_TOKENS else ""
            return f"{m.get('base')}: agreement {number('agreement', '.1%')}, KL {number('mean_kl', '.2g')}{few}"
        case "merge":
            return f"peak {size(m.get('peak_anon_bytes'))}"
        case "export":
            listed = ", ".join(f"{kind} {value:.4g}" for kind, value in (m.get("perplexity") or {}).items())
            return listed and f"perplexity {listed}"
        case _:
            return ""
