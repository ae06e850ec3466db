"""Finished partitions are kept until their stage is complete, for this user, key and version only."""

import importlib.metadata
import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest

from finetune.engine import kept
from finetune.engine.kept import Kept
from finetune.engine.local import Local
from finetune.errors import InputError
from finetune.metrics import Headline
from finetune.pipeline import runner
from finetune.pipeline.stage_list import Stage
from finetune.pipeline.store import Store
from finetune.recipe import Section
from tests.engine.test_local import squares
from tests.stages.rows import context, recipe

PARTS = [1, 2, 3, 7, 4]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Counted:
    """An engine that records what it was asked to compute."""

    def __init__(self):
        self.parts = []

    def map(self, build, parts, rows, part_bytes=0):
        self.parts += parts
        yield from Local(1).map(build, parts, rows)


def computed(folder, parts=PARTS, key="k"):
    """The results of two maps, and the parts that were computed for them."""
    engine = Counted()
    around = Kept(engine, folder, key)
    return [list(around.map(partial(squares, offset), parts, 5)) for offset in (0, 1)], engine.parts


def test_a_run_that_failed_continues_with_the_finished_partitions(tmp_path):
    folder = tmp_path / "parts"
    with pytest.raises(InputError, match="row 7 is wrong"):
        computed(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["1-0", "1-1", "1-2"]
    right = [1, 2, 3, 5, 4]
    found, parts = computed(folder, right)
    assert found == [[n * n for n in right], [n * n + 1 for n in right]]
    assert parts == [5, 4, *right]
    assert computed(folder, right) == (found, [])


def test_nothing_is_unpickled_but_what_this_user_wrote_for_this_key_place_and_version(tmp_path, monkeypatch):
    folder = tmp_path / "parts"
    right = [1, 2]
    found, _ = computed(folder, right)

    def again(key="k"):
        result = computed(folder, right, key)
        assert result[0] == found
        return result[1]

    assert again(key="other") == [1, 2, 1, 2] and again() == [1, 2, 1, 2]
    (folder / "1-0").write_bytes((folder / "1-1").read_bytes())
    assert again() == [1]
    for damage in (b"", b"x", (folder / "2-1").read_bytes()[:-1], (folder / "2-1").read_bytes() + b"."):
        (folder / "2-1").write_bytes(damage)
        assert again() == [2]
    monkeypatch.setattr(kept, "code_versions", lambda: {"finetune": "other"})
    assert again() == [1, 2, 1, 2]
    (tmp_path / "cache" / "finetune" / "parts.key").unlink()
    assert again() == [1, 2, 1, 2]
    assert (tmp_path / "cache" / "finetune" / "parts.key").stat().st_mode & 0o077 == 0


def test_versions_are_those_of_all_packages_that_a_worker_may_import(monkeypatch):
    found = kept.code_versions()
    for line in importlib.metadata.requires("finetune-recipes"):
        name, _, marker = line.partition(";")
        if "extra" not in marker:
            assert re.match(r"[\w.-]+", name)[0] in found, line
    assert {"scipy", "jinja2", "faiss-cpu", "model2vec", "py3langid", "python"} <= set(found)
    assert not {"pytest", "ruff"} & set(found)
    monkeypatch.setattr(kept, "DISTRIBUTION", "a-distribution-that-nobody-has")
    assert set(kept.code_versions.__wrapped__()) > {"scipy", "finetune", "pytest"}


def test_without_a_place_to_write_the_results_are_the_same(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    expected = [[1, 4], [2, 5]]
    assert computed(tmp_path / "file", [1, 2])[0] == expected
    assert computed(tmp_path / "none" / "parts", [1, 2])[0] == expected and not (tmp_path / "none").exists()
    with monkeypatch.context() as patch:
        patch.setattr(kept.shutil, "disk_usage", lambda folder: SimpleNamespace(free=9))
        assert computed(tmp_path / "parts", [1, 2])[0] == expected and not (tmp_path / "parts").exists()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert computed(tmp_path / "parts", [1, 2])[0] == expected and not (tmp_path / "parts").exists()


@pytest.mark.parametrize("fresh", [False, True])
def test_a_stage_goes_on_with_its_partitions_and_its_finished_folder_has_none(tmp_path, fresh):
    store = Store(tmp_path / "artifacts", tmp_path / "scratch")
    asked: list[int] = []

    def run(spec, inputs, out, ctx):
        done = list(ctx.engine.map(partial(squares, 0), PARTS if not asked else [1, 2, 3, 5, 4], 5))
        (out / "done.json").write_text(str(done))
        return {}

    stage = Stage(
        "made", 1, (), lambda recipe: Section(), lambda spec: {}, run, lambda metrics: Headline(), working="parts"
    )
    engine = Counted()
    ctx = replace(context(tmp_path), engine=engine)
    with pytest.raises(InputError, match="row 7"):
        runner.build(runner.locate(stage, recipe(), store, {}), recipe(), store, ctx)
    asked, engine.parts = engine.parts, []
    done = runner.build(runner.locate(stage, recipe(), store, {}), recipe(), store, ctx, fresh=fresh)
    assert engine.parts == ([1, 2, 3, 5, 4] if fresh else [5, 4])
    assert list(done.manifest.files) == ["done.json"]
    assert sorted(p.name for p in done.folder.iterdir()) == ["done.json", "manifest.json"]
