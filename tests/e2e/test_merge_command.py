"""`finetune merge` and `train: null`: adapters that other tools made, merged as peft itself merges them."""

import dataclasses
import json
import shutil

import pytest
import torch

from finetune.utils.files import read_json, write_json
from tests.helpers.tiny_models import adapted, load

ROOTS = ("artifacts", "scratch")


@pytest.fixture(scope="module")
def work(pristine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merging") / "work"
    shutil.copytree(pristine.folder, folder)
    held = (folder / "rows.jsonl").read_text().splitlines(keepends=True)[:40]
    (folder / "held.jsonl").write_text("".join(held))
    return dataclasses.replace(pristine, folder=folder)


@pytest.fixture(scope="module")
def adapter(work):
    """An adapter made by peft alone, in 16-bit terms, with the tokenizer beside it as trainers save it."""
    folder = work.folder / "theirs"
    adapted(load(work.folder / "base"), folder, r=4, use_rslora=True, target_modules=["q_proj", "up_proj"])
    config = read_json(folder / "adapter_config.json")
    write_json(folder / "adapter_config.json", {**config, "base_model_name_or_path": "them/base"})
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (work.folder / "base" / name).exists():
            shutil.copy(work.folder / "base" / name, folder)
    return folder


def merge(work, *arguments, status=0):
    roots = [part for name in ROOTS for part in (f"--{name}", str(work.folder / name))]
    return work.run("merge", *arguments, *roots, status=status)


def test_a_foreign_adapter_is_merged_as_peft_merges_it(work, adapter):
    from peft import PeftModel

    done = merge(work, adapter, "--base", "./base", "--data", "held.jsonl", "--out", "merged", "--gguf", "q8_0")
    out = work.folder / "merged"
    expected = PeftModel.from_pretrained(load(work.folder / "base"), adapter).merge_and_unload()
    found = load(out).state_dict()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0)
    assert "the adapter names the base them/base" in done.stderr
    certificate = json.loads((out / "certificate.json").read_text())
    assert (
        certificate["agreement"] > 0.99 and certificate["rows"] == 40
    )  # every row given; of other arithmetic, so not exactly equal
    assert (out / "model-q8_0.gguf").exists() and "trained elsewhere" in (out / "README.md").read_text()
    runs = json.loads(work.run("runs", "--json", *[p for n in ROOTS for p in (f"--{n}", str(work.folder / n))]).stdout)
    assert [r["recipe"] for r in runs] == ["merge-theirs"] and runs[0]["status"] == "done"
    again = merge(work, adapter, "--base", "./base", "--out", "merged", status=2).stderr
    assert "not an empty folder" in again


@pytest.mark.slow
def test_without_data_there_is_no_certificate_and_it_says_so(work, adapter):
    done = merge(work, adapter, "--base", "./base", "--out", "bare")
    assert "without a certificate" in done.stderr and not (work.folder / "bare" / "certificate.json").exists()
    assert torch.equal(*(load(work.folder / n).state_dict()["lm_head.weight"] for n in ("bare", "base")))
    assert (work.folder / "bare" / "README.md").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("./gone",), "is not a folder"),
        (("./base",), "holds no adapter_config.json"),
        (("nobody",), "has not run yet"),
        (("a b",), "no folder, RECIPE"),
        (("./theirs", "--base", "./rows"), "is not a folder"),
        (("./theirs", "--base", "./base", "--data", "gone.jsonl"), "no such file"),
        (("./theirs", "--base", "./base", "--gguf", "q9"), "export.gguf.0: found 'q9'"),
    ],
)
def test_what_cannot_be_merged_is_refused(work, adapter, arguments, words):
    refused = merge(work, *arguments, status=2)
    assert words in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.slow
def test_another_template_beside_the_adapter_is_refused_in_a_recipe(work, adapter):
    other = work.folder / "other"
    shutil.copytree(adapter, other)
    (other / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    recipe = work.folder / "imported.yaml"
    text = (work.folder / "small.yaml").read_text().replace("name: small", "name: imported")
    lines = [line for line in text.splitlines() if not line.startswith(("lora:", "train:"))]
    recipe.write_text("\n".join([*lines, "train: null", "lora: {start_from: ./other}"]) + "\n")
    refused = work.run("run", "imported.yaml", status=3).stderr
    assert "chat template writes a question as '<user>How far is it?'" in refused
    (other / "chat_template.jinja").write_text((work.folder / "base" / "chat_template.jinja").read_text())
    work.run("run", "imported.yaml")
    assert work.show("imported")["stages"]["train"]["metrics"]["imported"] == "other"
    # RECIPE names its newest run: another recipe imports what this one did, and more steps would start from it
    (work.folder / "next.yaml").write_text(
        recipe.read_text().replace("./other", "imported").replace(": imported\n", ": next\n", 1)
    )
    done = work.run("run", "next.yaml")
    assert "lora.start_from: the adapter of imported@" in done.stderr
    assert work.show("next")["stages"]["merge"]["key"] == work.show("imported")["stages"]["merge"]["key"]
