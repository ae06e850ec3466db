"""The card says which weights were trained, and how, in the recipe's own figures."""

from __future__ import annotations

import re
from typing import Any

import pytest

from finetune.publish.adapter_summary import trained
from tests.publish.test_card import card, recipe

PLAIN = [
    "Trained: LoRA of rank 16, alpha 32, on all-linear",
    "Frozen: all other weights, the embeddings among them; the base, in nf4 while training",
]


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({}, PLAIN),
        (
            {"lora": {"modules_to_save": ["lm_head", "embed_tokens"]}, "quantization": None},
            [PLAIN[0], "Trained whole, in 32 bits: embed_tokens, lm_head", "Frozen: all other weights; the base"],
        ),
        (
            {"lora": {"dora": True, "rslora": True, "r": 8, "targets": ["q_proj", "v_proj"], "last_layers": 4}},
            [
                "Trained: DoRA with the scale of rsLoRA of rank 8, alpha 32, on q_proj, v_proj of the last 4 decoder "
                "layers only",
                PLAIN[1],
            ],
        ),
        (
            {
                "lora": {"start_from": "me/earlier@v1", "rank_pattern": {"q_proj": 8}, "dropout": 0.1},
                "train": {"lora_plus_ratio": 16, "neftune_alpha": 5},
            },
            [
                "Trained: LoRA of rank 16, alpha 32, dropout 0.1, on all-linear",
                "Another rank: 8 on q_proj",
                PLAIN[1],
                "Begun from an earlier adapter: me/earlier@v1",
                "LoRA+: the B matrices learn at 16 times the rate",
                "NEFTune: noise on the embeddings while training, alpha 5",
            ],
        ),
    ],
    ids=["plain", "whole", "layers", "tricks"],
)
def test_what_was_trained_is_said_and_nothing_else(changes: dict[str, Any], lines: list[str]) -> None:
    assert trained(recipe(**changes)) == lines
    part = re.sub(r"\\(.)", r"\1", card(recipe=recipe(**changes)).split("## Training")[1].split("## Evaluation")[0])
    assert all(f"- {line}\n" in part for line in lines)
