"""A run's finished stages and checkpoints in a private repository: the real client, a Hub on the loopback."""

import json

import pytest

from finetune.context import Context
from finetune.errors import InputError
from finetune.pipeline.mirror import Mirror
from finetune.pipeline.runs import Run, StageRecord
from finetune.pipeline.store import BUILDING, Manifest, Store, output_digest
from finetune.recipe import Runtime, Tracking
from tests.helpers.hub_server import point_client, serve

REPO = "me/runs"
INGEST, TRAIN, MERGE = ("ingest", "1" * 32), ("train", "2" * 32), ("merge", "3" * 32)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serve() as running:
        point_client(monkeypatch, running, tmp_path / "hf_home")
        yield running


class Machine:
    """One machine's folders, its run of the recipe, and what was said there."""

    def __init__(self, folder):
        self.store, self.said = Store(folder / "artifacts", folder / "scratch"), []
        self.run = Run(self.store.artifacts, "small", "name: small\n", (), "0" * 8, write=True)
        ctx = Context(self.store.scratch, Runtime(), Tracking(), say=self.said.append)
        self.mirror = Mirror(REPO, self.store, self.run, ctx)
        self.mirror._end.set()  # its retries do not wait

    def folder(self, stage):
        return self.store.folder(*stage, large=stage == MERGE)

    def write(self, stage, files):
        for name, content in files.items():
            path = self.folder(stage) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        self.note(stage, "partial")

    def note(self, stage, status):
        self.run.note(StageRecord(stage[0], status, self.folder(stage), stage[1]))
        self.run.save()

    def finish(self, stage, files):
        self.write(stage, files)
        entries = self.store.read_files(self.folder(stage), {}, skip="checkpoints")
        empty = {"spec": {}, "fingerprint": {}, "inputs": {}, "metrics": {}, "environment": {}}
        manifest = Manifest(
            stage=stage[0], version=1, key=stage[1], files=entries, digest=output_digest(entries), seconds=0.0,
            peak_memory_bytes=0, **empty,
        )  # fmt: skip
        self.store.commit(self.folder(stage), manifest)
        self.note(stage, "done")

    def checkpoint(self, number, marked=True, **more):
        inside = f"checkpoints/checkpoint-{number}"
        files = {f"{inside}/optimizer.pt": b"moments %d" % number, **more}
        self.write(TRAIN, files | ({f"{inside}/COMPLETE": b"{}\n"} if marked else {}))

    def begin_training(self):
        about = json.dumps({"recipe": "small", "launch": "29500"}, indent=1).encode()
        self.write(TRAIN, {BUILDING: about, "metrics.jsonl": b'{"step": 1}\n{"step": 2}\n{"st'})

    def holds(self, stage):
        folder = self.folder(stage)
        files = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("lease."))
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def there(hub, stage=None):
    names = hub.files(REPO, "dataset")
    return {n for n in names if stage is None or n.startswith(f"{stage[0]}/{stage[1][:16]}/")}


def commits(hub):
    return len(hub.repos["dataset", REPO].commits)


@pytest.fixture
def one(tmp_path):
    return Machine(tmp_path / "one")


@pytest.fixture
def two(tmp_path):
    return Machine(tmp_path / "two")


def test_a_bare_machine_gets_what_another_finished(hub, one, two):
    one.finish(INGEST, {"rows.parquet": b"rows", "deep/er/audit.json": b"{}"})
    one.finish(MERGE, {"model.safetensors": b"weights"})  # lies in scratch
    assert one.mirror.push()
    assert hub.repos["dataset", REPO].private
    assert not [n for n in there(hub) if n.startswith("merge") or "lease" in n]
    two.mirror.pull()
    assert two.holds(INGEST) == one.holds(INGEST)
    manifest = two.store.find(two.folder(INGEST))
    assert manifest and two.store.verify(two.folder(INGEST), manifest) == []
    assert two.said == ["from me/runs: ingest"]
    assert (two.store.artifacts / "runs/small/latest").read_text() == f"{one.run.name}\n"
    assert not list(two.store.artifacts.glob("incoming-*"))


