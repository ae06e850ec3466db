"""report.html while a run goes on: there from the first stage, reloading itself; the report at the end."""

import dataclasses
import html
import json
import re
import threading
import time

import pytest
import typer
from typer.testing import CliRunner

from finetune.cli.main import app
from finetune.cli.run import run_recipe
from finetune.errors import FinetuneError, GateRefused, Stopped
from finetune.pipeline import leases, runner
from finetune.pipeline.runs import Run, StageRecord
from finetune.pipeline.store import Store
from finetune.recipe.load import parse_recipe
from finetune.report import live as live_page
from finetune.report import page as page_module
from finetune.report.page import REPORT
from tests.report.made_run import RECIPE
from tests.report.test_page import HOSTILE, assert_only_ours

REFRESH = re.compile(r'<meta http-equiv="refresh" content="\d+">')


def states(page):
    """Stage -> status, of the table of stages."""
    rows = re.findall(r"<tr><td>(\w+)</td><td class=\"status-\w+\">([\w ]+)</td>", page)
    return dict(rows)


@pytest.fixture
def begun(tmp_path):
    store = Store(tmp_path / "artifacts", tmp_path / "scratch")
    record = Run(store.artifacts, "made", RECIPE, (), "0123456789", write=True)
    record.begin()
    return store, record, live_page.Live(record, parse_recipe(RECIPE, tmp_path / "made.yaml"), store, None)


def test_the_page_of_a_training_has_states_curves_and_time_left(begun):
    store, record, live = begun
    folder = store.folder("train", "0" * 16)
    folder.mkdir(parents=True)
    steps = [{"step": n, "loss": 3 - n / 10, "eta_seconds": 120.0, "seconds": 9.0, "peak_memory_bytes": 10**9,
              "tokens": 100, "tokens_per_second": 12.5} for n in (1, 2, 3)]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps) + '{"step": 4, "lo')
    record.on_change = live.write
    record.note(StageRecord("ingest", "done", metrics={"rows_out": 1234}, seconds=2.0))
    record.note(StageRecord("train", "partial", folder, "0" * 16))
    live.heard(f"training 3/60 {HOSTILE}")
    live.write()
    page = (record.folder / REPORT).read_text()
    assert_only_ours(page)
    assert REFRESH.search(page) and "<script" not in page and "2 min 00 s" in page and "1,234" in page
    assert html.escape("training 3/60") in page and page.count("<svg") >= 3
    shown = states(page)
    assert (shown["ingest"], shown["train"], shown["export"], shown["evaluate"]) == (
        "done",
        "running",
        "off",
        "waiting",
    )


def test_steps_write_it_only_when_it_is_old(begun, monkeypatch):
    _, record, live = begun
    now = 1000.0
    monkeypatch.setattr(live_page.time, "monotonic", lambda: now)
    live.write()
    page = record.folder / REPORT
    first = page.read_bytes()
    page.write_bytes(b"")
    now += live_page.EVERY_SECONDS - 1
    live.heard("embedding 1/2")
    assert page.read_bytes() == b""
    now += 2
    live.heard("embedding 2/2")
    assert page.read_bytes()[:100] == first[:100]


def test_a_page_that_cannot_be_written_stops_no_run(begun, monkeypatch):
    _, record, live = begun
    (record.folder / REPORT).mkdir()
    live.write()
    assert not list(record.folder.glob(f".{REPORT}*"))


