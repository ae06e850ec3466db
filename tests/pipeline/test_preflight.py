"""What can be known before hours are spent: a GPU that is too small, one disk for both roots, a base that is there."""

import collections
import dataclasses
import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch

from finetune.cli import run as cli_run
from finetune.errors import FinetuneError, GateRefused, InputError
from finetune.estimate import memory as estimate_memory
from finetune.estimate.shapes import read_shapes
from finetune.models import inventory
from finetune.models.layerwise import empty_model
from finetune.pipeline import plan as pipeline_plan
from finetune.pipeline import preflight, runner
from finetune.pipeline.stage_list import STAGE_NAMES
from finetune.pipeline.store import Store
from finetune.recipe.load import load_recipe
from finetune.utils.files import write_json
from tests.helpers.tiny_models import save_tiny

GB = 10**9
Usage = collections.namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def planned(name, tmp_path, *sets):
    recipe = load_recipe(name, list(sets)).recipe
    store = Store(tmp_path / "artifacts", tmp_path / "scratch")
    return recipe, runner.plan(recipe, store), store


def test_a_gpu_that_the_plan_fits_is_let_be_and_a_smaller_one_named(tmp_path):
    one_way = ["runtime.micro_batch_rows=1", "runtime.checkpointing=full"]
    recipe, _, _ = planned("mistral-guanaco", tmp_path, *one_way)
    shapes, context = read_shapes(recipe), estimate_memory.CONTEXT_BYTES
    needed = sum(estimate_memory.training(shapes, estimate_memory.Training.of(recipe), 1, "full").values())
    assert preflight.memory_problem(recipe, shapes, 1, needed - context, needed) is None
    problem = preflight.memory_problem(recipe, shapes, 1, needed - context - GB, needed - GB)
    assert "1 row at once, checkpointing full" in problem and "render.max_length_tokens" in problem
    assert "in use" not in problem
    assert "are in use: stop the processes" in preflight.memory_problem(recipe, shapes, 1, 2 * GB, 3 * needed)
    small = recipe.model_copy(update={"runtime": recipe.runtime.model_copy(update={"memory_budget_gb": 5})})
    assert "there are 5.0" in preflight.memory_problem(small, shapes, 1, 80 * GB, 80 * GB)


def test_what_is_left_open_is_refused_only_where_no_way_fits(tmp_path):
    recipe, _, _ = planned("mistral-guanaco", tmp_path)
    shapes = read_shapes(recipe)
    assert preflight.memory_problem(recipe, shapes, 1, 9 * GB, 10 * GB) is None  # not as fast as it could be
    assert "checkpointing offload" in preflight.memory_problem(recipe, shapes, 1, 6 * GB, 7 * GB)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_offloading_without_a_gpu_is_refused_before_the_first_stage(tmp_path):
    recipe, steps, _ = planned("tiny-pydoc", tmp_path, "runtime.checkpointing=offload")
    steps = steps[: STAGE_NAMES.index("train") + 1]
    with pytest.raises(InputError, match="on a CPU; use full"):
        preflight.check(recipe, steps)
    preflight.check(*planned("tiny-pydoc", tmp_path, "runtime.checkpointing=selective")[:2])


def test_a_small_gpu_is_refused_unless_forced(tmp_path, monkeypatch):
    recipe, steps, _ = planned("mistral-guanaco", tmp_path)
    steps = steps[: STAGE_NAMES.index("train") + 1]
    monkeypatch.setattr(preflight, "pick_device", lambda device: "cuda")
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (7, 5))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (4 * GB, 4 * GB))
    with pytest.raises(GateRefused, match="--force continues"):
        preflight.check(recipe, steps)
    assert any("because of --force" in note for note in preflight.check(recipe, steps, force=True))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (80 * GB, 80 * GB))
    assert not any("GPU memory" in note for note in preflight.check(recipe, steps))