def test_what_is_there_is_not_sent_again(hub, one):
    one.finish(INGEST, {"rows.parquet": b"rows"})
    one.mirror.push(last=True)
    before, sent = commits(hub), hub.asked("POST", "/commit/")
    assert not one.mirror.push(last=True)
    again = Mirror(REPO, one.store, one.run, one.mirror.ctx)
    again.pull()
    assert not again.push(last=True)
    assert (commits(hub), hub.asked("POST", "/commit/")) == (before, sent)


def test_an_unfinished_training_goes_over_with_its_newest_complete_checkpoint(hub, one, two):
    one.begin_training()
    one.checkpoint(4)
    one.checkpoint(8)
    one.checkpoint(12, marked=False)
    assert one.mirror.push()
    assert {n.split("/")[3] for n in there(hub, TRAIN) if "/checkpoints/" in n} == {"checkpoint-8"}
    two.mirror.pull()
    held = two.holds(TRAIN)
    assert held["checkpoints/checkpoint-8/optimizer.pt"] == b"moments 8"
    assert held["metrics.jsonl"] == b'{"step": 1}\n{"step": 2}\n'  # whole lines only
    assert json.loads(held[BUILDING]) == {"recipe": "small", "launch": ""}
    assert two.said == ["from me/runs: train checkpoint-8"]


def test_a_newer_checkpoint_waits_its_turn_then_takes_the_older_ones_place(hub, one):
    one.begin_training()
    one.checkpoint(4)
    one.mirror.push()
    one.checkpoint(8)
    assert not one.mirror.push()  # a checkpoint was sent a moment ago
    assert one.mirror.push(last=True)
    assert {n.split("/")[3] for n in there(hub, TRAIN) if "/checkpoints/" in n} == {"checkpoint-8"}


def test_a_finished_training_leaves_no_checkpoint_there(hub, one):
    one.begin_training()
    one.checkpoint(4)
    one.mirror.push()
    one.finish(TRAIN, {"adapter/adapter_model.safetensors": b"A"})
    one.mirror.push(last=True)
    assert {n.split("/", 2)[2] for n in there(hub, TRAIN)} == {
        "manifest.json", "adapter/adapter_model.safetensors", "metrics.jsonl",
    }  # fmt: skip


def test_what_is_further_here_stays_and_is_sent(hub, one, two):
    one.begin_training()
    one.checkpoint(4)
    one.mirror.push()
    two.begin_training()
    two.checkpoint(8)
    two.mirror.pull()
    assert "checkpoints/checkpoint-8/optimizer.pt" in two.holds(TRAIN) and not two.said
    two.mirror.push()
    one.mirror.pull()
    assert "checkpoints/checkpoint-8/optimizer.pt" in one.holds(TRAIN)
    assert "checkpoints/checkpoint-4/optimizer.pt" not in one.holds(TRAIN)


def test_fresh_fetches_no_checkpoint(hub, one, two):
    one.begin_training()
    one.checkpoint(4)
    one.mirror.push()
    two.mirror.pull(fresh=True)
    assert two.holds(TRAIN) == {}


def test_bytes_that_changed_on_the_way_are_left_out(hub, one, two):
    one.finish(INGEST, {"rows.parquet": b"rows"})
    one.mirror.push()
    name = f"ingest/{INGEST[1][:16]}/rows.parquet"
    hub.served[name] = b"sowr"
    two.mirror.pull()
    assert two.holds(INGEST) == {} and "bytes received differ" in two.said[0] and "left out" in two.said[0]


def test_a_manifest_that_does_not_fit_its_files_is_left_out(hub, one, two):
    one.finish(INGEST, {"rows.parquet": b"rows"})
    one.mirror.push()
    hub.plant(REPO, {**hub.files(REPO, "dataset"), f"ingest/{INGEST[1][:16]}/rows.parquet": "more"}, "dataset")
    two.mirror.pull()
    assert two.holds(INGEST) == {} and "not what was committed" in two.said[0]


