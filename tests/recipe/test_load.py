"""Recipes as people really write them: what is fine, and one clear line for everything that is not."""

from pathlib import Path

import pytest

from finetune.errors import InputError
from finetune.pipeline.recipe_checks import absent
from finetune.recipe import Recipe
from finetune.recipe.load import find_recipe, load_recipe, parse_recipe
from finetune.recipe.reference import _models
from finetune.utils.resources import complete_recipe, known_recipes

ROOT = Path(__file__).parents[2]
RECIPE_MODELS = _models(Recipe)

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
    "a word for a number": (GOOD + "train: {learning_rate: high}\n", "r:6: train.learning_rate: found 'high'; allowed: a number"),
    "a number for a list": (GOOD + "lora: {targets: 5}\n", "r:6: lora.targets: found 5; allowed: 'all-linear' or a list"),
    "a rate of zero": (GOOD + "train: {learning_rate: 0}\n", "r:6: train.learning_rate: found 0; allowed: greater than 0"),
    "lora on lm_head": (GOOD + "lora: {targets: [q_proj, lm_head]}\n", "r:6: lora.targets: "),
    "no targets": (GOOD + "lora: {targets: []}\n", "an empty list trains nothing"),
    "a broken expression": (GOOD + "filter: {drop_matching: ['(']}\n", "r:6: filter.drop_matching.0: found '('; not a regular expression"),
    "two sampling rules": (GOOD + "sample: {top_k: 3, random: 4}\n", "r:6: sample: top_k and random are different rules"),
    "an unknown source": (GOOD + "  - {source: locl, path: x}\n", "r:6: data.1: found source 'locl'; allowed: source: hub, local or pydoc; did you mean local?"),
    "a source without a kind": (GOOD + "  - {path: x}\n", "r:6: data.1: the field `source` is missing"),
    "no data": ("name: a\nmodel: a/b\ndata: []\n", "r:3: data: found []"),
    "a name that is a path": (GOOD.replace("name: good", "name: ../evil"), "r:2: name: found '../evil'"),
    "an unknown builtin": (GOOD.replace("tiny-mistral", "huge-mistral"), "allowed: builtin:tiny-mistral"),
    "a model that is no name": (GOOD.replace("builtin:tiny-mistral", "'a b'"), "allowed: a Hub name"),
    "a newer schema": (GOOD.replace("schema: 1", "schema: 2"), "r:1: schema: found 2; allowed: 1"),
    "a path that climbs out": (GOOD + "  - {source: local, path: ../../etc/passwd}\n", "leaves the recipe's folder"),
    "a template that climbs out": (GOOD + "render: {template: ../x.jinja}\n", "r:6: render.template: found '../x.jinja'; '../x.jinja' leaves the recipe's folder"),
    "a micro-batch that does not divide": (GOOD + "runtime: {micro_batch_rows: 3}\n", "does not divide train.batch_rows 16; take one of 1, 2, 4, 8, 16"),
    "packing shorter than its documents": (GOOD + "pack: {length_tokens: 100}\n", "a whole document would not fit"),
    "packing none with an option of packing": (GOOD + "pack: {method: none, length_tokens: 4096}\n", "r:6: pack.method: found 'none'; allowed: 'bfd'; pack: null turns it off"),
    "a section that is false": (GOOD + "dedup: false\n", "r:6: dedup: found false; allowed: fields, as in {exact: …}; dedup: null turns it off"),
    "a copy of what is not quantised": (GOOD + "quantization: null\nruntime: {keep_quantized: always}\n", "r:7: runtime.keep_quantized: quantization is null, so there is no 4-bit copy"),
    "a static embedding without a name": (GOOD + "dedup: {embedding: 'model2vec:'}\n", "r:6: dedup.embedding: found 'model2vec:'; write a Hub model"),
    "an unsupported export": (GOOD + "export: {gguf: [q9]}\n", "r:6: export.gguf.0: found 'q9'"),
    "a key written twice": (GOOD + "name: again\n", "r:6: name: written twice"),
    "an alias bomb": ("a: &a [1]\nb: &b [*a,*a]\nc: [*b,*b]\n", "r:2: not YAML: aliases"),
    "a Python tag": (GOOD + "seed: !!python/object/apply:os.system [ls]\n", "r:6: seed: the tag !!python/object/apply:os.system is not allowed"),
    "a list": ("- a\n- b\n", "r:1: a recipe is a mapping"),
    "nothing": ("", "found nothing"),
    "two documents": (GOOD + "---\n" + GOOD, "r:6: a second document begins here"),
    "a binary file": (b"\x7fELF\x80\x81\x82", "r:1: not UTF-8"),
    "a NUL byte": (GOOD.encode() + b"\0", "r:6: the character U+0000 is not allowed"),
    "ten megabytes": (b"a: 1\n" * 2_000_000, "a recipe is at most 100,000"),
    "nesting without end": ("a: " + "[" * 5000, "r"),
    "a number of a thousand digits": (GOOD + f"seed: {'9' * 1000}\n", "a number of 1000 digits"),
    "a field outside its section": (GOOD + "learning_rate: 1e-4\n", "r:6: learning_rate: unknown field; it belongs in train or preference; allowed: "),
    "an internal field": (GOOD + "render: {template_file: /etc/passwd}\n", "r:6: render.template_file: unknown field; write the file as template"),
    "a name that YAML reads as a number": (GOOD.replace("name: good", "name: 123"), "r:2: name: found 123; allowed: text; put it in quotes"),
    "a number in quotes": (GOOD + "train: {epochs: '1'}\n", "r:6: train.epochs: found '1'; allowed: a number; write 1"),
    "a number with underscores": (GOOD + "train: {batch_rows: 1_000}\n", "r:6: train.batch_rows: found '1_000'; allowed: a whole number; write 1000"),
    "a whole number with an exponent": (GOOD + "train: {max_steps: 1e3}\n", "r:6: train.max_steps: found 1000.0; allowed: a whole number; write 1000"),
    "a truth of YAML 1.1": (GOOD + "dedup: {exact: no}\n", "r:6: dedup.exact: found 'no'; allowed: true or false; write false"),
    "a section that cannot be off": (GOOD + "lora: null\n", "r:6: lora: found null; allowed: fields, as in {r: …}; leave the line out"),
    "no training and no adapter": (GOOD + "train: null\n", "r:6: train: null imports the adapter of lora.start_from, which is null"),
    "a base of no adapter": (GOOD + "lora: {start_base: a/b}\n", "r:6: lora.start_base: it describes the adapter of lora.start_from"),
    "its own newest run": (GOOD.replace("name: good", "name: again") + "lora: {start_from: again}\n", "name one run, again@RUN"),
    "data that is no list": ("name: a\nmodel: a/b\ndata: {source: pydoc}\n", "r:3: data: found {'source': 'pydoc'}; allowed: a list, each source in a line that begins with -"),
    "a source that is a word": ("name: a\nmodel: a/b\ndata: [x]\n", "r:3: data.0: found 'x'; allowed: a source, as in {source: local, path: rows.jsonl}"),
    "one target without its list": (GOOD + "lora: {targets: q_proj}\n", "r:6: lora.targets: a single name must be a list: [q_proj]"),
    "an expression that takes lm_head": (GOOD + "lora: {targets: '.*'}\n", "r:6: lora.targets: found '.*'; TRL cannot train LoRA on lm_head"),
    "an expression too large for Python": (GOOD + "filter: {drop_matching: ['a{99999999999999}']}\n", "r:6: filter.drop_matching.0: found 'a{99999999999999}'; not a regular expression"),
    "characters that no row can have": (GOOD + "filter: {min_user_characters: 9, max_user_characters: 3}\n", "r:6: filter.max_user_characters: 3 is under min_user_characters 9: no row"),
    "an export of nothing": (GOOD + "export: {perplexity_rows: 4}\n", "r:6: export: names no format"),
    "a folder that is not exported": (GOOD + "export: {gguf: [q8_0]}\npublish: {what: [fp8]}\n", "found fp8, but export does not name it"),
    "an export without a merge": (GOOD + "merge: null\nexport: {gguf: [q8_0]}\n", "r:7: export: it needs the merged model, but merge is null"),
    "publishing a merge that is off": (GOOD + "merge: null\npublish: {repo: a/b, what: [merged]}\n", "r:7: publish.what: found merged, but merge is null"),
    "a dequantized base without quantization": (GOOD + "quantization: null\ncertify: {base: dequantized}\n", "r:7: certify.base: quantization is null, so nothing is dequantized"),
    "fp16 on a CPU": (GOOD + "runtime: {device: cpu}\ntrain: {precision: fp16}\n", "r:7: train.precision: fp16 needs a GPU"),
    "a repository without an owner": (GOOD + "publish: {repo: me}\n", "r:6: publish.repo: found 'me'; allowed: OWNER/NAME"),
    "a merge key": (GOOD + "<<: {seed: 1}\n", "r:6: a field's name must be a plain word"),
    "a bracket that is not closed": (GOOD + "train: {epochs: 1\nlora: {r: 1}\n", "that begins in line 6"),
    "a quote that is not closed": (GOOD + 'publish: {license: "x}\n', "while scanning a quoted scalar that begins in line 6"),
    "a colon in a text": (GOOD + "publish: {license: a: b}\n", "quote a text that contains a colon"),
    "an at sign": (GOOD + "publish: {license: @x}\n", "r:6: not YAML: found character '@' that cannot start any token (put the text in quotes)"),
    "a home folder that is not there": (GOOD + "  - {source: local, path: ~nobody-here/x}\n", "r:6: data.1.path: found '~nobody-here/x'; no home folder ~nobody-here"),
    "a path that is too long": (GOOD + f"  - {{source: local, path: {'x' * 5000}}}\n", "r:6: data.1.path: found 'xxx"),
    "a lone surrogate": (GOOD + 'publish: {license: "\\ud800"}\n', "r:6: publish.license: a lone surrogate"),
    "UTF-32": (GOOD.encode("utf-32"), "save it as UTF-8"),
    "Windows line ends": (GOOD.replace("\n", "\r\n") + "train: {epoch: 1}\r\n", "r:6: train.epoch: unknown field; did you mean epochs?"),
}  # fmt: skip


