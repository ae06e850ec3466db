"""Trainings of seconds on a tiny quantised model, for the tests of what surrounds a training."""

import pyarrow as pa
import pytest
import torch

from finetune.context import Context
from finetune.lora import config as lora_config
from finetune.models import loading
from finetune.recipe import Lora, Model, Quantization, Runtime, Tracking, Train
from finetune.train import trainer as train_trainer
from tests.e2e.conftest import make_workspace

LENGTH = 48


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("sft")).folder / "base"


@pytest.fixture
def ctx(tmp_path):
    return Context(scratch=tmp_path / "scratch", runtime=Runtime(save_steps=100), tracking=Tracking(), device="cpu")


def loader(base, ctx, tmp_path):
    """A function that loads `base`, pinned, as it is trained."""
    from finetune.stages.base import Spec, run

    folder = tmp_path / "pinned"
    folder.mkdir()
    model = Model.model_validate(str(base))
    run(Spec(model=model), {}, folder, ctx)
    return lambda quantization=Quantization(double=False), precision="fp32", attention=None: (  # noqa: B008
        loading.load_base(model, folder, ctx, quantization, precision, "cpu", attention)
    )


@pytest.fixture
def load(base, ctx, tmp_path):
    return loader(base, ctx, tmp_path)


def documents(count=12):
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        n = int(torch.randint(6, 20, (), generator=generator))
        ids = torch.randint(5, 300, (n,), generator=generator).tolist()
        found.append((ids, [-100] * (n // 2) + ids[n // 2 :]))
    return found


def unpacked(rows):
    return pa.table({"input_ids": [r[0] for r in rows], "labels": [r[1] for r in rows]})


def packed(rows, tmp_path):
    import pyarrow.parquet as pq

    bins = [[]]
    for row in rows:
        if sum(len(r[0]) for r in bins[-1]) + len(row[0]) > LENGTH:
            bins.append([])
        bins[-1].append(row)
    table = pa.table(
        {
            "input_ids": [[t for r in b for t in r[0]] for b in bins],
            "labels": [[t for r in b for t in r[1]] for b in bins],
            "seq_lengths": [[len(r[0]) for r in b] for b in bins],
        }
    )
    pq.write_table(table, tmp_path / "packed.parquet")
    return tmp_path / "packed.parquet"


def job(tmp_path, name="run", **train):
    settings = {"learning_rate": 1e-2, "batch_rows": 4, "max_steps": 3, "warmup_fraction": 0, "optimizer": "adamw"}
    (tmp_path / name).mkdir()
    return train_trainer.Job(
        seed=0, lora=Lora(r=4, dropout=0), train=Train(**{**settings, **train}), precision="fp32",
        device="cpu", checkpointing="none", checkpoints=tmp_path / name / "checkpoints",
        metrics_file=tmp_path / name / "metrics.jsonl",
    )  # fmt: skip


def trained(job, model, base, rows, ctx):
    result = train_trainer.train(job, model, loading.load_tokenizer(base), rows, ctx)
    weights = {n: p.detach().clone() for n, p in result.model.named_parameters() if p.requires_grad}
    return result, weights


def assert_close(first, second, tolerance=2e-4):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.allclose(first[name], second[name], atol=tolerance), name


def build_trainer(model, base, rows, folder, lora, kind=None, **arguments):
    """The trainer as `sft` makes it, before anything is proved; `rows` is a table with or without seq_lengths."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    settings = SFTConfig(
        str(folder), per_device_train_batch_size=1, max_steps=4, packing="seq_lengths" in rows.column_names,
        packing_strategy="bfd", max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, use_cpu=True,
        report_to="none", activation_checkpointing=False, disable_tqdm=True, bf16=False, **arguments,
    )  # fmt: skip
    trainer = (kind or SFTTrainer)(
        model=model, args=settings, train_dataset=Dataset(rows), processing_class=loading.load_tokenizer(base),
        peft_config=lora_config.lora_config(lora),
    )  # fmt: skip
    train_trainer.recast_adapters(trainer.model)
    return trainer
