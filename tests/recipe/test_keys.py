"""Keys outlive the code: what an earlier release made is found, and a new field with a default changes nothing."""

import dataclasses
import shutil
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from finetune.pipeline import runner
from finetune.pipeline.stage_list import STAGE_NAMES, STAGES
from finetune.pipeline.store import Store
from finetune.recipe import Dedup, Jaccard, Section
from finetune.recipe.keys import RENAMED, SCHEMA_1, key_form
from finetune.recipe.load import load_recipe
from finetune.stages import dedup, render

FIXTURE = Path(__file__).parents[1] / "fixtures" / "schema1"
# generate came later
UNTIL_PACK = tuple(n for n in STAGE_NAMES[: STAGE_NAMES.index("pack") + 1] if n != "generate")


@pytest.fixture
def store(tmp_path):
    shutil.copytree(FIXTURE / "artifacts", tmp_path / "artifacts")
    return Store(tmp_path / "artifacts", tmp_path / "scratch")


def made(store, name):
    """The fixture's output of a stage, and the version it was made by."""
    folder = next((store.artifacts / name).iterdir())
    manifest = store.find(folder)
    return runner.Output(folder, manifest.digest), manifest.version


def test_artifacts_of_the_first_schema_are_done_and_verify_or_are_named_as_of_another_version(store):
    """Each stage on the fixture's inputs: a stage whose version was raised since is rebuilt, on purpose."""
    recipe = load_recipe(str(FIXTURE / "recipe.yaml")).recipe
    outputs = {name: made(store, name)[0] for name in UNTIL_PACK}
    for stage in (s for s in STAGES if s.name in UNTIL_PACK):
        step, version = runner.locate(stage, recipe, store, outputs), made(store, stage.name)[1]
        if stage.version == version:
            assert (stage.name, step.status, store.verify(step.folder, step.manifest)) == (stage.name, "done", [])
        else:
            assert (stage.name, step.status, step.older_version) == (stage.name, "missing", version)


def test_the_plan_names_an_artifact_of_an_earlier_version(store, monkeypatch):
    raised = [dataclasses.replace(s, version=s.version + 5 * (s.name == "ingest")) for s in STAGES]
    monkeypatch.setattr(runner, "STAGES", tuple(raised))
    steps = {s.stage.name: s for s in runner.plan(load_recipe(str(FIXTURE / "recipe.yaml")).recipe, store)}
    assert (steps["ingest"].status, steps["ingest"].older_version) == ("missing", made(store, "ingest")[1])
    assert steps["filter"].status == "unknown"


class Inner(Section):
    size: int = 3


class WiderDedup(dedup.Spec):
    added: float = 0.5
    several: list[Inner] = [Inner()]
    optional: Inner | None = None
    path: Annotated[Path | None, Field(exclude=True)] = None


def test_a_new_field_enters_a_key_only_off_its_default():
    asked = {"exact": True, "field": "output", "threshold": 0.9, "keep": "first", "minhash": Jaccard()}
    before = key_form(dedup.Spec(**asked))
    assert before == dedup.Spec(**asked).model_dump(mode="json", exclude={"exhaustive"})
    assert key_form(WiderDedup(**asked)) == before
    assert key_form(WiderDedup(**asked, path=Path("/x"))) == before
    assert key_form(WiderDedup(**asked, added=0.6)) == {**before, "added": 0.6}
    assert key_form(WiderDedup(**asked, optional=Inner(size=4))) == {**before, "optional": {"size": 4}}
    assert key_form(WiderDedup(**asked, several=[Inner(size=4), Inner()])) == {**before, "several": [{"size": 4}, {}]}


def test_a_new_field_of_a_section_changes_no_key_of_the_specs_that_hold_it(monkeypatch):
    class WiderRender(render.Render):
        extra: bool = False

    assert key_form(WiderRender()) == key_form(render.Render())
    assert key_form(WiderRender(extra=True)) == {**key_form(render.Render()), "extra": True}


def test_a_renamed_field_keeps_its_old_name_in_the_key(monkeypatch):
    class Renamed(Section):
        jaccard: Jaccard | None = None

    monkeypatch.setitem(SCHEMA_1, "Renamed", "minhash")
    monkeypatch.setitem(RENAMED, ("Renamed", "jaccard"), "minhash")
    assert key_form(Renamed(jaccard=Jaccard())) == {"minhash": Jaccard().model_dump(mode="json")}
    assert key_form(Renamed()) == {"minhash": None}


def test_the_table_names_fields_that_exist():
    fields = {RENAMED.get(("Dedup", name), name) for name in Dedup.model_fields}
    assert set(SCHEMA_1["Dedup"].split()) <= fields


def test_jaccard_has_the_key_that_it_had_as_minhash():
    form = key_form(Dedup(jaccard=Jaccard()))
    assert form["minhash"] == {"threshold": 0.8, "ngram": 5} and "jaccard" not in form
    assert set(form) == set(SCHEMA_1["Dedup"].split())
