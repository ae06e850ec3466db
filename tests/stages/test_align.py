"""Stage align on hand-made outputs of pairs, train and render: adapter, figures, what is copied."""

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from finetune.recipe import Model, Quantization, Train
from finetune.stages import align
from tests.helpers.preferences import judged_rows, pair_rows, start_adapter, write_pairs

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
LN_2 = 0.69314718
TEMPLATE = {"name": "t", "terminators": [2], "pad_token": "<unk>", "bos": True}


@pytest.fixture
def inputs(base, load, ctx, tmp_path):
    """Folders as the stages before leave them."""
    from tests.helpers.trainings import loader  # noqa: F401

    start = start_adapter(load(), tmp_path / "train" / "adapter")
    (start / "template").mkdir()
    (start / "template" / "template.json").write_text(json.dumps(TEMPLATE))
    (start / "chat_template.jinja").write_text("{{ messages }}")
    write_pairs(tmp_path / "pairs" / "train.parquet", pair_rows(16))
    write_pairs(tmp_path / "pairs" / "eval.parquet", pair_rows(10, seed=1))
    ids = [[5, 6, 7, 8, 9, 10], [6, 9, 12, 15, 18, 2]]
    (tmp_path / "render").mkdir()
    rows = {"id": ["a", "b"], "input_ids": ids, "mask": [[0, 0, 0, 1, 1, 1]] * 2, "truncated": [False, False]}
    pq.write_table(pa.table(rows), tmp_path / "render" / "eval.parquet")
    return {name: tmp_path / name for name in ("train", "pairs", "render")} | {"base": tmp_path / "pinned"}


def spec(base, method="dpo", loss="sigmoid", **train):
    settings = {"learning_rate": 2e-2, "batch_rows": 4, "max_steps": 8, "warmup_fraction": 0, "optimizer": "adamw"}
    return align.Spec(
        seed=0, model=Model.model_validate(str(base)), quantization=Quantization(double=False),
        train=Train(**{**settings, **train}), method=method, loss=loss, beta=0.1,
    )  # fmt: skip


@DEVICES
def test_the_aligned_adapter_is_whole_and_its_figures_are_on_disk(device, base, inputs, ctx, tmp_path):
    """On a GPU this is the proof before step 1, in its precision, and what the plan chose for it."""
    out = tmp_path / "out"
    out.mkdir()
    metrics = align.run(spec(base), inputs, out, replace(ctx, device=device))
    assert metrics["device"] == ("cpu" if device == "cpu" else torch.cuda.get_device_name())
    assert metrics["first_loss"] == pytest.approx(LN_2, abs=1e-6 if device == "cpu" else 5e-3)
    before, after = (load_file(str(p / "adapter" / "adapter_model.safetensors")) for p in (inputs["train"], out))
    assert before.keys() == after.keys() and any((before[n] != after[n]).any() for n in before)
    assert not (out / "adapter" / "ref").exists()
    assert (out / "adapter" / "template" / "template.json").is_file()
    figures = json.loads((out / "preference.json").read_text())
    assert metrics.items() >= figures.items() and metrics["first_loss"] > metrics["loss"]
    assert figures["eval_pairs"] == 10 and set(figures["by_source"]) == {"kind0", "kind1"}
    assert figures["margin"] > 0 and figures["mean_kl_from_start"] > 0
    assert figures["perplexity_start"] > 0 and figures["answers"] == 2


@DEVICES
def test_kto_takes_single_answers(device, base, inputs, ctx, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    write_pairs(inputs["pairs"] / "train.parquet", judged_rows(16))
    write_pairs(inputs["pairs"] / "eval.parquet", judged_rows(10, seed=1))
    metrics = align.run(spec(base, "kto", "kto"), inputs, out, replace(ctx, device=device))
    assert metrics["eval_pairs"] == 10 and metrics["accuracy"] > 0.5
