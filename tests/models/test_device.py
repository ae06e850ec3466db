"""What is evaluated and certified computes as it was trained: in bf16, with fp32 for what was trained whole."""

import dataclasses

import pytest
import torch
from peft import PeftModel

from finetune.merge.blocks import merged_tensor
from finetune.merge.nf4_round_trip import RoundTrip
from finetune.merge.plan import plan_merge
from finetune.merge.unmerged import attach_empty
from finetune.models import loading
from finetune.models.layerwise import StreamedModel, empty_model
from finetune.recipe import Lora, Quantization
from finetune.train import trainer as train_trainer
from tests.helpers.trainings import documents, job, trained, unpacked

IDS = torch.arange(5, 45)[None]
WHOLE = ["embed_tokens", "lm_head", "norm"]
NF4 = Quantization(double=False)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


@pytest.mark.parametrize(
    "quantization, whole",
    [(NF4, WHOLE), (None, WHOLE), pytest.param(NF4, [], marks=pytest.mark.slow)],
    ids=["nf4", "sixteen bits", "nothing whole"],
)
def test_a_bf16_training_is_evaluated_and_certified_bit_for_bit(quantization, whole, load, base, ctx, tmp_path):
    values = job(tmp_path, max_steps=2, batch_rows=6)
    values = dataclasses.replace(values, lora=Lora(r=4, dropout=0, modules_to_save=whole), precision="bf16")
    result, moved = trained(values, load(quantization, "bf16"), base, unpacked(documents()), ctx)
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(result.model)
    folder = tmp_path / "adapter"
    train_trainer.save_adapter(result.model, folder, "owner/base", None)

    attached = loading.attach_adapter(load(quantization, "bf16"), folder)
    assert torch.equal(logits(attached), expected)
    saved = [p for n, p in attached.named_parameters() if "modules_to_save" in n]
    assert {p.dtype for p in saved} <= {torch.float32} and bool(saved) == bool(whole)
    with attached.disable_adapter():
        assert (logits(attached) - logits(load(quantization, "bf16"))).abs().max() < 0.05 < expected.abs().max()
    new = attached.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert new.shape == (1, 44)

    plain = PeftModel.from_pretrained(load(quantization, "bf16"), folder)
    assert not torch.equal(logits(plain), expected)  # where it is equal, `trained_precision` is no longer needed

    trip = RoundTrip("nf4", False, "bfloat16") if quantization else None
    empty = empty_model(base, "bfloat16")
    weights = attach_empty(empty, folder, plan_merge(base, folder, "bfloat16", trip))
    streamed = StreamedModel(empty, weights, autocast=torch.bfloat16)
    (hidden,) = streamed.hidden([IDS])
    with streamed.head() as head:
        off = head(hidden[0]).float() - expected[0]
        # nothing where the same kernels are taken; 8e-3 where a 4-bit layer answers an fp32 stream in 16 bits
        assert off.norm() / expected.norm() < 1e-3

    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)) if whole else ():
        merged = merged_tensor(plan_merge(base, folder, name), "model.norm.weight")  # rounded once, from fp32
        (norm,) = [w for n, w in moved.items() if n.startswith("base_model.model.model.norm.")]
        assert torch.equal(merged, norm.to(dtype)) and not torch.equal(norm, norm.bfloat16().float())
