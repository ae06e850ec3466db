"""The watchdogs are silent on noisy curves and stop a lost run, with its rows; a full device halves the micro-batch."""

import json
import math
import random
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from finetune.errors import FinetuneError
from finetune.recipe import Lora, Runtime
from finetune.train import oom, recipe_trainer
from finetune.train.checkpoint import last_checkpoint
from finetune.train.divergence import IN_A_ROW, MOST_OVERFLOWS, ROW, Recorder, Watchdog, name_rows
from tests.helpers.trainings import assert_close, documents, job, packed, trained, unpacked

POISON = 399  # a token that no document holds unless a test puts it there


def alarms(losses, norms=None, fp16=False):
    dog = Watchdog(fp16=fp16)
    found = [dog.look(i + 1, loss, norms[i] if norms else 1.0) for i, loss in enumerate(losses)]
    return [a for a in found if a]


# --- silent


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("noise", [0.02, 0.15, 0.4])
def test_noisy_curves_that_fall_are_let_be(seed, noise):
    chance = random.Random(seed)
    start, floor = chance.uniform(1.2, 8), chance.uniform(0.05, 1)
    curve = [(floor + (start - floor) * math.exp(-i / 60)) * chance.lognormvariate(0, noise) for i in range(400)]
    assert not alarms(curve)


@pytest.mark.parametrize("seed", range(8))
def test_batches_of_one_row_and_epochs_that_step_down_are_let_be(seed):
    chance = random.Random(seed)
    rows = [chance.choice([0.1, 0.6, 1.5, 3.0]) * chance.lognormvariate(0, 0.2) for _ in range(120)]
    curve = [loss * level for level in (1.0, 0.6, 0.3) for loss in chance.sample(rows, len(rows))]
    assert not alarms(curve)


def test_a_spike_that_mends_itself_is_let_be():
    calm = [2.0 + 0.1 * math.sin(i) for i in range(60)]
    assert not alarms([*calm, *[9.0] * (IN_A_ROW - 1), *calm, *[9.0] * (IN_A_ROW - 1), *calm])


def test_fp16_overflows_and_a_moment_without_gradient_are_let_be():
    overflows = [float("inf")] * MOST_OVERFLOWS
    assert not alarms([1.0] * (MOST_OVERFLOWS + 1), [*overflows, 1.0], fp16=True)
    assert not alarms([1.0] * 10, [0.0, 0.0, 0.0, 0.0, 1.0] * 2)


# --- firing


@pytest.mark.parametrize("calm", [1, 5, 30, 200])
def test_a_loss_that_stays_far_above_its_level_is_an_alarm(calm):
    (alarm,) = alarms([1.3 + 0.1 * math.sin(i) for i in range(calm)] + [7.5] * IN_A_ROW)
    assert alarm.diverged and alarm.since == calm + 1
    assert "for 5 steps" in alarm.reason and "train.learning_rate" in alarm.advice


def test_no_number_and_no_gradient_are_alarms():
    assert "loss became nan at step 3" in alarms([1.0, 1.0, math.nan])[0].reason
    assert "grad_norm became inf at step 2" in alarms([1.0, 1.0], [1.0, math.inf])[0].reason
    assert len(alarms([1.0] * (MOST_OVERFLOWS + 1), [math.inf] * (MOST_OVERFLOWS + 1), fp16=True)) == 1
    assert "exactly zero" in alarms([1.0] * 7, [1.0, 1.0] + [0.0] * 5)[0].reason


# --- rows


def test_the_row_numbers_are_noted_and_go_no_further():
    def collate(examples):
        assert all(ROW not in e for e in examples)
        return {"input_ids": torch.zeros(len(examples), max(len(e["input_ids"]) for e in examples))}

    recorder = Recorder(collate)
    recorder([{"input_ids": [1, 2, 3], ROW: 7}, {"input_ids": [1], ROW: 2}])
    recorder([{"input_ids": [1], ROW: 0}])
    first = recorder.take()
    assert (first.rows, first.tokens, first.cells) == ((7, 2), 4, 6)
    assert recorder.take().rows == (0,)