@pytest.mark.parametrize("text, expected", BAD.values(), ids=BAD.keys())
def test_a_bad_recipe_says_where_and_what(text, expected, tmp_path):
    said = errors(text, tmp_path)
    assert expected in said
    assert not any(word in said for word in ("valid ", "Input should", "dictionary", "instance of", "[\\w]")), said


FINE = {
    "a micro-batch that divides": "runtime: {micro_batch_rows: 8}\n",
    "rows as long as a packed row": "pack: {length_tokens: 2048}\n",
    "an expression for two modules": "lora: {targets: '.*\\.(q|v)_proj'}\n",
    "the same limit twice": "filter: {min_user_characters: 3, max_user_characters: 3}\n",
    "an export of a merge": "export: {gguf: [q8_0]}\n",
    "an adapter without a merge": "merge: null\npublish: {repo: a/b}\n",
    "a base that was not quantised": "quantization: null\ncertify: {base: original}\n",
    "fp16 where the device is found": "train: {precision: fp16}\n",
    "a whole number for a fraction": "train: {epochs: 2}\n",
    "words that YAML 1.1 reads as truths": "publish: {license: no}\n",
    "an anchor nobody follows": "lora: &a {r: 1}\n",
}


@pytest.mark.parametrize("text", FINE.values(), ids=FINE.keys())
def test_what_is_no_mistake_is_not_complained_of(text, tmp_path):
    parse_recipe(GOOD + text, tmp_path / "r.yaml")


