"""What plan, validate and run say of bases of any architecture before anything is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from finetune.context import Context
from finetune.errors import InputError
from finetune.models.architecture import positions, scaled
from finetune.models.layerwise import empty_model
from finetune.pipeline import plan as pipeline_plan
from finetune.pipeline import preflight, runner
from finetune.pipeline.recipe_checks import absent
from finetune.pipeline.store import Store
from finetune.recipe import Recipe, Runtime, Tracking
from finetune.recipe.load import LoadedRecipe, load_recipe
from finetune.stages import base, merge, pack
from finetune.tiny.model import train_tokenizer
from finetune.utils.files import read_json, write_json
from tests.helpers.tiny_models import load, save_tiny
from tests.models.test_inventory import PUBLISHED
from tests.stages.test_pack import rendered  # noqa: F401 - a fixture

RECIPE = "schema: 1\nname: any\nmodel: ./base\ndata: [{source: pydoc}]\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "base", vocab_size=300)
    train_tokenizer(["some words to learn"], 280).save_pretrained(tmp_path / "base")
    return tmp_path


def recipe(folder: Path, config: dict[str, Any] | None = None, more: str = "", *sets: str) -> LoadedRecipe:
    """A recipe on the base in `folder`, whose config.json becomes `config`: plan reads nothing else of it."""
    (folder / "any.yaml").write_text(RECIPE + more)
    if config is not None:
        write_json(folder / "base" / "config.json", config)
    return load_recipe(str(folder / "any.yaml"), list(sets))


def planned(loaded: LoadedRecipe, folder: Path, device: str | None = None) -> dict[str, Any]:
    steps = runner.plan(loaded.recipe, Store(folder / "artifacts", folder / "scratch"))
    return pipeline_plan.predict(loaded.recipe, steps, device)


def published(name: str) -> dict[str, Any]:
    kind, _, sizes = PUBLISHED[name]
    return {"model_type": kind, **sizes}


def pinned(loaded: LoadedRecipe, folder: Path) -> Path:
    """The folder of the finished base stage."""
    out = folder / "pinned"
    out.mkdir()
    context = Context(scratch=folder / "scratch", runtime=Runtime(), tracking=Tracking(), device="cpu")
    base.run(base.spec(loaded.recipe), {}, out, context)
    return out


def test_mixtral_does_not_fit_a_t4_and_its_experts_are_said_to_stay_in_16_bits(folder: Path) -> None:
    plan = planned(recipe(folder, published("Mixtral-8x7B")), folder)
    assert plan["parameters"] == pytest.approx(46.7e9, rel=0.01)
    assert plan["memory_bytes"]["weights"] > 90e9
    fits = {name: on["fits"] for name, on in plan["devices"].items()}
    assert not fits["t4"] and not fits["h100"] and fits["h200"]
    shown = " ".join(pipeline_plan.describe(plan).split())
    assert "45.1 B of 46.7 B parameters in 16 bits" in shown and "its layers are not Llama's" in shown
    assert max(map(len, pipeline_plan.describe(plan).splitlines())) <= 100


@pytest.mark.parametrize("name", ["Qwen3-8B", "Gemma-2-9B", "pythia-6.9B"])
def test_dense_7bs_of_other_architectures_fit_a_t4(name: str, folder: Path) -> None:
    plan = planned(recipe(folder, published(name), "render: {max_length_tokens: 512}\n"), folder, "t4")
    assert plan["devices"]["t4"]["fits"] and plan["trainable_parameters"] > 1e7


def test_rows_beyond_the_bases_positions_are_warned_of_until_they_are_scaled(folder: Path) -> None:
    config = {**published("Llama-3.1-8B"), "max_position_embeddings": 4096}
    long = "render: {max_length_tokens: 8192}\n"
    assert any(
        "8,192 tokens" in note and "4,096 positions" in note
        for note in planned(recipe(folder, config, long), folder)["notes"]
    )
    scaling = "model.rope_scaling={rope_type: yarn, factor: 2}"
    assert not planned(recipe(folder, config, long, "model={id: ./base}", scaling), folder)["notes"]
    longer = recipe(folder, config, long.replace("8192", "8193"), "model={id: ./base}", scaling)
    assert any("the base knows 8,192 positions" in note for note in planned(longer, folder)["notes"])
    assert not planned(recipe(folder, {**config, "max_position_embeddings": 8192}, long), folder)["notes"]


QUANTIZED = {"quantization_config": {"quant_method": "gptq", "bits": 4}}


@pytest.mark.parametrize(
    ("change", "more", "words"),
    [
        (QUANTIZED, "", r"stored quantised \(gptq\)"),
        ({"quantization_config": {"load_in_4bit": True}}, "", "quantization: null and merge: null"),
        ({"architectures": ["OlmoForCausalLM"]}, "export: {gguf: [q8_0]}\n", "no GGUF of OlmoForCausalLM"),
        ({"hidden_size": 72}, "export: {hf: [fp8]}\n", r"export\.hf: fp8 needs widths divisible by 16"),
        ({"num_local_experts": 4}, "export: {hf: [fp8]}\n", "a mixture of experts"),
    ],
)
def test_a_base_that_cannot_come_to_the_end_is_refused_everywhere(
    change: dict[str, Any], more: str, words: str, folder: Path
) -> None:
    config = read_json(folder / "base" / "config.json")
    fine = recipe(folder, config, more)
    assert not absent(fine)
    preflight.check_adapter(fine.recipe, None)
    odd = recipe(folder, {**config, **change}, more)
    (problem,) = absent(odd)  # validate
    assert "any.yaml:3: model: " in problem and pytest.raises(InputError, match=words).matches(InputError(problem))
    with pytest.raises(InputError, match=words):
        planned(odd, folder)
    with pytest.raises(InputError, match=words):
        preflight.check_adapter(odd.recipe, None)


def test_what_llama_cpp_does_otherwise_is_said_or_refused_by_plan(folder: Path) -> None:
    export = "export: {gguf: [q8_0]}\n"
    mistral = {**read_json(folder / "base" / "config.json"), "sliding_window": 32}
    (note,) = (n for n in planned(recipe(folder, mistral, export), folder)["notes"] if "export.gguf" in n)
    assert "in texts of more than 32 tokens" in note
    assert not any("export.gguf" in n for n in planned(recipe(folder, mistral), folder)["notes"])
    gemma = {**published("Gemma-2-9B"), "architectures": ["Gemma2ForCausalLM"]}
    assert planned(recipe(folder, gemma, export), folder)["parameters"]
    untied = recipe(folder, gemma, export + "lora: {modules_to_save: [lm_head]}\n")
    with pytest.raises(InputError, match="takes the embedding of a gemma2 for its head"):
        planned(untied, folder)


def test_what_the_trial_of_the_base_found_is_refused_before_any_other_stage(folder: Path) -> None:
    loaded = recipe(folder)
    out = pinned(loaded, folder)
    preflight.check_adapter(loaded.recipe, out)
    facts = read_json(out / "architecture.json")
    assert facts["packing"] is None and facts["attention"] == "sdpa"
    write_json(out / "architecture.json", {**facts, "quantized": "its code fails"})
    with pytest.raises(InputError, match="cannot be trained in 4 bits: its code fails; set quantization: null"):
        preflight.check_adapter(loaded.recipe, out)
    preflight.check_adapter(loaded.recipe.model_copy(update={"quantization": None}), out)
    write_json(out / "architecture.json", {**facts, "training": "its forward fails"})
    with pytest.raises(InputError, match="cannot be trained here: its forward fails"):
        preflight.check_adapter(loaded.recipe, out)


def test_rows_are_not_packed_for_a_base_whose_documents_would_see_each_other(
    rendered: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    said: list[str] = []
    context = Context(scratch=tmp_path, runtime=Runtime(), tracking=Tracking(), say=said.append)
    spec = pack.Spec(method="bfd", length_tokens=32)
    for number, why in enumerate((None, "packed documents see each other")):
        place, out = tmp_path / f"base{number}", tmp_path / f"out{number}"
        place.mkdir()
        out.mkdir()
        write_json(place / "architecture.json", {"packing": why})
        metrics = pack.run(spec, {"render": rendered, "base": place}, out, context)
        assert (out / "packed.parquet").exists() == (why is None)
    table = pq.read_table(rendered / "train.parquet")
    assert metrics["rows"] == len(table) and metrics["tokens"] == sum(map(len, table["input_ids"].to_pylist()))
    assert said == ["pack: off: packed documents see each other; rows are trained one by one"]


ODD = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "[a-m]+|[^a-m]+"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}


def test_a_tokenizer_that_llama_cpp_cannot_split_is_refused_before_the_training(folder: Path) -> None:
    exports = "export: {gguf: [q8_0]}\n"
    fine = recipe(folder, None, exports)
    planned(fine, folder)
    preflight.check_adapter(fine.recipe, None)
    path = folder / "base" / "tokenizer.json"
    write_json(path, {**read_json(path), "pre_tokenizer": ODD})
    with pytest.raises(InputError, match=r"export\.gguf: .*llama\.cpp has no splitter for '\[a-m\]"):
        planned(fine, folder)
    with pytest.raises(InputError, match="has no splitter"):
        preflight.check_adapter(fine.recipe, None)
    with pytest.raises(InputError, match="has no splitter"):  # a base of the Hub, once it is here
        preflight.check_adapter(fine.recipe, pinned(fine, folder))
    without = recipe(folder)
    planned(without, folder)
    preflight.check_adapter(without.recipe, None)


SCALED = {"rope_type": "linear", "factor": 2.0}


def test_rotary_settings_of_the_recipe_are_trained_and_pinned(folder: Path) -> None:
    from finetune.models import loading

    loaded = recipe(folder, None, "", "model={id: ./base}", "model.rope_scaling={rope_type: linear, factor: 2.0}")
    out = pinned(loaded, folder)
    plain, expected = load(folder / "base"), load(folder / "base").model.rotary_emb.inv_freq / 2
    assert plain.config.rope_parameters["rope_theta"] == read_json(out / "config.json")["rope_parameters"]["rope_theta"]
    context = Context(scratch=folder / "scratch", runtime=Runtime(), tracking=Tracking(), device="cpu")
    trained = loading.load_base(loaded.recipe.model, out, context, None, "fp32", "cpu")
    for model in (trained, empty_model(out)):
        assert (model.model.rotary_emb.inv_freq - expected).abs().max() < 1e-9


def test_they_are_in_the_merged_config_and_the_base_says_how_far_they_reach(folder: Path) -> None:
    from tests.helpers.tiny_models import save_adapter

    loaded = recipe(folder, None, "", "model={id: ./base}", "model.rope_scaling={rope_type: linear, factor: 2.0}")
    out = pinned(loaded, folder)
    assert read_json(out / "base.json")["positions"] == 512 and "tokens" not in read_json(out / "base.json")
    (folder / "train").mkdir()
    (folder / "merged").mkdir()
    save_adapter(folder / "base", folder / "train" / "adapter")
    context = Context(scratch=folder / "scratch", runtime=Runtime(), tracking=Tracking(), device="cpu")
    inputs = {"base": out, "train": folder / "train", "certify": folder / "train"}
    merge.run(merge.spec(loaded.recipe), inputs, folder / "merged", context)
    merged = load(folder / "merged")
    assert {**merged.config.rope_parameters, "rope_theta": 0} == {**SCALED, "rope_theta": 0}
    assert (merged.model.rotary_emb.inv_freq - load(folder / "base").model.rotary_emb.inv_freq / 2).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("config", "scaling", "reach"),
    [
        ({"max_position_embeddings": 100}, None, 100),
        ({"max_position_embeddings": 100}, {"rope_type": "linear", "factor": 4.0}, 400),
        ({"text_config": {"max_position_embeddings": 100}}, {"factor": 2, "original_max_position_embeddings": 80}, 160),
        ({"max_position_embeddings": 100}, {"factor": 2, "original_max_position_embeddings": 10}, 100),
        ({"max_position_embeddings": 100}, {"rope_type": "longrope", "long_factor": [1.0]}, None),
        ({"n_positions": 7}, None, 7),
        ({}, {"factor": 2}, None),
    ],
)  # fmt: skip
def test_how_far_a_base_reaches(config: dict[str, Any], scaling: dict[str, Any] | None, reach: int | None) -> None:
    assert positions(config, scaling) == reach


@pytest.mark.parametrize("why", [None, "packed documents see each other"])
def test_the_preflight_takes_packing_from_the_trial(
    why: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(preflight, "batch_shape", lambda *given: asked.append(given[-1]))
    write_json(folder / "architecture.json", {"packing": why})
    preflight._check_training(recipe(folder).recipe, None, 1, folder, force=False)
    preflight._check_training(recipe(folder).recipe, None, 1, force=False)  # no base yet: as the recipe says
    assert asked == [why is None, True]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"rope_theta": 5.0}, {"rope_theta": 5.0, "rope_scaling": SCALED}),
        ({"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}},
         {"rope_parameters": {"rope_theta": 5.0, **SCALED}}),
        ({"text_config": {"rope_theta": 5.0}}, {"text_config": {"rope_theta": 5.0, "rope_scaling": SCALED}}),
    ],
)  # fmt: skip
def test_they_are_written_as_the_base_spells_them(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert scaled(before, SCALED) == after


@pytest.mark.parametrize(
    ("value", "words"),
    [({"rope_type": "spiral", "factor": 2}, "allowed: linear"), ({"rope_type": "yarn"}, "factor of at least 1")],
)
def test_other_rotary_settings_are_refused(value: dict[str, Any], words: str) -> None:
    model = {"id": "builtin:tiny-mistral", "rope_scaling": value}
    with pytest.raises(ValueError, match=words):
        Recipe.model_validate({"name": "x", "model": model, "data": [{"source": "pydoc"}]})
