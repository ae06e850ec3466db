"""The store under random interleavings of builds, deaths, damage and repairs, by several builders."""

import json
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from finetune.errors import FinetuneError
from finetune.pipeline.leases import is_being_built
from finetune.pipeline.store import BUILDING, MANIFEST, Manifest, Store, output_digest

KEYS = ["a" * 32, "b" * 32]
NAMES = ["rows", "deep/er", "note"]


class StoreMachine(RuleBasedStateMachine):
    """What `held` says must be what the store finds: for each key the committed content, or None."""

    def __init__(self):
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.store = Store(self.root / "artifacts", self.root / "scratch")
        self.held = {}
        self.damaged = set()

    def teardown(self):
        shutil.rmtree(self.root)

    def folder(self, key):
        return self.store.folder("x", key)

    def build(self, key, content, die_at):
        """One build; dies before the step numbered `die_at`, as a killed process does: nothing is tidied up."""
        folder = self.folder(key)
        folder.mkdir(parents=True, exist_ok=True)
        lease = folder / f"lease.{len(list(folder.glob('lease.*'))) + 1:06d}.json"
        lease.write_text(json.dumps({"pid": 2**22 + 1}))  # no such process; another form: judged dead by not moving
        steps = [lambda: self.store.clear(folder), lambda: (folder / BUILDING).write_text("{}")]
        steps += [lambda n=n: self.write(folder / n, content) for n in NAMES]
        steps += [lambda: self.commit(folder, key), lambda: lease.unlink()]
        for number, step in enumerate(steps):
            if number == die_at:
                return
            step()
        self.held[key] = content
        self.damaged.discard(key)

    @staticmethod
    def write(path, content):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def commit(self, folder, key):
        files = self.store.read_files(folder, {})
        manifest = Manifest(
            stage="x", version=1, key=key, spec={}, fingerprint={}, inputs={}, files=files, digest=output_digest(files),
            metrics={}, seconds=0.0, peak_memory_bytes=0, environment={},
        )  # fmt: skip
        self.store.commit(folder, manifest)
        self.held[key] = (folder / NAMES[0]).read_bytes()  # complete from here on, whatever dies later
        self.damaged.discard(key)

    @rule(key=st.sampled_from(KEYS), content=st.binary(min_size=1, max_size=8), die_at=st.integers(0, 8))
    def build_and_perhaps_die(self, key, content, die_at):
        if self.held.get(key) is not None and key not in self.damaged:
            return  # a complete folder is never built again
        if die_at > 0:
            self.held[key] = None  # clear() comes first
        self.build(key, content, die_at)

    @rule(key=st.sampled_from(KEYS), name=st.sampled_from(NAMES), data=st.data())
    def flip_a_byte(self, key, name, data):
        path = self.folder(key) / name
        if not path.is_file() or not path.stat().st_size:
            return
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1
        path.write_bytes(content)
        self.damaged.add(key)

    @rule(key=st.sampled_from(KEYS), name=st.sampled_from([*NAMES, MANIFEST]), how=st.sampled_from(["gone", "shorter"]))
    def lose_a_file(self, key, name, how):
        path = self.folder(key) / name
        if not path.is_file():
            return
        if how == "gone":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-1])
        self.held[key] = None

    @rule(key=st.sampled_from(KEYS))
    def a_live_builder_takes_its_turn(self, key):
        """The lease is got in spite of whatever dead ones lie there, and leaves none behind."""
        folder = self.folder(key)
        for stale in folder.glob("lease.*"):
            stale.unlink()  # a lease of this form is judged by time: the wait has its own test
        with self.store.lease(folder, lambda line: None, lambda: None):
            assert is_being_built(folder)
        assert not list(folder.glob("lease.*"))

    @invariant()
    def what_is_found_is_what_was_committed(self):
        for key in KEYS:
            folder = self.folder(key)
            manifest = self.store.find(folder)
            expected = self.held.get(key)
            assert (manifest is not None) == (expected is not None), (key, expected)
            if manifest is None:
                continue
            problems = self.store.verify(folder, manifest)
            same = all((folder / n).read_bytes() == expected for n in NAMES)
            assert (problems == []) == same  # every flipped byte is named, and nothing else
            assert key in self.damaged or same


StoreMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestStore = StoreMachine.TestCase


def test_a_folder_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "x").write_text("")
    store = Store(tmp_path, tmp_path)
    import pytest

    with pytest.raises(FinetuneError, match="cannot be written"), store.lease(tmp_path / "x" / "k", str, lambda: None):
        pass