@pytest.mark.parametrize("section", ["generate", "evaluate"])
def test_a_model_that_writes_or_judges_and_does_not_fit_is_refused_before_the_first_stage(
    section, tmp_path, monkeypatch
):
    save_tiny(tmp_path / "model")
    model = f"{{local: {tmp_path}/model}}"
    asked = (
        f"generate={{method: answer, seeds: [{{source: pydoc, take: 3}}], model: {model}}}"
        if section == "generate"
        else f"evaluate.judge={{model: {model}}}"
    )
    planned_run = planned("tiny-pydoc", tmp_path, asked)[:2]
    preflight.check(*planned_run)
    monkeypatch.setattr("finetune.eval.voice.available_memory", lambda: 1000)
    with pytest.raises(GateRefused, match=rf"^{section}\..*model.local: .*GB of weights.* name a smaller model"):
        preflight.check(*planned_run)


def test_roots_on_one_disk_are_added_up(tmp_path, monkeypatch):
    recipe, steps, store = planned("mistral-guanaco", tmp_path)
    disk = estimate_memory.disk(read_shapes(recipe), recipe)
    scratch = disk["download"] + disk["quantized_copy"] + disk["merged"]
    durable = preflight.DURABLE_SLACK + disk["adapter"] + disk["training_checkpoints"]
    free = {"bytes": scratch + durable}
    monkeypatch.setattr("finetune.pipeline.preflight.shutil.disk_usage", lambda path: Usage(0, 0, free["bytes"]))
    preflight.check_folders(recipe, steps, store)
    free["bytes"] -= 1  # enough for either alone
    with pytest.raises(FinetuneError, match="on one disk"):
        preflight.check_folders(recipe, steps, store)


def test_room_for_the_gguf_files_is_asked_for_before_training(tmp_path, monkeypatch):
    recipe, steps, store = planned("mistral-guanaco", tmp_path, "export.gguf=[q4_k_m]", "merge.dtype=float32")
    disk = estimate_memory.disk(read_shapes(recipe), recipe)
    assert disk["export"] > disk["merged"] == 4 * read_shapes(recipe).parameters  # the f32 one that it is made from
    free = {"bytes": sum(disk.values()) + preflight.DURABLE_SLACK}
    monkeypatch.setattr("finetune.pipeline.preflight.shutil.disk_usage", lambda path: Usage(0, 0, free["bytes"]))
    preflight.check_folders(recipe, steps, store)
    free["bytes"] -= 1
    with pytest.raises(FinetuneError, match=f"about {(free['bytes'] + 1) / 1e9:.1f} GB needed"):
        preflight.check_folders(recipe, steps, store)
    free["bytes"] -= disk["export"] - 1
    preflight.check_folders(recipe, steps[:-1], store)  # asked for an earlier stage only


def test_a_base_that_is_in_the_cache_is_no_download(tmp_path):
    commit = "a" * 40
    recipe, _, store = planned("mistral-guanaco", tmp_path, f"model.revision={commit}")
    assert not preflight.is_downloaded(recipe, None, store.scratch)
    snapshot = store.scratch / "hub" / "models--mistralai--Mistral-7B-Instruct-v0.2" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert not preflight.is_downloaded(recipe, None, store.scratch)
    (snapshot / "model-1.safetensors").write_bytes(b"")
    assert preflight.is_downloaded(recipe, None, store.scratch)
    (tmp_path / "base.json").write_text(json.dumps({"revision": "b" * 40}))
    assert not preflight.is_downloaded(recipe, tmp_path, store.scratch)
    assert preflight.is_downloaded(SimpleNamespace(model=SimpleNamespace(kind="builtin")), None, store.scratch)


