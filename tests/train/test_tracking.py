"""Trackers never ask and never wait, go on where they were, and hold no secret."""

import json
import socket
import sys
from dataclasses import replace
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import TrainerCallback

from finetune.errors import InputError
from finetune.models import loading
from finetune.recipe import Runtime, Tracking
from finetune.train import tracking
from tests.helpers.trainings import documents, job, packed, trained, unpacked

SECRET = "hf_" + "aTokenThatMustNotTravel" * 2


@pytest.fixture(autouse=True)
def no_wandb_of_ones_own(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb_home"))
    monkeypatch.setenv("HOME", str(tmp_path))


def test_online_only_with_a_key_and_a_server_that_answers():
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert tracking.wandb_mode({"WANDB_BASE_URL": url}, True)[0] == "online"
        assert tracking.wandb_mode({"WANDB_BASE_URL": url}, False)[0] == "offline"
        assert tracking.wandb_mode({"WANDB_BASE_URL": url, "WANDB_MODE": "online"}, False)[0] == "offline"
        assert tracking.wandb_mode({"WANDB_BASE_URL": url, "WANDB_MODE": "disabled"}, True)[0] == "disabled"
    mode, why = tracking.wandb_mode({"WANDB_BASE_URL": url}, True)
    assert mode == "offline" and "does not answer" in why


def test_the_identity_is_kept_beside_the_checkpoints(tmp_path):
    first = tracking.identify("recipe-run1", tmp_path / "checkpoints")
    assert tracking.identify("recipe-run2", tmp_path / "checkpoints") == first
    assert tracking.identify("recipe-run2", tmp_path / "other").wandb_id != first.wandb_id
    (tmp_path / "checkpoints" / tracking.IDENTITY).write_text('{"wandb')
    assert tracking.identify("recipe-run3", tmp_path / "checkpoints").name == "recipe-run3"


def test_no_tracker_unless_asked(ctx):
    assert tracking.open_tracker(ctx) is None


@pytest.mark.slow
def test_wandb_records_offline_goes_on_and_tells_no_secret(load, base, ctx, tmp_path):
    said = []
    own = replace(
        ctx, runtime=Runtime(save_steps=2), run_name="small-one", say=said.append,
        tracking=Tracking(wandb=True, wandb_rows=2, wandb_data=True),
        environment={"recipe": {"name": "small", "token": SECRET}},
    )  # fmt: skip
    rows = packed(documents(), tmp_path)
    lengths = pq.read_table(rows)["seq_lengths"].to_pylist()
    pq.write_table(pa.table({"row_ids": [["someRow"] * len(b) for b in lengths]}), tmp_path / "row_ids.parquet")
    values = replace(job(tmp_path, max_steps=2), documents=tmp_path / "row_ids.parquet")
    trained(values, load(), base, rows, own)
    longer = replace(values, train=values.train.model_copy(update={"max_steps": 4}))
    trained(longer, load(), base, rows, replace(own, run_name="small-two"))
    runs = sorted((own.scratch / "tracking" / "small-one").glob("wandb/offline-run-*"))
    assert len(runs) == 2 and len({r.name.rpartition("-")[2] for r in runs}) == 1  # one id, as before
    assert not (own.scratch / "tracking" / "small-two").exists()
    assert sum("W&B offline, there is no key" in line for line in said) == 2
    files = [p for p in (own.scratch / "tracking").rglob("*") if p.is_file()]
    assert not [p for p in files if SECRET.encode() in p.read_bytes()]
    tables = [json.loads(p.read_text()) for p in files if p.name.endswith(".table.json")]
    assert [t["columns"] for t in tables] == [["id", "tokens", "text", "learned"]]
    assert len(tables[0]["data"]) == 2 and "someRow" in tables[0]["data"][0][0]
    record = b"".join(p.read_bytes() for p in files if p.suffix == ".wandb")
    assert b"training-data" in record and b"packed.parquet" in record


def test_tensorboard_holds_what_metrics_jsonl_holds_also_after_a_resume(load, base, ctx, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    own = replace(ctx, runtime=Runtime(save_steps=2), tracking=Tracking(tensorboard=True), run_name="small-one")
    values = job(tmp_path, max_steps=2)
    trained(values, load(), base, unpacked(documents()), own)
    longer = replace(values, train=values.train.model_copy(update={"max_steps": 3}))
    trained(longer, load(), base, unpacked(documents()), replace(own, run_name="small-two"))
    (folder,) = (own.scratch / "tracking").iterdir()
    assert folder.name == "small-one" and len(list(folder.glob("events*"))) == 2
    events = reader.EventAccumulator(str(folder))
    events.Reload()
    lines = [json.loads(line) for line in values.metrics_file.read_text().splitlines()]
    assert set(events.Tags()["scalars"]) == {f"train/{name}" for line in lines for name in line}
    for name in ("loss", "grad_norm", "learning_rate", "tokens_per_second", "non_pad", "eta_seconds"):
        points = events.Scalars(f"train/{name}")
        assert [p.step for p in points] == [1, 2, 3]
        assert [p.value for p in points] == pytest.approx([line[name] for line in lines], rel=1e-6)


class Gone:
    """A W&B run whose process was killed."""

    calls = 0

    def log(self, *figures, **step):
        self.calls += 1
        raise ConnectionResetError("Connection lost")


def test_a_training_goes_on_without_wandb_once_its_process_is_gone():
    said, run = [], Gone()
    tracker = tracking.Tracker(run, None, said.append)
    for step in (1, 2):
        tracker.log({"loss": 2.0}, step)
    tracker.send_rows([{"id": "a"}])
    tracker.close()
    assert run.calls == 1 and len(said) == 1
    assert "W&B failed (Connection lost); the training continues without it; metrics.jsonl" in said[0]


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_training_begins_without_wandb_where_that_cannot(mode, ctx, monkeypatch):
    import wandb

    def killed(**settings):
        raise RuntimeError("wandb-core exited with code -9")

    said = []
    monkeypatch.setattr(wandb, "init", killed)
    monkeypatch.setattr(tracking, "has_wandb_key", lambda: mode == "online")
    monkeypatch.setattr(tracking, "wandb_mode", lambda environment, has_key: (mode, "as this test says"))
    tracker = tracking.open_tracker(replace(ctx, tracking=Tracking(wandb=True), say=said.append))
    tracker.log({"loss": 2.0}, 1)
    assert "W&B failed (wandb-core exited with code -9)" in said[-1]


def test_without_tensorboard_it_says_so(ctx, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="tensorboard is not installed"):
        tracking.open_tracker(replace(ctx, tracking=Tracking(tensorboard=True)), tmp_path / "checkpoints")


def test_the_seconds_of_a_resumed_training_go_on_and_every_figure_is_there(load, base, ctx, tmp_path):
    own = replace(ctx, runtime=Runtime(save_steps=2))
    values = job(tmp_path, max_steps=2)
    trained(values, load(), base, unpacked(documents()), own)
    longer = replace(values, train=values.train.model_copy(update={"max_steps": 4}))
    trained(longer, load(), base, unpacked(documents()), own)
    lines = [json.loads(line) for line in values.metrics_file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(a["seconds"] < b["seconds"] and a["tokens"] < b["tokens"] for a, b in pairwise(lines))
    assert lines[-1].keys() >= {
        "loss", "grad_norm", "learning_rate", "tokens_per_second", "non_pad", "peak_memory_bytes", "eta_seconds",
    }  # fmt: skip
    assert all(0.3 < line["non_pad"] <= 1 for line in lines) and min(line["non_pad"] for line in lines) < 1
    assert lines[-1]["eta_seconds"] == 0


def test_rows_are_shown_as_a_person_reads_them(base, ctx):
    from datasets import Dataset

    class Kept(tracking.Tracker):
        def send_rows(self, rows):
            self.rows = rows

    tracker, (ids, labels) = Kept(None, None), documents()[0]
    own = replace(ctx, tracking=Tracking(wandb_rows=5))
    tokenizer = loading.load_tokenizer(base)
    tracking.show_data(tracker, own, Dataset(unpacked([(ids, labels)])), tokenizer, None)
    (row,) = tracker.rows
    assert (row["id"], row["tokens"]) == ("0", len(ids))
    assert row["text"].endswith(row["learned"]) and row["learned"]


def test_report_to_takes_the_names_of_transformers_integrations():
    from typing import get_args

    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    from finetune.recipe.outlets import Reporter

    assert {*get_args(Reporter), "wandb", "tensorboard"} == set(INTEGRATION_TO_CALLBACK)
    with pytest.raises(ValueError, match="report_to"):
        Tracking(report_to=["wandb"])


def test_a_tracker_that_is_not_installed_is_named_with_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(InputError, match=r"tracking.report_to: trackio: .*pip install trackio"):
        tracking.integration("trackio")


class Reports(TrainerCallback):
    """Stands for a tracker's callback."""

    seen: list = []
    fails_at = 0

    def on_init_end(self, args, state, control, **_):
        self.seen.append("init")

    def on_log(self, args, state, control, logs=None, **_):
        if state.global_step == self.fails_at:
            raise ConnectionError("the server is gone")
        self.seen.append((args.project, args.run_name, state.global_step, logs["loss"]))


@pytest.fixture
def reports(monkeypatch):
    from transformers.integrations import integration_utils

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "trackio", Reports)
    monkeypatch.setattr(Reports, "seen", [])
    return Reports


def test_an_integration_gets_every_step_and_its_failure_ends_no_training(load, base, ctx, tmp_path, reports):
    said = []
    own = replace(
        ctx, say=said.append, run_name="small-one", runtime=Runtime(save_steps=2),
        tracking=Tracking(report_to=["trackio", "trackio"], wandb_project="mine"),
    )  # fmt: skip
    values = job(tmp_path, max_steps=2)
    trained(values, load(), base, unpacked(documents()), own)
    reports.fails_at = 4
    longer = replace(values, train=values.train.model_copy(update={"max_steps": 5}))
    trained(longer, load(), base, unpacked(documents()), replace(own, run_name="small-two"))
    logged = [json.loads(line) for line in values.metrics_file.read_text().splitlines()]
    assert [line["step"] for line in logged] == [1, 2, 3, 4, 5]
    steps = [seen for seen in reports.seen if seen != "init"]
    assert steps == [("mine", "small-one", line["step"], pytest.approx(line["loss"])) for line in logged[:3]]
    assert reports.seen.count("init") == 2  # once a process
    assert sum("trackio failed (the server is gone); the training continues" in line for line in said) == 1
