"""The dry run of a step against the storages that really live in one."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from finetune.estimate.activations import POLICIES, MicroBatch, peak
from tests.helpers.small_models import PARTIAL, adapted, apply, config, measured, predicted, quantized

TOLERANCE = 0.02
SIZES = {  # (hidden, intermediate, layers, heads, key-value heads), rows, length, packed, 16 bits, targets, dropout
    "128x8-all-linear": ((128, 256, 8, 4, 2), 1, 128, False, False, None, 0.0),
    "256x4-packed-bf16-dropout": ((256, 704, 4, 4, 2), 1, 192, True, True, PARTIAL, 0.1),
    "512x4-padded": ((512, 1408, 4, 8, 2), 2, 64, False, False, PARTIAL, 0.0),
    "1024x4-dropout": ((1024, 2816, 4, 8, 2), 1, 64, False, True, None, 0.1),
}


@pytest.mark.parametrize(
    ("size", "fused"),
    [
        *((size, fused) for size in list(SIZES)[:2] for fused in (False, True)),
        pytest.param("512x4-padded", True, marks=pytest.mark.slow),
        pytest.param("1024x4-dropout", False, marks=pytest.mark.slow),
    ],
)
def test_the_peak_is_what_lives_under_every_policy(size, fused, tmp_path):
    shape, rows, length, packed, half, targets, dropout = SIZES[size]
    made = config(*shape)
    model = adapted(quantized(made, tmp_path, torch.bfloat16 if half else torch.float32), targets, dropout, fused)
    seen = {}
    for policy in POLICIES:
        apply(model, policy)
        batch = MicroBatch(rows, length, mask=packed or rows > 1, half=half, cuda=False, policy=policy, fused=fused)
        parts = predicted(made, targets, dropout, batch)
        seen[policy] = measured(model, batch, packed)
        assert sum(parts.values()) == pytest.approx(seen[policy], rel=TOLERANCE), (policy, parts)
        model.zero_grad(set_to_none=True)
        if policy != "none":
            model.disable_input_require_grads()
    assert seen["none"] > seen["every_4"] > seen["every_2"] > seen["selective"] >= seen["full"]


@pytest.mark.slow
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_gradients_that_lie_there_do_not_count_and_the_scores_without_a_fused_kernel_do(half, tmp_path):
    made = config(512, 512, 4, 16, 4)
    model = adapted(quantized(made, tmp_path, torch.bfloat16 if half else torch.float32), None, 0.0)
    for policy in ("none", "full"):
        apply(model, policy)
        for held in (False, True):
            batch = MicroBatch(1, 512, mask=False, half=half, cuda=False, policy=policy, held=held, scores=True)
            with sdpa_kernel(SDPBackend.MATH):
                lived = measured(model, batch)
            assert sum(predicted(made, None, 0.0, batch).values()) == pytest.approx(lived, rel=0.05), (policy, held)
        model.zero_grad(set_to_none=True)


def test_a_gpu_dequantises_in_forward_too_and_keeps_what_it_keeps():
    made = config(512, 1024, 4, 8, 2)
    cpu, gpu = (
        predicted(made, None, 0.1, MicroBatch(1, 512, mask=False, half=True, cuda=cuda)) for cuda in (False, True)
    )
    assert gpu["activations"] < cpu["activations"]  # no fp32 copies of the adapters' inputs, dropout as booleans
    full, selective, offload = (
        sum(predicted(made, None, 0.1, MicroBatch(1, 512, False, True, True, policy)).values())
        for policy in ("full", "selective", "offload")
    )
    assert offload <= full <= selective


OTHERS = {  # the worst below, and the worst above
    "phi": {"partial_rotary_factor": 0.5, "num_key_value_heads": 8},
    "opt": {"ffn_dim": 1024, "word_embed_proj_dim": 256},
    "gpt_neox": {}, "starcoder2": {}, "qwen3": {}, "olmo2": {}, "phi3": {"pad_token_id": 0}, "stablelm": {},
    "cohere": {}, "nemotron": {},
}  # fmt: skip


@pytest.mark.parametrize("kind", [k if k == "phi" else pytest.param(k, marks=pytest.mark.slow) for k in OTHERS])
def test_layers_that_are_not_llamas_stay_within_what_plan_says_of_the_estimate(kind, tmp_path):
    """The layers' part: what is held without checkpointing and not with it. Everything else is the same for all."""
    import json

    from transformers import AutoConfig, AutoModelForCausalLM

    from finetune.estimate.memory import OTHER_LAYERS
    from finetune.estimate.shapes import decoder, shapes_of
    from finetune.recipe import Lora

    sizes = {
        "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 512, "sliding_window": None,
        "use_sliding_window": False, **OTHERS[kind],
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).requires_grad_(False)
    model.config.save_pretrained(tmp_path)
    shapes = shapes_of(json.loads((tmp_path / "config.json").read_text()))
    assert shapes is not None and shapes.inventory is not None
    whole, found = adapted(model, None, 0.0), {}
    for policy in ("none", "full"):
        apply(whole, policy)
        batch = MicroBatch(rows=1, length=128, mask=False, half=False, cuda=False, policy=policy)
        parts = peak(decoder(shapes, Lora(r=8), quantized=False), batch)
        found[policy] = measured(whole, batch), sum(parts.values()) + OTHER_LAYERS * parts["activations"]
    real, said = (a - b for a, b in zip(found["none"], found["full"], strict=True))
    assert 1.0 <= said / real <= 2.2