def test_a_file_of_another_kind_does_not_fill_the_screen(tmp_path):
    lines = errors(GOOD + "".join(f"k{i}: 1\n" for i in range(600)), tmp_path).splitlines()
    assert len(lines) == 51 and lines[0].startswith("r:6: k0: ") and lines[-1] == "r: and 550 more errors"


def test_contradictions_come_all_at_once(tmp_path):
    text = "merge: null\nexport: {gguf: [f16]}\npublish: {what: [merged]}\nruntime: {micro_batch_rows: 3}\n"
    assert [line.split(": ")[1] for line in errors(GOOD + text, tmp_path).splitlines()] == [
        "export", "publish.what", "runtime.micro_batch_rows",
    ]  # fmt: skip


def test_a_key_written_twice_or_a_tag_hides_no_other_error(tmp_path):
    lines = errors(GOOD + "seed: !!binary aGk=\nname: x\ntrain: {epoch: 1}\n", tmp_path, ["lora.r=0", "x"]).splitlines()
    assert [line.split(": ")[0] for line in lines] == ["--set x", "--set lora.r=0", "r:6", "r:7", "r:8"]
    assert [line.split(": ")[1] for line in lines[2:]] == ["seed", "name", "train.epoch"]


ABSENT = {
    "a data file": ("  - {source: local, path: rows.jsnl}\n", "r:6: data.1.path: no such file: ", "did you mean rows.jsonl?"),
    "a data folder": ("  - {source: local, path: none}\n", "r:6: data.1.path: ", "a folder without a file of rows; allowed endings: .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow"),
    "a data pattern": ("  - {source: local, path: x-*.jsonl}\n", "r:6: data.1.path: no file matches ", "under the working folder"),
    "held-out rows": ("eval_data: [{source: local, path: rows.jsnl}]\n", "r:6: eval_data.0.path: no such file", "did you mean rows.jsonl?"),
    "evaluation data": ("decontaminate: {against: [{source: local, path: x}]}\n", "r:6: decontaminate.against.0.path: no such file", ""),
    "a template": ("render: {template: alpca}\n", "r:6: render.template: found 'alpca'; allowed: auto, alpaca, ", "did you mean alpaca?"),
    "a template file": ("render: {template: x.jinja}\n", "r:6: render.template: no such file: ", "x.jinja"),
    "an encoder's folder": ("dedup: {embedding: ./nope}\n", "r:6: dedup.embedding: no such folder: ", "/nope; allowed: lsa, OWNER/NAME, a folder"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "start", "end"), ABSENT.values(), ids=ABSENT.keys())
