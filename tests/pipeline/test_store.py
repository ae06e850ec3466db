"""Keys, manifests and commits."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.errors import FinetuneError
from finetune.pipeline.store import Hashed, Manifest, Store, make_key, output_digest


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
