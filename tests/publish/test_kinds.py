"""GGUF files and curated rows: pushed, pushed again, pulled and loaded; and no kind among another."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune.data.records import Example, Message, write_rows
from finetune.errors import InputError
from tests.helpers.base_templates import CHATML
from tests.helpers.exported import merged
from tests.helpers.hub_server import TOKEN, LoopbackHub
from tests.helpers.publishing import Act, recipe
from tests.stages.finished import context
from tests.stages.finished import write_rows as write_tokens

GGUF: dict[str, Any] = {"export": {"gguf": ["q8_0", "f16"]}}


@pytest.fixture
def exported(act: Act, tmp_path: Path) -> Path:
    """A real export of a tiny model in place of the merged words, with the template that was trained."""
    pytest.importorskip("gguf")
    from finetune.recipe import Export
    from finetune.stages import export

    shutil.rmtree(act.folders["merge"])
    merged(act.folders["merge"], "qwen2", intermediate_size=128)
    out = act.folders["export"] = tmp_path / "artifacts" / "export"
    out.mkdir()
    write_tokens(act.folders["render"] / "eval.parquet", [list(range(3 + i, 20 + i)) for i in range(4)])
    inputs = {"merge": act.folders["merge"], "render": act.folders["render"]}
    export.run(export.Spec(export=Export.model_validate(GGUF["export"]), tokens=8192), inputs, out, context(out))
    (out / "manifest.json").write_text("{}")
    return out


def test_gguf_is_pushed_pushed_again_pulled_and_loaded(
    hub: LoopbackHub, act: Act, exported: Path, tmp_path: Path
) -> None:
    import torch
    from huggingface_hub import ModelCard, snapshot_download
    from transformers import AutoModelForCausalLM, AutoTokenizer

    first = act(recipe(what=["gguf"], **GGUF))["pushes"][0]
    files = {"model-q8_0.gguf", "model-f16.gguf", "Modelfile", "README.md", "assets/training.svg", ".gitattributes"}
    assert set(hub.files("me/tiny")) == files and first["loaded"] == ["Modelfile"]
    hub.requests.clear()
    again = act(recipe(what=["gguf"], **GGUF))["pushes"][0]
    assert not again["new_commit"] and again["commit"] == first["commit"] and hub.asked("PUT", "") == 0
    pulled = Path(snapshot_download("me/tiny", revision=first["commit"], cache_dir=tmp_path / "cache"))
    card = ModelCard.load(pulled / "README.md")
    assert (card.data["base_model_relation"], card.data["library_name"]) == ("quantized", "gguf")
    options: dict[str, Any] = {"gguf_file": "model-f16.gguf", "dtype": torch.float32}
    there = AutoModelForCausalLM.from_pretrained(pulled, **options).state_dict()
    here = AutoModelForCausalLM.from_pretrained(act.folders["merge"], dtype=torch.float32).state_dict()
    assert set(there) == set(here)
    assert all(torch.equal(there[n], w if w.ndim == 1 else w.half().float()) for n, w in here.items())
    assert AutoTokenizer.from_pretrained(pulled, gguf_file="model-f16.gguf").chat_template == CHATML


def test_a_quantised_folder_is_not_pushed_with_the_gguf_files(hub: LoopbackHub, act: Act, exported: Path) -> None:
    shutil.copytree(act.folders["merge"], exported / "nf4")
    act(recipe(what=["gguf"], **GGUF))
    assert not [name for name in hub.files("me/tiny") if "nf4" in name or name.endswith(".safetensors")]


def test_a_quantised_folder_is_pushed_and_read_back(hub: LoopbackHub, act: Act, tmp_path: Path) -> None:
    act.folders["export"] = tmp_path / "artifacts" / "export"
    shutil.copytree(act.folders["merge"], act.folders["export"] / "nf4")
    (act.folders["export"] / "manifest.json").write_text("{}")
    pushed = act(recipe(what=["nf4"], export={"hf": ["nf4"]}))["pushes"][0]
    assert pushed["loaded"] == ["tokenizer", "chat template", "config", "generation config"]
    assert {"model.safetensors", "config.json"} <= set(hub.files("me/tiny"))


def test_a_kind_that_is_no_longer_exported_goes(hub: LoopbackHub, act: Act, exported: Path) -> None:
    act(recipe(what=["gguf"], **GGUF))
    (exported / "model-f16.gguf").unlink()
    assert act(recipe(what=["gguf"], **GGUF))["pushes"][0]["removed"] == ["model-f16.gguf"]


def test_a_gguf_with_another_template_is_refused(hub: LoopbackHub, act: Act, exported: Path) -> None:
    (act.folders["render"] / "template/inference.jinja").write_text("{{ messages }}")
    with pytest.raises(InputError, match=r"\.gguf: its chat template is not what was trained"):
        act(recipe(what=["gguf"], **GGUF))
    assert hub.requests == []


def test_rows_are_pushed_pushed_again_pulled_and_loaded(hub: LoopbackHub, act: Act, tmp_path: Path) -> None:
    from datasets import load_dataset
    from huggingface_hub import snapshot_download

    asked = recipe(what=["merged", "dataset"], license="mit")
    receipt = act(asked)["pushes"][1]
    assert (receipt["repo"], receipt["url"]) == ("me/tiny-dataset", f"{hub.url}/datasets/me/tiny-dataset")
    names = {"data/train.parquet", "data/eval.parquet", "README.md", ".gitattributes"}
    assert set(hub.files("me/tiny-dataset", "dataset")) == names
    hub.requests.clear()
    again = act(asked)["pushes"][1]
    assert not again["new_commit"] and again["files"] == receipt["files"] and hub.asked("PUT", "") == 0
    revision = receipt["commit"]
    pulled = snapshot_download("me/tiny-dataset", repo_type="dataset", revision=revision, cache_dir=tmp_path / "hub")
    rows = load_dataset(pulled, cache_dir=str(tmp_path / "loaded"))
    assert {split: len(rows[split]) for split in rows} == {"train": 2, "eval": 1}
    assert rows["train"][0] == {
        "id": "rows.jsonl:1",
        "source": "rows.jsonl",
        "messages": [
            {"role": "user", "content": "Why?", "extra": None},
            {"role": "assistant", "content": "So.", "extra": None},
        ],
    }
    assert rows["train"][1]["messages"][1]["extra"] == '{"tool_calls":[]}'
    assert rows["eval"][0]["id"] == "rows.jsonl:2"
    assert b"a@b.c" not in b"".join(hub.files("me/tiny-dataset", "dataset").values())  # other columns stay here


def test_rows_without_a_split_are_one(hub: LoopbackHub, act: Act) -> None:
    act(recipe(what=["dataset"]))
    rows = act.folders.pop("split")
    act.folders["sample"] = rows
    (rows / "train.parquet").rename(rows / "rows.parquet")
    assert act(recipe(what=["dataset"]))["pushes"][0]["removed"] == ["data/eval.parquet"]


def test_a_credential_in_a_row_is_refused(hub: LoopbackHub, act: Act) -> None:
    row = Example("rows.jsonl:9", "rows.jsonl", (Message("user", f"my key is {TOKEN}"),))
    write_rows(act.folders["split"] / "eval.parquet", [row])
    with pytest.raises(InputError, match=r"rows\.jsonl:9 holds a Hugging Face token") as error:
        act(recipe(what=["adapter", "dataset"]))
    assert TOKEN not in str(error.value) and hub.requests == []


@pytest.mark.parametrize(
    ("what", "there"),
    [
        ("adapter", "model-q8_0.gguf"),
        ("merged", "data/train.parquet"),
        ("dataset", "adapter_model.safetensors"),
        ("dataset", "data/train-00000-of-00001.parquet"),
        ("dataset", "rows.jsonl.gz"),
    ],
)
def test_what_belongs_to_another_kind_is_not_mixed(hub: LoopbackHub, act: Act, what: str, there: str) -> None:
    hub.plant("me/tiny", {there: b"x"}, "dataset" if what == "dataset" else "model", private=True)
    with pytest.raises(InputError, match="is not part of the"):
        act(recipe(what=[what]))
    assert hub.asked("POST", "/commit/") == 0


@pytest.mark.parametrize(("what", "stage"), [("gguf", "export"), ("dataset", "render")])
def test_a_kind_whose_stage_is_not_finished_is_named(act: Act, what: str, stage: str) -> None:
    act.folders.pop(stage, None)
    with pytest.raises(InputError, match=f"the {what}: stage {stage} is not finished"):
        act(recipe(what=[what], **(GGUF if what == "gguf" else {})), dry_run=True)