def test_a_tracker_without_a_key_is_said_to_record_offline(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe, steps, _ = planned("tiny-pydoc", tmp_path, "tracking.wandb=true")
    steps = steps[: STAGE_NAMES.index("train") + 1]
    assert any("W&B is offline" in note for note in preflight.check(recipe, steps))
    recipe, steps, _ = planned("tiny-pydoc", tmp_path)
    assert not any("W&B" in note for note in preflight.check(recipe, steps))


def test_a_missing_tensorboard_is_refused_before_anything_is_built(tmp_path, monkeypatch):
    recipe, steps, _ = planned("tiny-pydoc", tmp_path, "tracking.tensorboard=true")
    steps = steps[: STAGE_NAMES.index("train") + 1]
    there = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "tensorboard" else there(name))
    preflight.check(recipe, steps)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "tensorboard" else there(name))
    with pytest.raises(InputError, match="tensorboard is not installed"):
        preflight.check(recipe, steps)


WRONG = [
    ("lora.targets=[kk_proj]", "did you mean k_proj"),
    ("lora.last_layers=99", "99 are more than the"),
    ("lora.modules_to_save=[q_proj]", "q_proj is a linear module"),
]


@pytest.mark.parametrize(("wrong", "said"), WRONG)
@pytest.mark.parametrize("name", ["mistral-guanaco", "tiny-pydoc"])
def test_an_adapter_that_a_known_base_cannot_have_is_refused_before_the_first_stage(name, wrong, said, tmp_path):
    recipe, steps, _ = planned(name, tmp_path, wrong)
    with pytest.raises(InputError, match=said):
        preflight.check_adapter(recipe, None)
    with pytest.raises(InputError, match=said):
        pipeline_plan.predict(recipe, steps)
    recipe, steps, _ = planned(name, tmp_path, "lora.targets=[q_proj]", "lora.last_layers=2", "lora.dora=true")
    preflight.check_adapter(recipe, None)
    pipeline_plan.predict(recipe, steps)


def test_a_width_that_config_json_does_not_name_is_refused_once_the_base_is_there(tmp_path):
    sets = ("model=owner/base", "lora.targets=all-linear", "export.gguf=[]", "export.hf=[fp8,w4a16]")
    recipe, steps, _ = planned("tiny-pydoc", tmp_path, *sets)
    base = save_tiny(tmp_path / "base", "llama", hidden_size=128, head_dim=32, intermediate_size=256)
    step = dataclasses.replace(steps[0], folder=base)
    made = inventory.require_inventory(empty_model(base, trust_remote_code=False), "owner/base").as_json()
    write_json(base / inventory.FILE, {"inventory": made})
    cli_run._check_on_base(recipe, step, None)
    made["quantized"]["model.layers.1.extra"] = [208, 128]
    write_json(base / inventory.FILE, {"inventory": made})
    with pytest.raises(InputError, match=r"w4a16 needs .* found model\.layers\.1\.extra\.weight 208; take fp8"):
        cli_run._check_on_base(recipe, step, None)


def test_only_a_run_that_trains_is_refused_for_its_adapter(tmp_path):
    recipe, steps, _ = planned("tiny-pydoc", tmp_path, WRONG[0][0])
    with pytest.raises(InputError, match="no linear module"):
        preflight.check(recipe, steps)
    preflight.check(recipe, steps[: STAGE_NAMES.index("train")])


@pytest.mark.parametrize("kind", ["llama", "phi3"])  # told from config.json; asked of transformers
def test_a_base_that_nothing_was_known_of_is_asked_once_it_is_there(kind, tmp_path):
    recipe, steps, _ = planned("tiny-pydoc", tmp_path, "model=owner/base", "lora.targets=[kk_proj]")
    preflight.check_adapter(recipe, None)  # what only the Hub knows is no reason to refuse
    base = dataclasses.replace(steps[0], folder=save_tiny(tmp_path / "base", kind))
    with pytest.raises(InputError, match="no linear module named 'kk_proj'"):
        cli_run._check_on_base(recipe, base, None)
    cli_run._check_on_base(recipe, base, "pack")
    cli_run._check_on_base(recipe, dataclasses.replace(base, stage=steps[1].stage), None)
    cli_run._check_on_base(planned("tiny-pydoc", tmp_path, "lora.targets=[o_proj]")[0], base, None)
