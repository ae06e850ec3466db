"""Keys, commits and leases, with processes that really die."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.errors import FinetuneError
from finetune.store import Hashed, Manifest, Store, make_key, output_digest


def commit(store, folder, files, logs=()):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    entries = store.read_files(folder, {})
    manifest = Manifest(
        stage="x", version=1, key="k", spec={}, fingerprint={}, inputs={}, files=entries,
        digest=output_digest(entries, logs), metrics={}, seconds=0.0, peak_memory_bytes=0, environment={},
    )  # fmt: skip
    store.commit(folder, manifest)
    return manifest


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "artifacts", tmp_path / "scratch")


def test_a_folder_is_complete_only_with_its_manifest(store):
    folder = store.folder("x", "0" * 32)
    folder.mkdir(parents=True)
    (folder / "rows").write_text("1")
    assert store.find(folder) is None
    commit(store, folder, {"rows": "1", "deep/er": "2"})
    assert set(store.find(folder).files) == {"rows", "deep/er"}


@pytest.mark.parametrize("keep", [0, 1, 10, 100, -1])
def test_a_torn_manifest_is_no_manifest(store, keep):
    folder = store.folder("x", "0" * 32)
    commit(store, folder, {"rows": "1"})
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:keep])
    assert store.find(folder) is None


def test_a_missing_or_shorter_file_makes_the_folder_incomplete(store):
    folder = store.folder("x", "0" * 32)
    commit(store, folder, {"rows": "12"})
    (folder / "rows").write_text("1")
    assert store.find(folder) is None


def test_verify_names_a_flipped_byte_and_is_silent_without_one(store):
    folder = store.folder("x", "0" * 32)
    manifest = commit(store, folder, {"rows": "12", "other": "3"})
    assert store.verify(folder, manifest) == []
    (folder / "rows").write_text("13")
    assert [str(folder / "rows") in p for p in store.verify(folder, manifest)] == [True]


def test_logs_do_not_count_as_output(store, tmp_path):
    a = commit(store, tmp_path / "a", {"adapter": "1", "metrics.jsonl": "fast"}, ["metrics.jsonl"])
    b = commit(store, tmp_path / "b", {"adapter": "1", "metrics.jsonl": "slow"}, ["metrics.jsonl"])
    c = commit(store, tmp_path / "c", {"adapter": "2", "metrics.jsonl": "slow"}, ["metrics.jsonl"])
    assert a.digest == b.digest != c.digest


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), json_values), st.randoms())
def test_a_key_does_not_depend_on_order_and_does_on_content(spec, random):
    items = list(spec.items())
    random.shuffle(items)
    key = make_key("x", 1, spec, {}, {})
    assert make_key("x", 1, dict(items), {}, {}) == key
    assert make_key("x", 2, spec, {}, {}) != key
    assert make_key("x", 1, {**spec, "new field": 1}, {}, {}) != key


BUILDER = textwrap.dedent("""
    import sys, time, pathlib
    from finetune.store import Store
    folder = pathlib.Path(sys.argv[1])
    store = Store(folder.parent, folder.parent)
    with store.lease(folder, lambda line: print(line, flush=True), lambda: None):
        print("mine", flush=True)
        time.sleep(float(sys.argv[2]))
""")


def builder(folder, seconds):
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(folder), str(seconds)], stdout=subprocess.PIPE, text=True
    )


def test_a_live_builder_is_waited_for_and_named(store, tmp_path):
    folder = tmp_path / "x"
    first = builder(folder, 1.5)
    assert first.stdout.readline() == "mine\n"
    lines = []
    with store.lease(folder, lines.append, lambda: None):
        assert first.poll() is not None or first.wait(5) == 0
    assert lines == [f"waiting for process {first.pid} on {os.uname().nodename}"]


def test_a_killed_builders_lease_is_taken_over_and_said(store, tmp_path):
    folder = tmp_path / "x"
    first = builder(folder, 60)
    assert first.stdout.readline() == "mine\n"
    first.send_signal(signal.SIGKILL)
    first.wait()
    lines = []
    with store.lease(folder, lines.append, lambda: None):
        pass
    assert len(lines) == 1 and "took over" in lines[0] and str(first.pid) in lines[0]
    assert list(folder.glob("lease.*")) == []


def test_a_torn_lease_of_another_machine_is_dead_once_it_stops_moving(store, tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.store.LEASE_SECONDS", 0.5)
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


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file", tmp_path)
    with (
        pytest.raises(FinetuneError, match="cannot be written"),
        store.lease(tmp_path / "file" / "x", print, lambda: None),
    ):
        pass


def test_a_digest_noted_while_writing_is_taken_until_the_file_changes(store):
    folder = store.folder("x", "0" * 32)
    folder.mkdir(parents=True)
    (folder / "a").write_text("1")
    (folder / "b").write_text("2")
    hashed = Hashed()
    for name in "ab":
        hashed.note(folder / name, f"noted {name}")
    time.sleep(0.01)
    (folder / "b").write_text("3")
    files = store.read_files(folder, {}, hashed=hashed)
    assert files["a"].digest == "noted a"
    assert files["b"].digest == store.read_files(folder, {})["b"].digest != "noted b"


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
    monkeypatch.setattr("finetune.store.BEAT_SECONDS", 0.01)
    folder = store.folder("x", "0" * 32)
    with store.lease(folder, lambda line: None, lambda: None) as lease:
        lease.note = "n" * 5000
        time.sleep(0.2)
        content = (folder / "lease.000001.json").read_bytes()
        assert len(content) == 2048 and json.loads(content)["beat"] > 0 and json.loads(content)["pid"] == os.getpid()