@pytest.mark.parametrize("place", ["key", "manifest", "run", "listing"])
def test_nothing_is_written_outside_the_artifacts(place, hub, one, two, tmp_path):
    one.finish(INGEST, {"rows.parquet": b"rows"})
    one.mirror.push(last=True)
    files, prefix = dict(hub.files(REPO, "dataset")), f"ingest/{INGEST[1][:16]}"
    if place == "key":
        name = next(n for n in files if n.endswith("run.json"))
        files[name] = files[name].replace(INGEST[1].encode(), b"../../../../evil" + b"1" * 16)
    elif place == "manifest":
        files[f"{prefix}/manifest.json"] = files[f"{prefix}/manifest.json"].replace(
            b"rows.parquet", b"../../../../evil"
        )
        files[f"{prefix}/../../../../evil"] = b"rows"
    elif place == "run":
        files["runs/small/latest"] = b"../../../../evil\n"
    else:
        files[f"runs/small/{one.run.name}/..\\evil"] = b"x"
        files[f"{prefix}/.hidden"] = files[f"{prefix}/lease.000001.json"] = b"x"
    hub.plant(REPO, files, "dataset")
    before = {p for p in tmp_path.rglob("*") if two.store.artifacts not in p.parents}
    two.mirror.pull()
    after = {p for p in tmp_path.rglob("*") if two.store.artifacts not in p.parents}
    assert {p for p in after - before if "hf_home" not in p.parts} <= {two.store.artifacts, two.store.artifacts.parent}
    assert not [
        p for p in two.store.artifacts.rglob("*") if "evil" in p.name or p.name in (".hidden", "lease.000001.json")
    ]


def test_a_public_repository_is_refused(hub, one):
    hub.plant(REPO, {"x": "y"}, "dataset", private=False)
    with pytest.raises(InputError, match="is public"):
        one.mirror.pull()


def test_without_the_right_to_write_it_stops_before_anything_is_built(hub, one):
    hub.token_role = "read"
    with pytest.raises(InputError, match="lacks this permission"):
        one.mirror.pull()


def test_a_name_that_is_none_is_refused(one):
    with pytest.raises(InputError, match="OWNER/NAME"):
        Mirror("runs", one.store, one.run, one.mirror.ctx)


def test_a_network_that_fails_costs_a_line_and_is_tried_again(hub, one):
    one.finish(INGEST, {"rows.parquet": b"rows"})
    hub.fail("POST", "/commit/", status=503, times=50)
    assert not one.mirror.push() and not one.mirror.push()
    assert len(one.said) == 1 and "server error of the Hub" in one.said[0] and "the run continues" in one.said[0]
    assert not there(hub, INGEST)  # all of it or nothing
    hub.faults.clear()
    assert one.mirror.push() and there(hub, INGEST)


def test_a_commit_whose_answer_is_lost_does_not_stop_the_next(hub, one):
    """What it deleted is gone there: to delete it again the Hub calls an error."""
    one.begin_training()
    one.checkpoint(4)
    assert one.mirror.push()
    one.checkpoint(8)
    hub.fail("POST", "/commit/", drop="after", times=50)
    assert one.mirror.push(last=True)  # the client finds nothing to commit a second time
    hub.faults.clear()
    one.finish(TRAIN, {"adapter/adapter_model.safetensors": b"A"})
    assert one.mirror.push(last=True)
    assert {n.split("/", 2)[2] for n in there(hub, TRAIN)} == {
        "manifest.json", "adapter/adapter_model.safetensors", "metrics.jsonl",
    }  # fmt: skip


def test_what_is_no_record_and_a_full_disk_are_said_and_left_out(hub, one, two, monkeypatch):
    hub.plant(REPO, {"runs/small/latest": b"\xff\xfe"}, "dataset", private=True)
    one.mirror.pull()
    assert "it is left out" in one.said[-1]
    one.finish(INGEST, {"rows.parquet": b"rows"})
    one.mirror.push(last=True)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Mirror, "_place", full)
    two.mirror.pull()
    assert "No space left" in two.said[-1] and not two.holds(INGEST)


def test_without_a_token_it_says_how_to_log_in(hub, one, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="hf auth login"):
        one.mirror.pull()


def test_a_hub_that_is_down_at_the_start_does_not_stop_the_run(hub, one):
    hub.fail("POST", "/repos/create", status=503, times=50)
    one.mirror.pull()
    assert "continuing without" in one.said[0]
    one.begin_training()
    one.checkpoint(4)
    hub.faults.clear()
    assert one.mirror.push()


def test_it_sends_while_the_run_goes_on_and_the_rest_at_its_end(hub, one):
    one.mirror._end.clear()
    one.mirror.start()
    one.finish(INGEST, {"rows.parquet": b"rows"})
    one.mirror.finish()
    assert there(hub, INGEST) and one.said[-1].startswith("me/runs has ingest")
