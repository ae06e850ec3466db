"""What the train stage makes of `auto`: on a GPU the fastest that fits, on a CPU what it always was."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune.context import Context
from finetune.estimate import choice
from finetune.recipe import Runtime, Tracking
from finetune.recipe.load import load_recipe
from finetune.stages import train
from finetune.train import batch
from finetune.utils.resources import resource


@pytest.fixture
def base(tmp_path):
    config = resource("shapes", "mistralai--Mistral-7B-Instruct-v0.2.json").read_text()
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "base.json").write_text(json.dumps({"parameters": 7_241_732_096}))
    return tmp_path


@pytest.fixture
def rows(tmp_path):
    pq.write_table(pa.table({"input_ids": [[1] * 2048, [1] * 600]}), tmp_path / "packed.parquet")
    return tmp_path / "packed.parquet"


def decide(base, rows, device, monkeypatch, gigabytes=0, varlen=True, world=1, **runtime):
    said = []
    monkeypatch.setattr(choice, "this_gpu", lambda device, world: ("NVIDIA A100", int(gigabytes * 1e9), True))
    spec = train.spec(load_recipe("zephyr-7b-qlora").recipe)
    ctx = Context(scratch=base, runtime=Runtime(**runtime), tracking=Tracking(), say=said.append, world=world)
    policy, micro, worth_fusing, compiled = train._decide(spec, base, rows, device, ctx, varlen=varlen)
    assert not compiled  # two rows are few
    assert worth_fusing == (device == "cuda")  # a 7B's rows keep an A100 busy, as they are asked for here
    return (policy, micro), said


def test_a_cpu_goes_by_the_size_of_the_base(base, rows, monkeypatch):
    assert decide(base, rows, "cpu", monkeypatch) == (("full", None), [])
    (base / "base.json").write_text(json.dumps({"parameters": 1_000_000}))
    assert decide(base, rows, "cpu", monkeypatch)[0] == ("none", None)
    assert decide(base, rows, "cpu", monkeypatch, checkpointing="every_2")[0] == ("every_2", None)


def test_a_gpu_takes_the_fastest_that_fits_what_is_free_and_says_so(base, rows, monkeypatch):
    (policy, most), said = decide(base, rows, "cuda", monkeypatch, 85)
    assert policy == "none" and most > 1
    assert said == [f"train: {most} rows at once and checkpointing none: {said[0].split(': ')[2]}"]
    (policy, few), _ = decide(base, rows, "cuda", monkeypatch, 15)
    assert policy != "none" and few <= most
    assert decide(base, rows, "cuda", monkeypatch, 85, memory_budget_gb=15)[0] == (policy, few)
    assert decide(base, rows, "cuda", monkeypatch, 85, varlen=False)[0][1] == 1  # a dense mask
    asked = decide(base, rows, "cuda", monkeypatch, 85, checkpointing="full", micro_batch_rows=2)
    assert asked[0] == ("full", 2)


def test_rows_are_as_long_as_the_longest_that_is_there(rows):
    assert batch.longest_row(rows) == 2048
    assert batch.longest_row(pa.table({"input_ids": [[1, 2], [1, 2, 3]]})) == 3
