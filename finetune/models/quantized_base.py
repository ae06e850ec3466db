"""A base that is itself quantised: what can be done with it, from its config.json alone. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# What the names of quantised repositories add to the name of the 16-bit one
ADDED = (
    r"[-_.](unsloth[-_])?(bnb[-_])?(\d+[-_]?bits?|gptq|awq|exl\d|fp8|nf4|mxfp4|nvfp4|int[48]|w\d+a\d+|quantized)\b.*$"
)
TRAINABLE = ("bitsandbytes",)  # methods whose matrices this program can train adapters on


def method_of(config: Mapping[str, Any]) -> str | None:
    """`quantization_config.quant_method`, whatever it is; None for a base that is not quantised.

    Older bitsandbytes folders name no method, only `load_in_4bit` or `load_in_8bit`.
    """
    settings = config.get("quantization_config")
    if not settings:
        return None
    if not isinstance(settings, Mapping):
        return "an unknown method"
    old = settings.get("load_in_4bit") or settings.get("load_in_8bit")
    return str(settings.get("quant_method") or ("bitsandbytes" if old else "an unknown method"))


def problem(config: Mapping[str, Any], name: str, *, quantizes: bool, merges: bool) -> str | None:
    """Why a recipe cannot be run on the base `name`, and what to write instead; None if it can.

    `quantizes`: whether the recipe's quantization is on; `merges`: whether it merges.
    """
    method = method_of(config)
    if method is None:
        return None
    plain = re.sub(ADDED, "", name, flags=re.IGNORECASE)
    instead = f"model: {plain}" if plain != name else "the 16-bit model that it was made from"
    if method not in TRAINABLE:
        return (
            f"{name} is stored quantised ({method}): no adapter can be trained on it here and it cannot be merged "
            f"into; take {instead}, which this recipe quantises itself"
        )
    wrong = [words for on, words in ((quantizes, "quantization: null"), (merges, "merge: null")) if on]
    if not wrong:
        return None
    return (
        f"{name} is stored quantised ({method}): an adapter can be trained on it as it is, but it cannot be quantised "
        f"again or merged into; set {' and '.join(wrong)}, or take {instead}"
    )
