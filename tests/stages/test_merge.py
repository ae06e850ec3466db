"""The merged folder: loads as it stands, says the truth about itself, and is the same bytes every time."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune.errors import FinetuneError, InputError
from finetune.merge.nf4_round_trip import RoundTrip
from finetune.merge.plan import plan_merge
from finetune.recipe import Recipe
from finetune.stages import merge
from finetune.utils.files import hash_file
from tests.helpers.merged import merged_tensors
from tests.helpers.tiny_models import load, save_adapter
from tests.stages.finished import TERMINATORS, context, finish


def run(root: Path, inputs: dict[str, Path], name: str = "out", **sections: Any) -> dict[str, Any]:
    recipe = Recipe.model_validate(
        {"name": "tiny", "model": "builtin:tiny-mistral", "data": [{"source": "pydoc"}], **sections}
    )
    spec = merge.spec(recipe)
    assert spec is not None
    (root / name).mkdir()
    return merge.run(spec, inputs, root / name, context(root))


def config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def test_the_folder_loads_and_answers_as_the_adapter_does(tmp_path: Path) -> None:
    inputs = finish(tmp_path, dtype="float32")
    metrics = run(tmp_path, inputs)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        merged = load(tmp_path / "out")(ids).logits
        trained = save_adapter(inputs["base"], tmp_path / "again")(ids).logits
    torch.testing.assert_close(merged, trained, rtol=1e-4, atol=1e-4)
    assert (metrics["base"], metrics["dtype"], metrics["changed_tensors"]) == ("original", "float32", 4)
    assert metrics["bytes"] == (tmp_path / "out/model.safetensors").stat().st_size
    assert metrics["peak_anon_bytes"] is None or metrics["peak_anon_bytes"] >= 0


def test_a_base_in_several_files_gives_the_same_model(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    inputs = finish(tmp_path)
    run(tmp_path, inputs, "one")
    many = tmp_path / "many"
    shutil.copytree(inputs["base"], many)
    tensors = list(load_file(many / "model.safetensors").items())
    (many / "model.safetensors").unlink()
    weight_map = {}
    for number in range(3):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        save_file(dict(tensors[number::3]), many / file, {"format": "pt"})
        weight_map |= {name: file for name, _ in tensors[number::3]}
    size = sum(t.nbytes for _, t in tensors)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (many / "model.safetensors.index.json").write_text(json.dumps(index))
    run(tmp_path, {**inputs, "base": many}, "two")
    assert hash_file(tmp_path / "one/model.safetensors") == hash_file(tmp_path / "two/model.safetensors")


def test_what_lies_beside_the_weights(tmp_path: Path) -> None:
    inputs = finish(tmp_path)
    run(tmp_path, inputs)
    out = tmp_path / "out"
    settings = config(out)
    assert settings["use_cache"] is True
    assert (settings["dtype"], settings["torch_dtype"]) == ("bfloat16", "bfloat16")
    assert not {"_name_or_path", "quantization_config"} & set(settings)
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert config(out, "generation_config.json")["eos_token_id"] == TERMINATORS
    assert config(out, "generation_config.json")["temperature"] == 0.7
    assert config(out, "tokenizer.json") == {"from": "adapter"}
    assert (out / "tokenizer.model").read_bytes() == b"sentencepiece"
    assert config(out, "tokenizer_config.json") == {"bos_token": "<s>", "pad_token": "<unk>"}
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert config(out, "template.json")["name"] == "mistral"
    assert not (out / "certificate.json").exists()
    assert not any("/home/me" in p.read_text() for p in out.glob("*.json"))


@pytest.mark.parametrize(
    ("own", "expected"), [([2, 9, 8], [2, 9, 8]), ([9, 8], [2, 9, 8]), (9, [2, 9]), (2, 2), (None, 2)]
)
def test_answers_also_end_at_the_bases_other_terminators(own: Any, expected: Any, tmp_path: Path) -> None:
    inputs = finish(tmp_path)
    template = inputs["train"] / "adapter" / "template" / "template.json"
    template.write_text(json.dumps({**json.loads(template.read_text()), "terminators": [2]}))
    (inputs["base"] / "generation_config.json").write_text(json.dumps({"eos_token_id": own}))
    run(tmp_path, inputs)
    assert config(tmp_path / "out", "generation_config.json")["eos_token_id"] == expected


def test_it_merges_into_the_base_that_the_certificate_names(tmp_path: Path) -> None:
    inputs = finish(tmp_path)
    (tmp_path / "certify").mkdir()
    (tmp_path / "certify/certificate.json").write_text('{"base": "dequantized", "round_trip_dtype": "float32"}')
    metrics = run(tmp_path, {**inputs, "certify": tmp_path / "certify"}, merge={"dtype": "float32"})
    trip = RoundTrip("nf4", True, "float32")  # the CPU computes in fp32
    expected = dict(merged_tensors(plan_merge(inputs["base"], inputs["train"] / "adapter", "float32", trip)))
    found = load_file(tmp_path / "out/model.safetensors")
    assert metrics["base"] == "dequantized"
    assert set(found) == set(expected)
    assert all(torch.equal(found[n], expected[n]) for n in found)
    assert config(tmp_path / "out", "certificate.json") == {"base": "dequantized", "round_trip_dtype": "float32"}
    with pytest.raises(InputError, match="quantization is null"):
        run(tmp_path, {**inputs, "certify": tmp_path / "certify"}, "again", quantization=None)


def test_shards_and_canonical_bytes(tmp_path: Path) -> None:
    inputs = finish(tmp_path, config={"vocab_size": 6000})
    for name in ("first", "second"):
        metrics = run(tmp_path, inputs, name, merge={"max_shard_bytes": 1_000_000})
    first, second = tmp_path / "first", tmp_path / "second"
    assert metrics["files"] == 2
    index = config(first, "model.safetensors.index.json")
    assert set(index["weight_map"].values()) == {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    assert sorted(p.name for p in first.iterdir()) == sorted(p.name for p in second.iterdir())
    assert all(p.read_bytes() == (second / p.name).read_bytes() for p in first.iterdir())
    assert sum(p.numel() for p in load(first).parameters()) * 2 == index["metadata"]["total_size"]


def test_a_head_that_no_longer_is_the_embedding_is_written(tmp_path: Path) -> None:
    inputs = finish(tmp_path, "qwen2", "float32", {"tie_word_embeddings": True}, target_modules=["embed_tokens"])
    run(tmp_path, inputs)
    found = load_file(tmp_path / "out/model.safetensors")
    assert config(tmp_path / "out")["tie_word_embeddings"] is False
    assert torch.equal(
        found["lm_head.weight"], load_file(inputs["base"] / "model.safetensors")["model.embed_tokens.weight"]
    )
    assert not torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])


def test_a_tied_head_stays_tied_where_neither_side_changed(tmp_path: Path) -> None:
    inputs = finish(tmp_path, "qwen2", "float32", {"tie_word_embeddings": True})
    run(tmp_path, inputs)
    assert config(tmp_path / "out")["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = finish(tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, 50_000_000))
    with pytest.raises(FinetuneError, match=r"needs 0\.1 GB in .* 0\.1 GB are free"):
        run(tmp_path, inputs)
    assert not list((tmp_path / "out").iterdir())


def test_an_adapter_that_cannot_be_merged_leaves_nothing(tmp_path: Path) -> None:
    inputs = finish(tmp_path)
    path = inputs["train"] / "adapter/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "IA3"}))
    with pytest.raises(InputError, match="'IA3'"):
        run(tmp_path, inputs)
    assert not list((tmp_path / "out").iterdir())


def test_it_is_off_when_the_recipe_says_so() -> None:
    recipe = {"name": "tiny", "model": "builtin:tiny-mistral", "data": [{"source": "pydoc"}]}
    assert merge.spec(Recipe.model_validate({**recipe, "merge": None})) is None


def test_the_digests_of_the_weights_are_handed_over(tmp_path: Path) -> None:
    inputs = finish(tmp_path, config={"vocab_size": 6000})
    spec = merge.spec(
        Recipe.model_validate(
            {
                "name": "tiny",
                "model": "builtin:tiny-mistral",
                "data": [{"source": "pydoc"}],
                "merge": {"max_shard_bytes": 1_000_000},
            }
        )
    )
    assert spec is not None
    said: dict[Path, str] = {}
    out = tmp_path / "out"
    out.mkdir()
    merge.run(spec, inputs, out, dataclasses.replace(context(tmp_path), hashed=said.__setitem__))
    assert said == {p: hash_file(p) for p in out.glob("*.safetensors")}
    assert len(said) == 2
