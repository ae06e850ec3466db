"""Leases, with processes that really die."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.context import StopFlag
from finetune.errors import FinetuneError
from finetune.pipeline import leases
from finetune.pipeline.store import Store


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path, tmp_path / "scratch")


BUILDER = textwrap.dedent("""
    import sys, pathlib
    from finetune.pipeline.store import Store
    folder = pathlib.Path(sys.argv[1])
    store = Store(folder.parent, folder.parent)
    with store.lease(folder, lambda line: print(line, flush=True), lambda: None):
        print("mine", flush=True)
        sys.stdin.read()
""")


def builder(folder):
    """A process that builds until its stdin is closed."""
    command = [sys.executable, "-c", BUILDER, str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_live_builder_is_waited_for_and_named(store, tmp_path):
    folder = tmp_path / "x"
    first = builder(folder)
    assert first.stdout.readline() == "mine\n"
    lines = []
    with store.lease(folder, lambda line: (lines.append(line), first.stdin.close()), lambda: None):
        assert first.wait(60) == 0
    assert lines == [f"waiting for process {first.pid} on {os.uname().nodename}"]


def test_a_killed_builders_lease_is_taken_over_and_said(store, tmp_path):
    folder = tmp_path / "x"
    first = builder(folder)
    assert first.stdout.readline() == "mine\n"
    first.send_signal(signal.SIGKILL)
    first.wait()
    lines = []
    with store.lease(folder, lines.append, lambda: None):
        pass
    assert len(lines) == 1 and "took over" in lines[0] and str(first.pid) in lines[0]
    assert list(folder.glob("lease.*")) == []


def test_a_torn_lease_of_another_machine_is_dead_once_it_stops_moving(store, tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.pipeline.leases.LEASE_SECONDS", 0.5)
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "lease.000003.json").write_text('{"host": "elsewh')
    start = time.monotonic()
    with store.lease(folder, lambda line: None, lambda: None):
        assert (folder / "lease.000004.json").exists()
    assert time.monotonic() - start > 0.5


def test_a_reused_process_number_does_not_keep_a_lease_alive(store, tmp_path):
    folder = tmp_path / "x"
    with store.lease(folder, lambda line: None, lambda: None):
        lease = json.loads((folder / "lease.000001.json").read_text())
    (folder / "lease.000001.json").write_text(json.dumps({**lease, "start": "1"}))
    with store.lease(folder, lambda line: None, lambda: None):
        pass


@pytest.mark.parametrize("field", ["host", "boot", "namespace", None])
def test_a_lease_of_another_machine_without_a_heartbeat_is_no_build(store, tmp_path, field):
    folder = tmp_path / "x"
    with store.lease(folder, lambda line: None, lambda: None):
        path = folder / "lease.000001.json"
        text, long_ago = path.read_text(), time.time() - leases.ABANDONED_SECONDS - 1
        os.utime(path, (long_ago, long_ago))
        assert leases.is_being_built(folder)  # of this machine: the process decides
    path.write_text(json.dumps({**json.loads(text), field: "another"}) if field else text[:20])
    assert leases.is_being_built(folder)
    os.utime(path, (long_ago + 60, long_ago + 60))
    assert leases.is_being_built(folder)
    os.utime(path, (long_ago, long_ago))
    assert not leases.is_being_built(folder)


@settings(max_examples=5, deadline=None)
@given(st.integers(2, 5))
def test_never_two_owners_at_once(tmp_path_factory, count):
    folder = tmp_path_factory.mktemp("lease") / "x"
    store = Store(folder.parent, folder.parent)
    inside, most, lock = 0, 0, threading.Lock()

    def work():
        nonlocal inside, most
        with store.lease(folder, lambda line: None, lambda: None):
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.02)
            with lock:
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most == 1 and inside == 0


def test_a_builder_that_stood_still_too_long_does_not_commit_over_its_successor(store):
    folder = store.folder("x", "0" * 32)
    with store.lease(folder, lambda line: None, lambda: None) as lease:
        lease.require()
        later = folder / "lease.000002.json"
        later.write_text(json.dumps({"pid": 7, "host": "elsewhere"}))
        with pytest.raises(FinetuneError, match="process 7 on elsewhere took this folder over"):
            lease.require()
    assert later.exists() and not (folder / "lease.000001.json").exists()
    later.unlink()


def test_a_beat_keeps_the_length_of_the_lease(store, monkeypatch):
    """A full disk cannot cut it off: nothing is truncated, and no new block is needed."""
    monkeypatch.setattr("finetune.pipeline.leases.BEAT_SECONDS", 0.01)
    folder = store.folder("x", "0" * 32)
    with store.lease(folder, lambda line: None, lambda: None) as lease:
        lease.note = "n" * 5000
        time.sleep(0.2)
        content = (folder / "lease.000001.json").read_bytes()
        assert len(content) == 2048 and json.loads(content)["beat"] > 0 and json.loads(content)["pid"] == os.getpid()


def test_a_note_of_any_text_fits_and_can_be_read(store, monkeypatch):
    monkeypatch.setattr("finetune.pipeline.leases.BEAT_SECONDS", 0.01)
    folder = store.folder("x", "0" * 32)
    for text in ("😀", "\x01", "\ud800", "é"):
        with store.lease(folder, lambda line: None, lambda: None) as lease:
            lease.say(text * 300)
            time.sleep(0.1)
            content = (folder / "lease.000001.json").read_bytes()
            assert len(content) == 2048 and len(json.loads(content)["note"]) == 200


def test_a_waiting_run_says_now_and_then_how_far_the_other_one_is(store, tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.pipeline.leases.BEAT_SECONDS", 0.01)
    monkeypatch.setattr("finetune.pipeline.leases.WAIT_SECONDS", 0.2)
    begun, enough, lines, start = threading.Event(), threading.Event(), [], time.monotonic()

    def build():
        with store.lease(tmp_path / "x", str, lambda: None) as lease:
            begun.set()
            for step in range(1, 10_000):
                lease.say(f"training {step}/9999")
                if enough.wait(0.01):
                    break

    def note(line):
        lines.append(line)
        assert time.monotonic() - start >= 0.2 * (len(lines) - 1), lines
        if len(lines) == 4:
            enough.set()

    builder = threading.Thread(target=build)
    builder.start()
    assert begun.wait(60)
    with store.lease(tmp_path / "x", note, lambda: None):
        builder.join()
    said = [re.fullmatch(rf"waiting for process {os.getpid()} on \S+?(?:: training (\d+)/9999)?", x) for x in lines]
    steps = [int(found[1]) for found in said if found[1]]
    assert len(steps) >= 3 and steps == sorted(set(steps)), lines


def test_a_builder_that_wakes_up_learns_at_once_that_another_took_over(store, monkeypatch):
    """Before it writes into files that the other one may have finished."""
    monkeypatch.setattr("finetune.pipeline.leases.BEAT_SECONDS", 0.01)
    folder = store.folder("x", "0" * 32)
    heard = threading.Event()
    lost = []
    with store.lease(folder, str, lambda: None) as lease:
        lease.on_lost = lambda error: (lost.append(error), heard.set())
        time.sleep(0.1)
        assert lost == []
        later = folder / "lease.000002.json"
        later.write_text(json.dumps({"pid": 7, "host": "elsewhere"}))
        assert heard.wait(10)
        time.sleep(0.05)
    assert len(lost) == 1 and "process 7 on elsewhere took this folder over" in str(lost[0])
    assert "beat" not in json.loads(later.read_text())


def test_a_file_server_that_does_not_answer_takes_no_lease_away(store, monkeypatch):
    monkeypatch.setattr("finetune.pipeline.leases.BEAT_SECONDS", 0.01)
    lost = []
    with store.lease(store.folder("x", "0" * 32), str, lambda: None) as lease:
        lease.on_lost = lost.append

        def stale(folder):
            raise OSError(116, "Stale file handle", str(folder))

        with monkeypatch.context() as gone:
            gone.setattr("finetune.pipeline.leases.names_in", stale)
            time.sleep(0.1)
        time.sleep(0.1)
        lease.require()
    assert lost == []


def test_a_check_raises_what_took_the_folder(store):
    flag = StopFlag()
    flag.check()
    flag.lose(FinetuneError("another"))
    with pytest.raises(FinetuneError, match="another"):
        flag.check()