@pytest.mark.parametrize("end", [live_page.Live.end, lambda live: live.write(reload=False)])
def test_a_line_of_another_thread_after_the_end_writes_nothing(begun, monkeypatch, end):
    _, record, live = begun
    live.write()
    page, inside = record.folder / REPORT, threading.Event()

    def slow(path, content):
        inside.set()
        time.sleep(0.2)
        path.write_bytes(b"of the thread")

    with monkeypatch.context() as patched:
        patched.setattr(live_page, "replace_bytes", slow)
        thread = threading.Thread(target=live.write)
        thread.start()
        assert inside.wait(10)
        patched.setattr(live_page, "replace_bytes", lambda path, content: path.write_bytes(b"the last"))
        end(live)
    page.write_text("the report")  # the write that was in progress is over
    thread.join()
    monkeypatch.setattr(live_page, "EVERY_SECONDS", -1.0)
    live.heard("OWNER/NAME has train")
    live.write()
    assert page.read_text() == "the report"


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe whose stages are stubs; the pages that they see are in `seen`."""
    (tmp_path / "made.yaml").write_text(RECIPE)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    seen = {}

    def run(stage):
        def stub(spec, inputs, folder, ctx):
            (page,) = (tmp_path / "artifacts" / "runs" / "made").glob(f"*/{REPORT}")
            seen[stage.name] = page.read_text()
            if error := seen.get("raise", {}).get(stage.name):
                if isinstance(error, Stopped):
                    ctx.stop.signal_number = 15
                raise error
            (folder / "spec.json").write_text(spec.model_dump_json())
            return {}

        return dataclasses.replace(stage, run=stub)

    monkeypatch.setattr(runner, "STAGES", tuple(run(stage) for stage in runner.STAGES))
    monkeypatch.chdir(tmp_path)
    return seen


def go(tmp_path, until="pack"):
    roots = {"artifacts": tmp_path / "artifacts", "scratch": tmp_path / "scratch"}
    return run_recipe("made.yaml", until=until, sets=[], fresh=False, **roots)


def test_it_is_there_from_the_first_stage_and_becomes_the_report(recipe, tmp_path):
    record = go(tmp_path)
    assert states(recipe["base"])["base"] == "running" and states(recipe["base"])["ingest"] == "waiting"
    assert states(recipe["pack"])["render"] == "done" and states(recipe["pack"])["train"] == "off"
    assert all(REFRESH.search(page) for page in recipe.values())
    assert not REFRESH.search(last := (record.folder / REPORT).read_text()) and "Report of a run" in last
    (record.folder / REPORT).write_text("as it was")
    assert go(tmp_path).folder == record.folder
    assert (record.folder / REPORT).read_text() == "as it was"  # a run that builds nothing writes nothing


@pytest.mark.parametrize("error", [GateRefused("too few"), FinetuneError("broken"), Stopped(15)])
def test_a_run_that_ends_early_does_not_reload_for_ever(recipe, tmp_path, error):
    recipe["raise"] = {"ingest": error}
    with pytest.raises(type(error)):
        go(tmp_path)
    (page,) = (tmp_path / "artifacts" / "runs" / "made").glob(f"*/{REPORT}")
    assert not REFRESH.search(page.read_text())
    assert ("Stopped in ingest" if isinstance(error, Stopped) else str(error)) in page.read_text()


@pytest.mark.parametrize("failing", [None, RuntimeError("no"), KeyboardInterrupt()])
def test_the_page_of_a_finished_run_is_live_until_the_report_replaces_it(recipe, tmp_path, monkeypatch, failing):
    """While the report is written the page is that of a run in progress; if the report fails, it is the last one."""
    written, seen = page_module.write_report, []

    def write(*arguments):
        (page,) = (tmp_path / "artifacts" / "runs" / "made").glob(f"*/{REPORT}")
        seen.append(page.read_text())
        if failing:
            raise failing
        return written(*arguments)

    monkeypatch.setattr(page_module, "write_report", write)
    try:
        go(tmp_path)
    except Stopped:
        assert isinstance(failing, KeyboardInterrupt)
    (page,) = (tmp_path / "artifacts" / "runs" / "made").glob(f"*/{REPORT}")
    assert REFRESH.search(seen[0]) and not REFRESH.search(page.read_text())
    assert ("Report of a run" in page.read_text()) == (failing is None)


def test_open_shows_the_live_page_of_a_run_in_progress(begun, monkeypatch):
    store, record, live = begun
    opened = []
    monkeypatch.setattr(typer, "launch", lambda url: opened.append(url) or 0)
    record.note(StageRecord("ingest", "partial"))
    record.save()
    live.write()
    before = (page := record.folder / REPORT).read_bytes()
    command = ["report", "made", "--open", "--artifacts", str(store.artifacts), "--scratch", str(store.scratch)]
    lease = leases.acquire(record.folder, lambda line: None, lambda: None)
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    assert opened == [page.as_uri()] and page.read_bytes() == before
    lease.release()
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    assert opened == [page.as_uri()] * 2 and not REFRESH.search(page.read_text())
