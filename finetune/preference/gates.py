"""Refuse an aligned adapter that did not learn its pairs, or that forgot what SFT taught."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.errors import GateRefused


def check(figures: Mapping[str, Any], min_accuracy: float | None, max_perplexity_ratio: float | None) -> None:
    """Raise GateRefused with every figure of measure.py that is out of bounds; null bounds and absent figures pass.

    The accuracy must be above `min_accuracy` by the lower end of its 95 % interval.
    """
    problems = []
    interval = figures.get("accuracy_interval")
    if min_accuracy is not None and interval is None and figures.get("eval_pairs") == 0:
        problems.append(
            "preference.min_accuracy cannot be measured: the held-out answers all have one label; give "
            "preference.eval_data answers of both, or set preference.min_accuracy: null"
        )
    if min_accuracy is not None and interval is not None and not interval[0] > min_accuracy:
        problems.append(
            f"{figures['accuracy']:.1%} of {figures['eval_pairs']} held-out pairs are ranked correctly (95 % interval "
            f"{interval[0]:.1%} to {interval[1]:.1%}), but preference.min_accuracy requires the interval to be "
            f"above {min_accuracy:.0%}; train longer (preference.epochs), at a higher "
            "preference.learning_rate, or on more pairs"
        )
    ratio = figures.get("perplexity_ratio")
    if max_perplexity_ratio is not None and ratio is not None and not ratio <= max_perplexity_ratio:
        problems.append(
            f"the perplexity of held-out SFT rows is {ratio:.3g} times that before "
            f"({figures['perplexity_start']:.4g} → {figures['perplexity_aligned']:.4g}), "
            f"preference.max_perplexity_ratio allows {max_perplexity_ratio}; raise preference.beta, "
            "or lower preference.learning_rate or preference.epochs"
        )
    if problems:
        raise GateRefused("\n".join(problems))