def test_what_is_named_and_not_there_is_said(text, start, end, tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "none").mkdir()
    (tmp_path / "r.yaml").write_text(GOOD + text)
    (line,) = absent(load_recipe(str(tmp_path / "r.yaml")))
    line = line.replace(f"{tmp_path / 'r.yaml'}:", "r:")
    assert line.startswith(start) and end in line


def test_what_is_there_is_not_complained_of(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    text = GOOD.replace("builtin:tiny-mistral", "/nope") + "  - {source: local, path: rows.jsonl}\n"
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "x.jinja").write_text("")
    (tmp_path / "r.yaml").write_text(text + "render: {template: x.jinja}\ndedup: {embedding: org/encoder}\n")
    loaded = load_recipe(str(tmp_path / "r.yaml"), [f"model={base}", "decontaminate.against=[{source: pydoc}]"])
    assert absent(loaded) == [f"--set model={base}: model: {base} holds no config.json"]
    (base / "config.json").write_text("{}")
    assert absent(loaded) == []
    assert absent(load_recipe(str(tmp_path / "r.yaml"))) == [f"{tmp_path / 'r.yaml'}:3: model: /nope is not a folder"]


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
    "an index that is no number": ("data.x.take=1", "data has 1 items; found index 'x', allowed: 0…0"),
    "a value for a section": ("train=1", "--set train=1: train: found 1; allowed: fields, as in {learning_rate: …}"),
    "no value for a name": ("name=", "--set name=: name: found null; allowed: text"),
    "a tag": ("train.epochs=!!python/name:os.system x", "--set train.epochs:1: the tag !!python/name"),
    "a NUL": ("seed=\0", "--set seed:1: the character U+0000"),
    "a contradiction": (
        "runtime.micro_batch_rows=3",
        "--set runtime.micro_batch_rows=3: runtime.micro_batch_rows: 3 does not",
    ),
    "an internal field": ("model.folder=/etc", "--set model.folder=/etc: model.folder: unknown field"),
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


