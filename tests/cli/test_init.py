"""`finetune init`: what it writes is short, valid and fits; what it cannot know it asks or refuses."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from finetune.cli import init
from finetune.errors import InputError
from finetune.estimate.choice import DEVICES
from finetune.recipe import LocalSource
from finetune.recipe.load import load_recipe

ROW = json.dumps({"question": "a?", "answer": "b " * 3000, "id": 3}) + "\n"
MISTRAL = "mistralai/Mistral-7B-Instruct-v0.2"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(ROW * 200)
    return tmp_path


def write(name="mine", model=MISTRAL, data="rows.jsonl", device=None, out=None, **more):
    return init.write_recipe(name, model, data, device, out, **more)


def test_a_recipe_is_short_valid_and_says_what_was_found(folder):
    said = write()
    text = (folder / "mine.yaml").read_text()
    assert len(text.splitlines()) <= 15 and text.splitlines()[1].startswith("# Hardware: one T4")
    recipe = load_recipe("mine.yaml").recipe
    source = recipe.data[0]
    assert isinstance(source, LocalSource) and source.format == "prompt_completion" and source.path.exists()
    assert recipe.render.template == "auto" and recipe.render.max_length_tokens == 2048
    assert "format prompt_completion" in said and "not used: id" in said and "finetune run" in said


def test_editors_find_the_schema_and_the_card_does_not_show_where(folder):
    from finetune.publish.card_sections import without_folders

    write()
    loaded = load_recipe("mine.yaml")
    line = loaded.text.splitlines()[0]
    where = line.removeprefix("# yaml-language-server: $schema=")
    assert where.startswith("file:///") and json.loads(Path(where.removeprefix("file://")).read_text())["$defs"]
    assert "yaml-language-server" not in without_folders(loaded.text, loaded.recipe)
    assert "# Hardware: " in without_folders(loaded.text, loaded.recipe)


def test_in_a_checkout_the_schema_is_named_relative_to_the_recipe():
    root = Path(init.__file__).parents[2]
    lines = {
        "recipes/a.yaml": "./schema.json",
        "a.yaml": "./recipes/schema.json",
        "mine/a.yaml": "../recipes/schema.json",
    }
    for path, where in lines.items():
        assert init._schema_line(root / path) == [f"# yaml-language-server: $schema={where}"]


def test_every_line_says_what_it_is_and_the_schema_accepts_it(folder):
    from jsonschema import Draft202012Validator

    from finetune.recipe.load import _Loader
    from finetune.recipe.reference import schema

    for change in ({}, {"model": "builtin:tiny-mistral", "data": "pydoc"}, {"data": "owner/rows"}):
        write(force=True, **change)
        text = (folder / "mine.yaml").read_text()
        assert all("# " in line for line in text.splitlines()) and max(map(len, text.splitlines())) <= 120
        assert not list(Draft202012Validator(schema()).iter_errors(yaml.load(text, _Loader)))


def test_it_goes_into_recipes_and_finds_the_data_from_there(folder):
    (folder / "recipes").mkdir()
    write()
    assert load_recipe("mine").recipe.data[0].path.exists()
    elsewhere = folder.parent / f"{folder.name}-elsewhere" / "a.yaml"
    write(out=elsewhere)
    assert load_recipe(str(elsewhere)).recipe.data[0].path.exists()


def test_nothing_is_written_over_without_force(folder):
    write()
    before = (folder / "mine.yaml").read_text()
    with pytest.raises(InputError, match="--force"):
        write(model="mistralai/Mistral-7B-v0.1")
    assert (folder / "mine.yaml").read_text() == before
    write(model="mistralai/Mistral-7B-v0.1", force=True)
    assert load_recipe("mine.yaml").recipe.render.template == "alpaca"  # a bare base has no template of its own


def test_without_a_terminal_the_missing_options_are_named(folder):
    with pytest.raises(InputError, match="--name, --data"):
        init.write_recipe(None, MISTRAL, None, None, None)
    done = subprocess.run(
        [sys.executable, "-m", "finetune", "init", "--name", "x"], cwd=folder, capture_output=True, text=True,
        check=False, stdin=subprocess.DEVNULL, env={"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 2 and "--model, --data" in " ".join(done.stderr.split())


def test_on_a_terminal_only_what_is_missing_is_asked(folder):
    asked = []

    def ask(question, default):
        asked.append(question)
        return "rows.jsonl" if question.startswith("data") else default

    init.write_recipe(None, None, None, None, None, ask=ask)
    assert len(asked) == 4 and load_recipe("rows.yaml").recipe.model.id == MISTRAL
    asked.clear()
    write("other", device="l4", ask=ask)
    assert asked == []


@pytest.mark.slow
def test_the_length_is_the_longest_that_fits_the_device(folder, monkeypatch):
    roomy = load_length(device="h100")
    monkeypatch.setitem(DEVICES, "t4", replace(DEVICES["t4"], memory_bytes=int(5.8e9)))
    assert load_length(device="t4") < roomy == 2048
    monkeypatch.setitem(DEVICES, "t4", replace(DEVICES["t4"], memory_bytes=int(3e9)))
    with pytest.raises(InputError, match=r"needs .* GB even for rows of 256 tokens; take rtx3070, l4"):
        write("none", device="t4")
    assert not (folder / "none.yaml").exists()


def load_length(device):
    write(device=device, force=True)
    return load_recipe("mine.yaml").recipe.render.max_length_tokens


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"device": "t5"}, "allowed: rtx3070, t4"),
        ({"device": "cpu"}, "weeks"),
        ({"data": "gone.jsonl"}, "no file"),
        ({"data": "a b/c"}, "data.0.id"),
        ({"data": "~nobody-here/x"}, "no home folder ~nobody-here"),
        ({"model": "./gone"}, "no such folder"),
        ({"model": "builtin:large"}, "no builtin model"),
        ({"name": "a b"}, "name: found 'a b'"),
        ({"out": Path("rows.jsonl")}, "ends in .yaml"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(folder, changed, sentence):
    with pytest.raises(InputError, match=sentence):
        write(**changed)
    assert [p.name for p in folder.iterdir()] == ["rows.jsonl"]


def test_rows_that_fit_no_format_are_refused_with_their_columns(folder):
    (folder / "odd.jsonl").write_text('{"left": 1}\n')
    with pytest.raises(InputError, match="left"):
        write(data="odd.jsonl")


def test_a_folder_as_base_keeps_to_its_own_positions_and_template(folder):
    base = folder / "base"
    base.mkdir()
    config = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 128}
    (base / "config.json").write_text(json.dumps({**config, "vocab_size": 300, "max_position_embeddings": 600}))
    write(model="base", device="cpu")
    recipe = load_recipe("mine.yaml").recipe
    assert recipe.model.folder == base and recipe.render.max_length_tokens == 512
    assert recipe.render.template == "alpaca"
    (base / "chat_template.jinja").write_text("x")
    write(model="./base", device="cpu", force=True)
    assert load_recipe("mine.yaml").recipe.render.template == "auto"


def test_the_builtin_base_and_hub_data(folder):
    write("tiny", model="builtin:tiny-mistral", data="pydoc")
    assert load_recipe("tiny.yaml").recipe.train.max_steps == 150
    said = write("hub", data="owner/rows")
    assert load_recipe("hub.yaml").recipe.data[0].id == "owner/rows" and "when it is read" in said


@given(st.text(min_size=1, max_size=30))
def test_any_text_survives_yaml(text):
    if any(c != " " and not c.isprintable() for c in text):
        return
    assert yaml.safe_load("{path: " + init._scalar(text) + "}") == {"path": text}


def test_a_folder_a_pattern_and_rows_to_evaluate_on(folder):
    (folder / "more").mkdir()
    (folder / "more" / "a.jsonl").write_text('{"prompt": "Hi", "completion": "Ho"}\n')
    (folder / "held.csv").write_text("question;answer\nHi;Ho\n")
    for data in ("more", "more/*.jsonl"):
        said = write("many", data=data, eval_data="held.csv", force=True)
        recipe = load_recipe("many.yaml").recipe
        assert recipe.split is None and recipe.eval_data[0].label == "held.csv"
        assert "held.csv: format prompt_completion" in said and "format prompt_completion, since" in said
        assert len((folder / "many.yaml").read_text().splitlines()) <= 17


def test_a_path_of_this_machine_is_named_when_another_is_planned_for(folder, tmp_path_factory):
    away = tmp_path_factory.mktemp("away") / "rows.csv"
    away.write_text("question,answer\n" + "".join(f"What is {i}?,It is the number {i}.\n" for i in range(40)))
    line = "rows.csv: the recipe names its place on this machine"
    assert line not in write("one", "builtin:tiny-mistral", str(away))
    assert line in write("two", "builtin:tiny-mistral", str(away), "t4")
