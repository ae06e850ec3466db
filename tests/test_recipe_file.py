"""Recipes as people really write them: what is fine, and one clear line for everything that is not."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.errors import InputError
from finetune.recipe_file import load_recipe, parse_recipe

GOOD = """\
schema: 1
name: good
model: builtin:tiny-mistral
data:
  - {source: pydoc}
"""


def errors(text, tmp_path, sets=()):
    path = tmp_path / "r.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as caught:
        load_recipe(str(path), list(sets))
    assert caught.value.exit_status == 2
    return str(caught.value).replace(f"{path}:", "r:").replace(str(path), "r")


# ruff: noqa: E501
BAD = {
    "unknown key at the top": (GOOD + "trian: {}\n", "r:6: trian: unknown field; did you mean train?"),
    "unknown key in a section": (GOOD + "train: {learning_rte: 1}\n", "r:6: train.learning_rte: unknown field; did you mean learning_rate?"),
    "unknown key in a source": (GOOD + "  - {source: local, path: x, formt: auto}\n", "r:6: data.1.formt: unknown field; did you mean format?"),
    "unknown key in the model": (GOOD.replace("builtin:tiny-mistral", "{id: a/b, revison: c}"), "r:3: model.revison: unknown field; did you mean revision?"),
    "a word for a number": (GOOD + "train: {learning_rate: high}\n", "r:6: train.learning_rate: found 'high'; allowed: a valid number"),
    "a number for a list": (GOOD + "lora: {targets: 5}\n", "r:6: lora.targets: found 5; allowed: 'all-linear' or a valid list"),
    "a list for a section": (GOOD + "train: [1]\n", "r:6: train: found [1]"),
    "a rate of zero": (GOOD + "train: {learning_rate: 0}\n", "r:6: train.learning_rate: found 0; allowed: greater than 0"),
    "a rate that is not a number": (GOOD + "train: {learning_rate: .nan}\n", "r:6: train.learning_rate"),
    "negative epochs": (GOOD + "train: {epochs: -1}\n", "r:6: train.epochs: found -1"),
    "half a batch": (GOOD + "train: {batch_rows: 1.5}\n", "r:6: train.batch_rows: found 1.5"),
    "rank zero": (GOOD + "lora: {r: 0}\n", "r:6: lora.r: found 0; allowed: greater than or equal to 1"),
    "dropout of one": (GOOD + "lora: {dropout: 1}\n", "r:6: lora.dropout: found 1; allowed: less than 1"),
    "lora on lm_head": (GOOD + "lora: {targets: [q_proj, lm_head]}\n", "r:6: lora.targets: "),
    "no targets": (GOOD + "lora: {targets: []}\n", "an empty list trains nothing"),
    "a broken expression": (GOOD + "filter: {drop_matching: ['(']}\n", "r:6: filter.drop_matching.0: found '('; not a regular expression"),
    "two sampling rules": (GOOD + "sample: {top_k: 3, random: 4}\n", "r:6: sample: top_k and random are two different rules"),
    "a threshold above one": (GOOD + "dedup: {threshold: 1.5}\n", "r:6: dedup.threshold: found 1.5"),
    "an unknown field choice": (GOOD + "dedup: {field: outputs}\n", "did you mean output?"),
    "a keep rule that is none": (GOOD + "dedup: {keep: shortest}\n", "r:6: dedup.keep: found 'shortest'"),
    "an unknown format": (GOOD + "  - {source: local, path: x, format: alpacca}\n", "did you mean alpaca?"),
    "an unknown source": (GOOD + "  - {source: locl, path: x}\n", "r:6: data.1: found source 'locl'; allowed: source: hub, local or pydoc; did you mean local?"),
    "a source without a kind": (GOOD + "  - {path: x}\n", "r:6: data.1: found source None"),
    "a source without its path": (GOOD + "  - {source: local}\n", "r:6: data.1.path: this field is required"),
    "no data": ("name: a\nmodel: a/b\ndata: []\n", "r:3: data: found []"),
    "no model": ("name: a\ndata: [{source: pydoc}]\n", "r:1: model: this field is required"),
    "no name": ("model: a/b\ndata: [{source: pydoc}]\n", "r:1: name: this field is required"),
    "a name that is a path": (GOOD.replace("name: good", "name: ../evil"), "r:2: name: found '../evil'"),
    "an unknown builtin": (GOOD.replace("tiny-mistral", "huge-mistral"), "there is builtin:tiny-mistral"),
    "a model that is no name": (GOOD.replace("builtin:tiny-mistral", "'a b'"), "is no Hub name"),
    "a newer schema": (GOOD.replace("schema: 1", "schema: 2"), "r:1: schema: found 2; allowed: 1"),
    "a path that climbs out": (GOOD + "  - {source: local, path: ../../etc/passwd}\n", "stays inside the recipe's folder"),
    "a template that climbs out": (GOOD + "render: {template: ../x.jinja}\n", "stays inside the recipe's folder"),
    "a micro-batch that does not divide": (GOOD + "runtime: {micro_batch_rows: 3}\n", "does not divide train.batch_rows 16; take one of 1, 2, 4, 8, 16"),
    "packing shorter than its documents": (GOOD + "pack: {length_tokens: 100}\n", "a whole document would not fit"),
    "an unsupported export": (GOOD + "export: {gguf: [q9]}\n", "r:6: export.gguf.0: found 'q9'"),
    "a key written twice": (GOOD + "name: again\n", "r:6: name: written twice"),
    "a key written twice deep": (GOOD + "train:\n  epochs: 1\n  epochs: 2\n", "r:8: train.epochs: written twice"),
    "an alias": (GOOD + "lora: &a {r: 1}\ntrain: *a\n", "r:7: not YAML: aliases"),
    "an alias bomb": ("a: &a [1]\nb: &b [*a,*a]\nc: [*b,*b]\n", "r:2: not YAML: aliases"),
    "a Python tag": (GOOD + "seed: !!python/object/apply:os.system [ls]\n", "r:6: "),
    "tabs": (GOOD + "train:\n\tepochs: 1\n", "r:7: not YAML"),
    "an open bracket": (GOOD + "train: {epochs: 1\n", "not YAML"),
    "a list": ("- a\n- b\n", "r:1: a recipe is a mapping"),
    "a word": ("hello\n", "found a str"),
    "nothing": ("", "found nothing"),
    "two documents": (GOOD + "---\n" + GOOD, "not YAML"),
    "UTF-16": (GOOD.encode("utf-16"), "encoded as UTF-16; save it as UTF-8"),
    "a binary file": (b"\x7fELF\x80\x81\x82", "r:1: not UTF-8"),
    "a NUL byte": (GOOD.encode() + b"\0", "not YAML"),
    "ten megabytes": (b"a: 1\n" * 2_000_000, "a recipe is at most 1,000,000"),
    "nesting without end": ("a: " + "[" * 5000, "r"),
    "a number of a thousand digits": (GOOD + f"seed: {'9' * 1000}\n", "a number of 1000 digits"),
    "a seed out of range": (GOOD + "seed: -1\n", "r:6: seed: found -1"),
}  # fmt: skip


@pytest.mark.parametrize("text, expected", BAD.values(), ids=BAD.keys())
def test_a_bad_recipe_says_where_and_what(text, expected, tmp_path):
    assert expected in errors(text, tmp_path)


def test_all_errors_of_a_file_come_at_once_in_its_order(tmp_path):
    text = "modle: x\n" + GOOD + "train: {epochs: 0, batch_rows: x}\nlora: {r: 0}\n"
    lines = errors(text, tmp_path).splitlines()
    assert [line.split(": ")[0] for line in lines] == ["r:1", "r:7", "r:7", "r:8"]


SETS = {
    "no value": ("train.epochs", "write SECTION.FIELD=VALUE"),
    "an unknown field": ("train.epoch=2", "--set train.epoch=2: train.epoch: unknown field; did you mean epochs?"),
    "a wrong type": ("train.epochs=many", "--set train.epochs=many: train.epochs: found 'many'"),
    "through a value": ("name.x=1", "name is 'good', not a section"),
    "an index out of range": ("data.7.take=1", "data has 1 items"),
    "broken YAML": ("train.epochs={", "--set train.epochs:1: not YAML"),
    "an empty step": ("train..epochs=1", "write SECTION.FIELD=VALUE"),
}


@pytest.mark.parametrize("option, expected", SETS.values(), ids=SETS.keys())
def test_a_bad_set_says_so(option, expected, tmp_path):
    assert expected in errors(GOOD, tmp_path, [option])


def test_set_reaches_every_kind_of_field(tmp_path):
    sets = [
        "train.learning_rate=2e-5",
        "data.0.take=5",
        "dedup=null",
        "lora.targets=[q_proj]",
        "model.trust_remote_code=true",
    ]
    recipe = parse_recipe(GOOD, tmp_path / "r.yaml", sets)
    assert recipe.train.learning_rate == 2e-5
    assert recipe.data[0].take == 5
    assert recipe.dedup is None
    assert recipe.lora.targets == ["q_proj"]
    assert recipe.model.trust_remote_code


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(InputError, match="did you mean tiny-pydoc"):
        load_recipe("tiny-pydok")
    with pytest.raises(InputError, match="no such recipe file"):
        load_recipe("nowhere.yaml")


def test_a_byte_order_mark_is_no_error(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load_recipe(str(path)).recipe.name == "good"


def test_numbers_are_those_of_yaml_1_2(tmp_path):
    recipe = parse_recipe(GOOD + "train: {learning_rate: 1e-4}\npublish: {license: no}\n", tmp_path / "r.yaml")
    assert recipe.train.learning_rate == 1e-4
    assert recipe.publish.license == "no"


def test_a_local_path_is_found_beside_the_recipe_and_never_enters_a_key(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    recipe = parse_recipe(GOOD + "  - {source: local, path: rows.jsonl}\n", tmp_path / "r.yaml")
    assert recipe.data[1].path == tmp_path / "rows.jsonl"
    assert str(tmp_path) not in recipe.model_dump_json()


@pytest.mark.parametrize("path", sorted(Path("recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_validates_and_names_its_hardware(path):
    recipe = load_recipe(str(path)).recipe
    assert recipe.name == path.stem
    assert "# Hardware: " in path.read_text()


def test_validate_exits_2_without_a_traceback_and_never_imports_torch(tmp_path):
    (tmp_path / "bad.yaml").write_text("modle: x\n")
    code = "import sys; from finetune.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "validate", str(tmp_path / "bad.yaml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "False\n")
    assert "bad.yaml:1: modle: unknown field; did you mean model?" in done.stderr and "Traceback" not in done.stderr


trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda x: (
        st.lists(x, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "model", "data", "train", "lora", "id", "r", "zz"]), x)
    ),
    max_leaves=12,
)


@given(trees)
def test_any_tree_is_a_recipe_or_is_refused_cleanly(tree):
    import yaml

    try:
        parse_recipe(yaml.safe_dump(tree, allow_unicode=True), Path("r.yaml"))
    except InputError as error:
        assert str(error)