def test_rows_are_named_by_their_ids(tmp_path):
    pq.write_table(pa.table({"row_ids": [["a", "b"], ["c"]]}), tmp_path / "row_ids.parquet")
    pq.write_table(pa.table({"id": [f"r{i}" for i in range(20)], "mask": [[1]] * 20}), tmp_path / "train.parquet")
    assert name_rows([1, 0], tmp_path / "row_ids.parquet") == "Rows of this step: c, a, b"
    assert name_rows(range(10), tmp_path / "train.parquet").endswith("r6, r7 and 2 more")
    assert name_rows([3], None) == "Rows of this step: 3"
    assert name_rows([], None) == ""


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_the_rows_of_the_step_that_broke_are_named(load, base, ctx, tmp_path, layout):
    """Its embedding is no number, so the step in which the loss breaks is the one that holds the poisoned row."""
    model = load()
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = math.nan
    docs = documents(20)
    docs[13][0][0] = POISON
    if layout == "packed":
        rows = packed(docs, tmp_path)
        lengths, names = pq.read_table(rows)["seq_lengths"].to_pylist(), iter(range(20))
        ids = pa.table({"row_ids": [[f"row{next(names)}" for _ in bin_] for bin_ in lengths]})
    else:
        rows, ids = unpacked(docs), pa.table({"id": [f"row{i}" for i in range(20)]})
    pq.write_table(ids, tmp_path / "ids.parquet")
    values = replace(job(tmp_path, max_steps=30, batch_rows=2), documents=tmp_path / "ids.parquet")
    own = replace(ctx, runtime=Runtime(micro_batch_rows=1, save_steps=100))
    with pytest.raises(FinetuneError, match=r"became nan at step \d+.*Rows of this step: .*\brow13\b"):
        trained(values, model, base, rows, own)


# --- real trainings


def cycles(count=24):
    """Documents that count round and round: learned in a few steps, and lost in one."""
    chance, found = random.Random(0), []
    for _ in range(count):
        start, length = chance.randrange(8), chance.randrange(10, 20)
        ids = [5 + (start + i) % 8 for i in range(length)]
        found.append((ids, [-100] * 3 + ids[3:]))
    return unpacked(found)


def absurd(tmp_path, steps=20):
    values = job(
        tmp_path, max_steps=steps, learning_rate=0.3 * steps / 60, warmup_fraction=1, batch_rows=4, max_grad_norm=1e6,
        schedule="constant",
    )  # fmt: skip
    return replace(values, lora=Lora(r=8, alpha=16, dropout=0))


def test_an_absurd_learning_rate_stops_with_rows_and_the_last_good_checkpoint(load, base, ctx, tmp_path):
    own = replace(ctx, runtime=Runtime(save_steps=3, keep_checkpoints=50))
    values = absurd(tmp_path)
    with pytest.raises(FinetuneError, match=r"the loss is .* Rows of this step: \d+.*train.learning_rate") as caught:
        trained(values, load(None), base, cycles(), own)
    good = last_checkpoint(values.checkpoints, remove_incomplete=False)
    assert f"the last good checkpoint is {good.name}" in str(caught.value)
    losses = [json.loads(line)["loss"] for line in values.metrics_file.read_text().splitlines()]
    number = int(good.name.rpartition("-")[2])
    # The loss after the last good checkpoint is still low, and at the next checkpoint no longer.
    assert losses[number] < 1.5 < min(losses[number + 3 :])
    assert caught.value.exit_status == 1


def test_whoever_wants_that_curve_turns_the_watchdog_off(load, base, ctx, tmp_path):
    own = replace(ctx, runtime=Runtime(save_steps=100, watchdog=False))
    assert trained(absurd(tmp_path), load(None), base, cycles(), own)[0].steps == 20