def test_a_files_name_is_found_in_recipes_unless_it_is_here(tmp_path, monkeypatch):
    assert find_recipe("tiny-pydoc.yaml") == find_recipe("tiny-pydoc")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-pydoc.yaml").write_text(GOOD)
    assert find_recipe("tiny-pydoc.yaml") == Path("tiny-pydoc.yaml")


@pytest.mark.parametrize("name", ["~nobody-here", "~nobody-here/x.yaml", "x" * 5000, "", ".", "/", "a\0b", "recipes"])
def test_a_name_that_is_none_is_refused_cleanly(name):
    with pytest.raises(InputError, match=r"no home folder|the path cannot be read|no recipe named|no such recipe"):
        load_recipe(name)


def test_a_folder_is_no_recipe(tmp_path):
    (tmp_path / "x.yaml").mkdir()
    with pytest.raises(InputError, match="a folder, not a recipe file"):
        load_recipe(str(tmp_path / "x.yaml"))


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


def test_a_folder_of_ones_own_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "tiny-pydoc.yaml").write_text(GOOD)
    (tmp_path / "recipes" / "tiny-mine.yaml").write_text(GOOD)
    assert complete_recipe("tiny") == ["tiny-evol", "tiny-mine", "tiny-preference", "tiny-pydoc"]
    assert known_recipes()["tiny-pydoc"] == Path("recipes/tiny-pydoc.yaml")


def test_an_embedding_model_lies_beside_the_recipe_wherever_the_command_is_typed(tmp_path, monkeypatch):
    encoder, elsewhere = tmp_path / "recipes" / "encoder", tmp_path / "elsewhere"
    encoder.mkdir(parents=True)
    elsewhere.mkdir()
    for kind in ("", "model2vec:"):
        (tmp_path / "recipes" / "r.yaml").write_text(GOOD + f"dedup: {{embedding: '{kind}./encoder'}}\n")
        monkeypatch.chdir(elsewhere)
        loaded = load_recipe(str(tmp_path / "recipes" / "r.yaml"))
        assert loaded.recipe.dedup.embedding_folder == encoder
        assert loaded.recipe.dedup.embedding == f"{kind}folder:encoder"  # what a key holds: no place of this machine
        assert absent(loaded) == []


@pytest.mark.parametrize("sets", [[], ["dedup.minhash.ngram=3"]])
def test_an_old_name_is_read_with_one_note(tmp_path, sets):
    path = tmp_path / "r.yaml"
    path.write_text(GOOD + ("" if sets else "dedup: {minhash: {ngram: 3}}\n"))
    loaded = load_recipe(str(path), sets)
    assert loaded.recipe.dedup.jaccard.ngram == 3 and len(loaded.notes) == 1
    assert "dedup.minhash is now called dedup.jaccard" in loaded.notes[0]
    path.write_text(GOOD + "dedup: {jaccard: {ngram: 3}}\n")
    assert load_recipe(str(path)).notes == () and load_recipe(str(path)).recipe == loaded.recipe


@pytest.mark.parametrize("sets", [[], ["runtime.cache_dequantized=true"]])
def test_a_field_that_is_gone_is_ignored_with_one_note(tmp_path, sets):
    path = tmp_path / "r.yaml"
    path.write_text(GOOD + ("" if sets else "runtime: {cache_dequantized: true}\n"))
    loaded = load_recipe(str(path), sets)
    assert len(loaded.notes) == 1 and "runtime.cache_dequantized is no longer offered" in loaded.notes[0]


def test_errors_in_a_field_under_its_old_name_have_its_line(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(GOOD + "dedup:\n  minhash: {ngram: 0}\n")
    with pytest.raises(InputError, match=r"r\.yaml:7: dedup\.jaccard\.ngram: found 0"):
        load_recipe(str(path))
    path.write_text(GOOD + "dedup:\n  minhash: {}\n  jaccard: {}\n")
    with pytest.raises(InputError, match=r"r\.yaml:7: dedup\.minhash: the old name of dedup\.jaccard"):
        load_recipe(str(path))
