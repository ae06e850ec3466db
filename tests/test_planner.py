"""What is predicted before a byte is downloaded, and what is refused before the first stage."""

import pytest
import torch

from finetune import pipeline, planner, preflight
from finetune.errors import FinetuneError, GateRefused, InputError
from finetune.recipe_file import load_recipe
from finetune.store import Store


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def steps_of(recipe, tmp_path):
    return pipeline.plan(recipe, Store(tmp_path / "artifacts", tmp_path / "scratch"))


def test_the_reference_run_is_explained_within_15_percent(offline, tmp_path):
    recipe = load_recipe("mistral-guanaco").recipe
    plan = planner.predict(recipe, steps_of(recipe, tmp_path))
    assert plan["memory_bytes"]["total"] == pytest.approx(13.1e9, rel=0.15)  # the published peak on a T4
    assert plan["parameters"] == 7_241_732_096
    assert plan["steps"] is None and plan["tokens"] is None  # only the data can tell
    assert plan["devices"]["t4"]["fits"]


def test_nothing_is_built_by_a_plan(offline, tmp_path):
    for name in ("mistral-platypus", "llama2-alpaca", "qwen2.5-7b-chat", "zephyr-7b-qlora", "tiny-pydoc"):
        recipe = load_recipe(name).recipe
        assert "  stage" not in planner.describe(planner.predict(recipe, steps_of(recipe, tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_weights_and_adapter_are_counted_as_bitsandbytes_and_peft_store_them(tmp_path):
    """Against a real NF4 model with a real adapter, byte for byte."""
    from peft import get_peft_model

    from finetune.backends import lora_settings, models
    from finetune.context import Context
    from finetune.recipe import Runtime, Tracking
    from finetune.recipe_file import parse_recipe
    from finetune.stages import base as base_stage
    from tests.e2e.conftest import RECIPE, make_workspace

    work = make_workspace(tmp_path / "work")
    for double in (False, True):
        sets = [f"quantization.double={str(double).lower()}", "lora.targets=[q_proj, down_proj]"]
        recipe = parse_recipe(RECIPE, work.recipe, sets)
        folder = tmp_path / f"base{double}"
        folder.mkdir()
        ctx = Context(scratch=tmp_path, runtime=Runtime(), tracking=Tracking(), device="cpu")
        base_stage.run(base_stage.spec(recipe), {}, folder, ctx)
        model = models.load_base(recipe.model, folder, ctx, recipe.quantization, "bf16", "cpu")
        shapes = planner.read_shapes(recipe, folder)
        stored = 0
        for parameter in model.parameters():
            state = getattr(parameter, "quant_state", None)
            stored += parameter.numel() * parameter.element_size()
            if state is not None:
                stored += state.absmax.numel() * state.absmax.element_size()
                stored += state.state2.absmax.numel() * 4 if state.nested else 0
        assert planner.weight_bytes(shapes, recipe) == pytest.approx(stored, rel=0.002)  # the last, half-filled block
        adapted = get_peft_model(model, lora_settings.lora_config(recipe.lora))
        assert planner.adapter_parameters(shapes, recipe) == sum(
            p.numel() for p in adapted.parameters() if p.requires_grad
        )


def test_an_unknown_device_is_refused_and_a_small_one_does_not_fit(offline, tmp_path):
    recipe = load_recipe("mistral-guanaco", ["render.max_length_tokens=8192"]).recipe
    steps = steps_of(recipe, tmp_path)
    with pytest.raises(InputError, match="allowed: t4, l4"):
        planner.predict(recipe, steps, "t5")
    assert not planner.predict(recipe, steps, "T4")["devices"]["t4"]["fits"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_a_7b_without_a_gpu_is_refused_with_what_to_do_and_its_data_stages_are_not(offline, tmp_path):
    recipe = load_recipe("mistral-platypus").recipe
    steps = steps_of(recipe, tmp_path)
    with pytest.raises(GateRefused, match="--until pack"):
        preflight.check(recipe, steps)
    until_pack = steps[: pipeline.STAGE_NAMES.index("pack") + 1]
    assert any("could not be checked" in n or "HF_HUB_OFFLINE" in n for n in preflight.check(recipe, until_pack))


def test_a_disk_that_is_too_small_is_said_before_the_first_stage(offline, tmp_path, monkeypatch):
    import collections

    recipe = load_recipe("tiny-pydoc").recipe
    steps, store = steps_of(recipe, tmp_path), Store(tmp_path / "artifacts", tmp_path / "scratch")
    preflight.check_folders(recipe, steps, store)
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr("finetune.preflight.shutil.disk_usage", lambda path: usage(1, 1, 1000))
    with pytest.raises(FinetuneError, match="free some, or choose another folder"):
        preflight.check_folders(recipe, steps, store)
