"""What is predicted before a byte is downloaded, and what is refused before the first stage."""

import pytest
import torch

from finetune.errors import FinetuneError, GateRefused, InputError
from finetune.pipeline import plan as pipeline_plan
from finetune.pipeline import preflight, runner
from finetune.pipeline.stage_list import STAGE_NAMES
from finetune.pipeline.store import Store
from finetune.recipe.load import load_recipe


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def steps_of(recipe, tmp_path):
    return runner.plan(recipe, Store(tmp_path / "artifacts", tmp_path / "scratch"))


def test_a_plan_says_for_every_device_how_it_would_train_there(offline, tmp_path):
    recipe = load_recipe("mistral-guanaco").recipe
    plan = pipeline_plan.predict(recipe, steps_of(recipe, tmp_path))
    assert plan["parameters"] == 7_241_732_096
    assert plan["steps"] is None and plan["tokens"] is None  # only the data can tell
    t4, h200 = plan["devices"]["t4"], plan["devices"]["h200"]
    assert t4["fits"] and t4["micro_batch_rows"] * t4["accumulation"] == 4 and t4["train_seconds"] is None
    assert plan["memory_device"] == "t4" and plan["memory_bytes"]["total"] == t4["peak_bytes"] < t4["memory_bytes"]
    assert h200["checkpointing"] == "none" and h200["tokens_per_second"] > t4["tokens_per_second"]
    shown = pipeline_plan.describe(plan)
    assert max(map(len, shown.splitlines())) <= 130  # what a person reads: the address of a gated base is longest
    table = shown[shown.index("  GPU   ") :].splitlines()
    assert [line.split()[0] for line in table[1:-1]] == list(plan["devices"])
    assert max(map(len, table)) <= 100 and "unknown" in table[1] and " RAM  " in shown
    alone = pipeline_plan.predict(recipe, steps_of(recipe, tmp_path), "A100-80")
    assert alone["memory_device"] == "a100-80" and list(alone["devices"]) == ["a100-80"]
    assert alone["devices"]["a100-80"] == plan["devices"]["a100-80"]


@pytest.mark.parametrize(("length", "warned"), [(4096, True), (4095, False)])
def test_rows_as_long_as_the_sliding_window_are_warned_of(length, warned, offline, tmp_path):
    sets = ["model=mistralai/Mistral-7B-v0.1", f"render.max_length_tokens={length}", "runtime.micro_batch_rows=1"]
    recipe = load_recipe("mistral-guanaco", sets).recipe
    plan = pipeline_plan.predict(recipe, steps_of(recipe, tmp_path), "t4")
    assert ("sliding window of 4,096 tokens" in pipeline_plan.describe(plan)) == warned
    assert ("mask" in plan["memory_bytes"]) == warned


@pytest.mark.parametrize(
    ("edit", "why"), [("lora.r=600", "rank 600"), ("lora.dora=true", "DoRA"), ("lora.r=512", None)]
)
def test_an_adapter_that_vllm_will_not_serve_is_named_before_training(edit, why, offline, tmp_path):
    recipe = load_recipe("mistral-guanaco", [edit]).recipe
    shown = " ".join(pipeline_plan.describe(pipeline_plan.predict(recipe, steps_of(recipe, tmp_path), "h200")).split())
    assert ("vLLM will not serve this adapter" in shown) == (why is not None)
    assert why is None or why in shown


def test_nothing_is_built_by_a_plan(offline, tmp_path):
    for name in ("mistral-platypus", "llama2-alpaca", "qwen2.5-7b-chat", "zephyr-7b-qlora", "tiny-pydoc"):
        recipe = load_recipe(name).recipe
        assert "  stage" not in pipeline_plan.describe(pipeline_plan.predict(recipe, steps_of(recipe, tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_device_is_refused_and_a_small_one_does_not_fit(offline, tmp_path):
    recipe = load_recipe("mistral-guanaco", ["runtime.checkpointing=none"]).recipe
    steps = steps_of(recipe, tmp_path)
    with pytest.raises(InputError, match="allowed: rtx3070, t4, l4"):
        pipeline_plan.predict(recipe, steps, "t5")
    assert not pipeline_plan.predict(recipe, steps, "T4")["devices"]["t4"]["fits"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_a_7b_without_a_gpu_is_refused_with_what_to_do_and_its_data_stages_are_not(offline, tmp_path):
    recipe = load_recipe("mistral-platypus").recipe
    steps = steps_of(recipe, tmp_path)
    with pytest.raises(GateRefused, match="--until pack"):
        preflight.check(recipe, steps)
    until_pack = steps[: STAGE_NAMES.index("pack") + 1]
    assert any("could not be checked" in n or "HF_HUB_OFFLINE" in n for n in preflight.check(recipe, until_pack))


def test_a_disk_that_is_too_small_is_said_before_the_first_stage(offline, tmp_path, monkeypatch):
    import collections

    recipe = load_recipe("tiny-pydoc").recipe
    steps, store = steps_of(recipe, tmp_path), Store(tmp_path / "artifacts", tmp_path / "scratch")
    preflight.check_folders(recipe, steps, store)
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr("finetune.pipeline.preflight.shutil.disk_usage", lambda path: usage(1, 1, 1000))
    with pytest.raises(FinetuneError, match="free some, or choose another folder"):
        preflight.check_folders(recipe, steps, store)


def test_a_recipe_that_imports_an_adapter_plans_no_training(tmp_path):
    from finetune.pipeline import plan as pipeline_plan
    from finetune.pipeline import runner
    from finetune.pipeline.store import Store
    from finetune.recipe import Recipe
    from finetune.utils.files import write_json

    (tmp_path / "a").mkdir()
    write_json(tmp_path / "a" / "adapter_config.json", {"peft_type": "LORA"})
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    raw = {"name": "imp", "model": "builtin:tiny-mistral", "train": None, "lora": {"start_from": str(tmp_path / "a")}}
    recipe = Recipe.model_validate(raw)
    lora = recipe.lora.model_copy(update={"start_folder": tmp_path / "a"})
    recipe = recipe.model_copy(update={"lora": lora})
    result = pipeline_plan.predict(recipe, runner.plan(recipe, Store(tmp_path / "x", tmp_path / "y")))
    assert result["stages"]["ingest"] == result["stages"]["certify"] == "off" and result["devices"] is None
    assert "nothing is trained" in pipeline_plan.describe(result)
