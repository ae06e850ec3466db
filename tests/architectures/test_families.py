"""Many families from base to merge: what was merged is peft's merge, and what was certified is the ordinary forward.

`python -m tests.architectures.table` writes docs/architectures.md from the same runs.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.errors import InputError
from finetune.merge.blocks import merged_tensor
from finetune.merge.plan import plan_merge
from finetune.merge.unmerged import attach_empty
from finetune.models.inventory import read_inventory
from finetune.models.layerwise import StreamedModel, empty_model
from finetune.pipeline import preflight
from finetune.utils.files import read_json
from tests.architectures import table
from tests.architectures.through import Laboratory, Through
from tests.helpers import families

FAST = ("gemma2", "gpt_neox", "qwen3_moe", "falcon_h1")  # capped scores, a renamed head, experts, no packing
IDS = (torch.arange(220).reshape(2, 110) * 7) % 300 + 3
REFUSED = {  # what plan and run say after the stage base, before any other
    "recurrent_gemma": "gives other log-probabilities",  # TRL's head does not cap its logits
    "llama4 text": "TRL's training forward fails",
    "gemma3n text": "fails on matrices in 4 bits",
}


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    return Laboratory(tmp_path_factory.mktemp("families"))


def every_family() -> list[object]:
    return [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in families.FAMILIES]


@pytest.mark.parametrize("family", every_family())
def test_a_family_goes_from_base_to_merge(family: str, laboratory: Laboratory) -> None:
    done = laboratory.run(family, "base" if family in REFUSED else "export")
    base = laboratory.base(family)
    assert table.row(family, base, done) in page(), "python -m tests.architectures.table"
    if family in REFUSED:
        with pytest.raises(InputError, match=REFUSED[family]):
            preflight.check_adapter(done.recipe, done.folders["base"])
        return
    preflight.check_adapter(done.recipe, done.folders["base"])
    model = families.build(family, vocabulary=len(laboratory.tokenizer))
    assert done.metrics["base"]["parameters"] == model.num_parameters()
    if family in families.WRAPPED:
        assert any("the other parts (vision) are not loaded" in line for line in done.said)
    check_packing(done)
    check_logits(base, done, *check_merge(base, done))
    if "export" in done.folders:
        assert done.metrics["export"]["reload_difference"]["model-f32.gguf"] <= 1e-6


def page() -> list[str]:
    return table.PAGE.read_text(encoding="utf-8").splitlines()


def check_packing(done: Through) -> None:
    """Rows were packed beyond 200 tokens, or training says why not."""
    packs = read_json(done.folders["base"] / "architecture.json")["packing"] is None
    assert packs == done.metrics["base"]["packing"] == (done.folders["pack"] / "packed.parquet").exists()
    if packs:
        assert done.metrics["pack"]["longest"] > 200
    else:
        assert done.metrics["pack"]["off"] and any(line.startswith("pack: off: ") for line in done.said)


def forward(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def check_merge(base: Path, done: Through) -> tuple[torch.Tensor, torch.Tensor]:
    """The merged folder holds peft's merge in fp32, under the base's names and in its own class.

    Returns the logits of the base with its adapter, and of the merged model.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    start = {n: t.clone() for n, t in original.state_dict().items()}
    model = PeftModel.from_pretrained(original, done.folders["train"] / "adapter")
    trained = forward(model)
    expected = model.merge_and_unload().state_dict()
    merged = done.folders["merge"]
    found, report = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    state = found.state_dict()
    assert set(state) == set(expected)
    for name, weight in expected.items():
        torch.testing.assert_close(state[name], weight, rtol=0, atol=1e-6, msg=name)
    changed = {n for n, t in start.items() if not torch.equal(t, state[n])}
    inventory = read_inventory(done.folders["base"])
    assert inventory is not None and len(changed) == done.metrics["merge"]["changed_tensors"] > 0
    assert {n.removesuffix(".weight") for n in changed} == {
        *inventory.quantized, *inventory.other_linears
    } - set(inventory.not_adapted)  # fmt: skip
    assert set(load_file(merged / "model.safetensors")) == set(load_file(base / "model.safetensors"))
    return trained, forward(found)


def check_logits(base: Path, done: Through, of_trained: torch.Tensor, of_merged: torch.Tensor) -> None:
    """What certify compares, layer by layer, is what the ordinary forward of each model gives."""
    adapter = done.folders["train"] / "adapter"
    plan = plan_merge(base, adapter, "float32")
    trained = empty_model(base)
    for streamed, expected in (
        (StreamedModel(trained, attach_empty(trained, adapter, plan)), of_trained),
        (StreamedModel(empty_model(base), partial(merged_tensor, plan)), of_merged),
    ):
        hidden = streamed.hidden([IDS])[0]
        with streamed.head() as head:
            logits = head(hidden.reshape(-1, hidden.shape[-1])).reshape(expected.shape)
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-4)


def test_at_least_forty_families_are_tried() -> None:
    assert len(families.FAMILIES) >= 40 and set(FAST) <= set(families.FAMILIES)