def test_a_gradient_that_stays_zero_stops(load, base, ctx, tmp_path):
    model = load()
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    values = job(tmp_path, max_steps=30, warmup_fraction=1.0)
    values = replace(values, train=values.train.model_copy(update={"weight_decay": 0.5}))
    with pytest.raises(FinetuneError, match=r"exactly zero for 5 steps|has moved"):
        trained(values, model, base, unpacked(documents()), ctx)


# --- a full device


@pytest.fixture(autouse=True)
def whole_batches(monkeypatch):
    """As on a GPU, the device that these tests fill."""
    monkeypatch.setattr(recipe_trainer, "in_pieces", lambda _: False)


def full(model, most, after=0):
    """`model`, whose decoder finds no room for more than `most` rows once it has been called `after` times."""
    calls = iter(range(10**6))

    def refuse(module, args, kwargs):
        held = kwargs.get("input_ids", args[0] if args else None)
        held = kwargs.get("inputs_embeds") if held is None else held
        if next(calls) >= after and len(held) > most:
            raise torch.OutOfMemoryError("no room")

    model.get_decoder().register_forward_pre_hook(refuse, with_kwargs=True)
    return model


def test_a_full_device_trains_on_with_smaller_micro_batches_to_the_same_bits(load, base, ctx, tmp_path):
    rows, said = unpacked(documents()), []
    small = replace(ctx, runtime=Runtime(micro_batch_rows=2, save_steps=100))
    own = replace(ctx, runtime=Runtime(micro_batch_rows=4, save_steps=100), say=said.append)
    expected = trained(job(tmp_path, "small"), load(), base, rows, small)[1]
    torch.manual_seed(5)  # whatever state the process is in, a training seeds itself
    result, found = trained(job(tmp_path, "full"), full(load(), 2), base, rows, own)
    assert result.micro_batch_rows == 2
    assert any("ran out of memory with 4 rows" in line and "going on with 2" in line for line in said)
    assert all(torch.equal(expected[n], found[n]) for n in expected)


def test_it_goes_on_from_the_last_complete_checkpoint(load, base, ctx, tmp_path):
    rows, said = unpacked(documents()), []
    small = replace(ctx, runtime=Runtime(micro_batch_rows=2, save_steps=2))
    own = replace(ctx, runtime=Runtime(micro_batch_rows=4, save_steps=2), say=said.append)
    expected = trained(job(tmp_path, "small", max_steps=5), load(), base, rows, small)[1]
    calls_of_proofs, calls_of_steps = 10, 3
    model = full(load(), 2, after=calls_of_proofs + calls_of_steps)
    result, found = trained(job(tmp_path, "full", max_steps=5), model, base, rows, own)
    assert (result.micro_batch_rows, result.steps) == (2, 5)
    assert any("goes on from checkpoint-" in line and "micro_batch_rows was 4" in line for line in said)
    shared = {"batch_rows": 4, "micro_batch_rows": 4, "processes": 1, "device": "cpu", "fused_adapters": False}
    assert result.before == [{**shared, "until_step": result.resumed_from}]
    assert_close(expected, found)
    steps = [json.loads(line)["step"] for line in (tmp_path / "full" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]


def test_one_row_that_does_not_fit_ends_with_what_to_try(load, base, ctx, tmp_path):
    own = replace(ctx, runtime=Runtime(micro_batch_rows=2, save_steps=100))
    with pytest.raises(FinetuneError, match=r"1 row a micro-batch.*checkpointing=full.*max_length_tokens.*lora\.r"):
        trained(job(tmp_path), full(load(), 0, after=11), base, unpacked(documents()), own)


def test_several_processes_are_told_and_do_not_wait_for_each_other(ctx):
    def attempt(micro):
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(FinetuneError, match=r"4 rows a micro-batch.*runtime\.micro_batch_rows=2"):
        oom.halving(attempt, torch.nn.Identity(), 4, 4, replace(ctx, world=2), checkpointing=True)


def test_what_counts_as_a_full_device():
    from finetune.train.oom import is_out_of_memory

    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
