"""Every training variant a recipe can ask for, through the real trainer on a real NF4 base: what moves, what is saved,
what peft makes of it and what our merge does.
"""

import dataclasses
import json
import shutil

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finetune.errors import InputError
from finetune.estimate.shapes import adapter_parameters, read_shapes
from finetune.lora import config as lora_config
from finetune.lora import resume as lora_resume
from finetune.merge import blocks
from finetune.merge.plan import plan_merge
from finetune.models import architecture, loading
from finetune.models.layerwise import empty_model
from finetune.recipe import Lora, Train
from finetune.recipe.load import parse_recipe
from finetune.train import neftune, oom
from finetune.train import trainer as train_trainer
from finetune.utils.safetensors_io import plan_shards, write_shards
from tests.e2e.conftest import RECIPE
from tests.helpers.trainings import build_trainer, documents, job, packed, trained, unpacked

IDS = torch.arange(5, 45)[None]
VARIANTS = {
    "lora": ({}, {}),
    "patterns": ({"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"layers.1.*": 4}, "dropout": 0.1}, {}),
    "rslora": ({"rslora": True, "r": 8}, {}),
    "dora": ({"dora": True, "targets": ["q_proj", "down_proj"]}, {}),
    "last_layers": ({"last_layers": 1}, {}),
    "head": ({"modules_to_save": ["lm_head", "norm"]}, {"optimizer": "paged_adamw_8bit"}),
    "embeddings_and_head": ({"modules_to_save": ["embed_tokens", "lm_head"], "targets": ["v_proj"]}, {}),
    "noise_two_rates_wsd": ({}, {"neftune_alpha": 5.0, "lora_plus_ratio": 4.0, "schedule": "wsd"}),
}
SLOW_VARIANTS = {
    "expression": ({"targets": r".*\.1\.mlp\..*_proj"}, {}),
    "last_layers_of_names": ({"last_layers": 1, "targets": ["v_proj"]}, {}),
    "embeddings": ({"modules_to_save": ["embed_tokens"]}, {"optimizer": "adamw_8bit"}),
    "dora_everywhere": ({"dora": True, "rslora": True, "dropout": 0.1, "modules_to_save": ["lm_head"]}, {}),
}
EVERY = {**VARIANTS, **SLOW_VARIANTS}


def learned(load, base, ctx, folder, name="run", rows=None, **settings):
    """What a training of the recipe's `lora` and `train` fields leaves: result, weights by name, the values."""
    own = {k: settings.pop(k) for k in ("lora", "start", "checkpointing", "held_out", "precision") if k in settings}
    values = job(folder, name, **{"max_steps": 2, "batch_rows": 6, **settings})
    own["lora"] = Lora(**{"r": 4, "dropout": 0, **own.get("lora", {})})
    values = dataclasses.replace(values, **own)
    return *trained(values, load(), base, rows if rows is not None else unpacked(documents()), ctx), values


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("name", [*VARIANTS, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW_VARIANTS)])
def test_a_variant_learns_is_saved_and_is_what_peft_loads(name, load, base, ctx, tmp_path):
    lora, train = EVERY[name]
    values = job(tmp_path, max_steps=3, batch_rows=12, **{"learning_rate": 1e-2, **train})
    values = dataclasses.replace(values, lora=Lora(**{"r": 4, "dropout": 0, **lora}))
    model = load()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters()}
    result, weights = trained(values, model, base, unpacked(documents()), ctx)
    lines = [json.loads(line) for line in values.metrics_file.read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]

    moved = {n.removeprefix("base_model.model.").split(".lora_")[0].split(".modules_to_save")[0] for n in weights}
    linear = [n for n in architecture.linear_names(load())]
    expected = {n for n in linear if lora_config.is_target(values.lora, n, 2)}
    expected |= {n for n, _ in load().named_modules() if lora_config.is_saved(values.lora, n)}
    assert moved == expected
    assert all(float(p.abs().sum()) > 0 for n, p in weights.items() if "lora_B" in n)
    after = {n.replace(".base_layer", "").replace(".original_module", ""): p for n, p in model.named_parameters()}
    assert all(torch.equal(after[n], p) for n, p in frozen.items())

    train_trainer.save_adapter(result.model, tmp_path / "adapter", "owner/base", None)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["use_dora"] == values.lora.dora and config["use_rslora"] == values.lora.rslora
    assert config["layers_to_transform"] == ([1] if values.lora.last_layers else None)
    assert config["modules_to_save"] == (sorted(values.lora.modules_to_save) or None)
    assert config["rank_pattern"] == values.lora.rank_pattern
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float32}
    assert torch.equal(logits(loading.attach_adapter(load(), tmp_path / "adapter")), logits(result.model))
    assert_merge_is_the_unmerged_model(base, tmp_path)


def assert_merge_is_the_unmerged_model(base, folder):
    from peft import PeftModel

    plan = plan_merge(base, folder / "adapter", "float32")
    (folder / "merged").mkdir()
    shards = plan_shards(plan.shapes, 10**9)
    for file in base.iterdir():
        if "safetensors" not in file.name:
            (folder / "merged" / file.name).write_bytes(file.read_bytes())
    write_shards(folder / "merged", shards, blocks.merged_pieces(plan, [t.name for t in shards.tensors]))
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    unmerged = PeftModel.from_pretrained(plain, folder / "adapter")
    assert torch.allclose(logits(merged), logits(unmerged), atol=1e-4)


# --- NEFTune ----------------------------------------------------------------------------------------------------


def test_noise_is_as_large_as_each_documents_length_allows():
    ids = torch.zeros(1, 10, dtype=torch.long)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    lengths = neftune.document_lengths(ids, positions, None)
    assert lengths.tolist() == [[4.0] * 4 + [6.0] * 6]
    padded = neftune.document_lengths(torch.zeros(2, 5), None, torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]))
    assert padded.tolist() == [[3.0] * 5, [5.0] * 5]
    assert neftune.document_lengths(torch.zeros(1, 3), None, None).tolist() == [[3.0] * 3]
    noise = neftune.uniform_noise(torch.zeros(1, 10, 4000), lengths, 5.0)
    for tokens, length in ((slice(0, 4), 4), (slice(4, 10), 6)):
        bound = 5.0 / (length * 4000) ** 0.5
        assert 0.999 * bound < float(noise[0, tokens].abs().max()) <= bound


@pytest.mark.parametrize("shape", ["packed", pytest.param("unpacked", marks=pytest.mark.slow)])
def test_noise_is_there_in_training_and_nowhere_else(shape, load, base, ctx, tmp_path):
    rows = packed(documents(), tmp_path) if shape == "packed" else unpacked(documents())
    plain = learned(load, base, ctx, tmp_path, "plain", rows)[1]
    result, noisy, _ = learned(load, base, ctx, tmp_path, "noisy", rows, neftune_alpha=5.0)
    assert any(not torch.equal(plain[n], noisy[n]) for n in plain)
    model = result.model.get_base_model()
    assert not model.get_input_embeddings()._forward_hooks and not model.base_model._forward_pre_hooks
    with neftune.noise(model, 5.0):
        quiet = model.eval()(input_ids=IDS).logits
        loud = model.train()(input_ids=IDS).logits
    assert torch.equal(quiet, model.eval()(input_ids=IDS).logits) and not torch.equal(quiet, loud)
    train_trainer.save_adapter(result.model, tmp_path / "adapter", "owner/base", None)
    assert not any("noise" in k for k in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))


@pytest.mark.slow
def test_noise_with_recomputed_activations_is_the_same_noise(load, base, ctx, tmp_path):
    off = learned(load, base, ctx, tmp_path, "off", neftune_alpha=5.0)[1]
    on = learned(load, base, ctx, tmp_path, "on", neftune_alpha=5.0, checkpointing="full")[1]
    assert all(torch.allclose(off[n], on[n], atol=1e-6) for n in off)


def test_no_hook_is_left_after_an_error(load):
    model = load()
    with pytest.raises(RuntimeError), neftune.noise(model, 5.0):
        raise RuntimeError
    assert not model.get_input_embeddings()._forward_hooks and not model.base_model._forward_pre_hooks


# --- LoRA+, schedules -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer",
    [
        "adamw",
        "paged_adamw_8bit",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("adamw_8bit", "paged_adamw_32bit")),
    ],
)
def test_b_learns_faster_with_every_optimiser(optimizer, load, base, ctx, tmp_path):
    """After one step of Adam from zero state each element has moved by its own rate."""
    settings = {"max_steps": 1, "optimizer": optimizer, "learning_rate": 1e-3}
    even = learned(load, base, ctx, tmp_path, "even", **settings)[1]
    plus = learned(load, base, ctx, tmp_path, "plus", **settings, lora_plus_ratio=16.0)[1]
    for name, weight in even.items():
        if "lora_B" in name:
            ratio = plus[name].norm() / weight.norm()
            assert ratio == pytest.approx(16, rel=0.02)
        else:
            assert torch.allclose(plus[name], weight, atol=1e-6)


def test_the_groups_of_lora_plus_are_those_of_peft(load, base, ctx, tmp_path):
    from peft.optimizers import create_loraplus_optimizer

    from finetune.train.recipe_trainer import RecipeTrainer

    trainer = build_trainer(load(), base, unpacked(documents()), tmp_path, Lora(r=4), kind=RecipeTrainer)
    trainer.args.learning_rate, trainer.lora_plus_ratio = 1e-3, 8.0
    ours = trainer.create_optimizer()
    theirs = create_loraplus_optimizer(trainer.model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0)

    def rates(optimizer):
        return {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}

    assert rates(ours) == rates(theirs)


def test_wsd_rises_stays_and_falls_to_zero(load, base, ctx, tmp_path):
    settings = {"schedule": "wsd", "warmup_fraction": 0.25, "decay_fraction": 0.5, "learning_rate": 1e-2}
    _, _, values = learned(load, base, ctx, tmp_path, max_steps=8, batch_rows=2, **settings)
    lines = [json.loads(line) for line in values.metrics_file.read_text().splitlines()]
    assert [round(line["learning_rate"] / 1e-2, 4) for line in lines] == [0, 0.5, 1, 1, 1, 0.75, 0.5, 0.25]


# --- modules trained whole --------------------------------------------------------------------------------------


def test_what_is_trained_whole_begins_as_the_bases_own_bits(load, base, ctx, tmp_path):
    """TRL rounds it to bf16 on a quantised model; the learning rate is too small to hide that."""
    own = load().get_output_embeddings().weight.detach().clone()
    settings = {"learning_rate": 1e-9, "max_steps": 1, "lora": {"modules_to_save": ["lm_head"]}}
    weights = learned(load, base, ctx, tmp_path, **settings)[1]
    (head,) = [w for n, w in weights.items() if "lm_head" in n]
    assert head.dtype == torch.float32 and float((head - own).abs().max()) < 1e-8


# --- going on from an earlier adapter ---------------------------------------------------------------------------


@pytest.fixture
def earlier(load, base, ctx, tmp_path):
    result, weights, _ = learned(load, base, ctx, tmp_path, "earlier", lora={"modules_to_save": ["norm"]})
    train_trainer.save_adapter(result.model, tmp_path / "earlier_adapter", "owner/base", None)
    return tmp_path / "earlier_adapter", weights


@pytest.fixture(scope="module")
def fitting(base, tmp_path_factory):
    """An adapter as peft saves it, untrained."""
    from peft import get_peft_model

    folder = tmp_path_factory.mktemp("fitting")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = Lora(r=4, modules_to_save=["norm"])
    train_trainer.save_adapter(get_peft_model(model, lora_config.lora_config(lora, model)), folder, "owner/base", None)
    return folder


def test_training_goes_on_from_an_earlier_adapter(earlier, load, base, ctx, tmp_path):
    folder, weights = earlier
    lora = {"modules_to_save": ["norm"]}
    still = learned(load, base, ctx, tmp_path, "still", lora=lora, start=folder, learning_rate=1e-12, max_steps=1)[1]
    assert all(torch.allclose(still[n], weights[n], atol=1e-10) for n in weights)
    result, _, values = learned(load, base, ctx, tmp_path, "on", lora=lora, start=folder)
    first = json.loads(values.metrics_file.read_text().splitlines()[0])["loss"]
    before = json.loads((tmp_path / "earlier" / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert first < before
    train_trainer.save_adapter(result.model, tmp_path / "adapter", "owner/base", None)
    assert_merge_is_the_unmerged_model(base, tmp_path)


@pytest.mark.parametrize(
    "lora, expected",
    [
        ({"r": 8}, r"r is 4 in the adapter and 8 here; set lora\.r: 4"),
        ({"alpha": 5}, r"lora_alpha is 32 in the adapter and 5.0 here; set lora\.alpha: 32"),
        ({"rslora": True}, "use_rslora is False in the adapter and True"),
        ({"modules_to_save": []}, r"fully trained modules are norm in the adapter and nothing in the recipe"),
        ({"targets": ["q_proj"]}, "is in the adapter and not adapted here"),
    ],
    ids=["rank", "alpha", "rslora", "saved", "targets"],
)
def test_an_adapter_that_does_not_fit_the_recipe_is_refused(lora, expected, fitting, base):
    with pytest.raises(InputError, match=expected):
        lora_resume.check(Lora(**{"r": 4, "modules_to_save": ["norm"], **lora}), fitting, base, "owner/base", False)


def test_an_adapter_of_another_base_or_with_a_value_that_is_no_number_is_refused(earlier, load, base, ctx, tmp_path):
    lora = Lora(r=4, modules_to_save=["norm"])
    lora_resume.check(lora, earlier[0], base, "owner/base", False)
    lora_resume.check(lora, earlier[0], base, "folder:base", False)  # a folder has no name that could tell
    with pytest.raises(InputError, match="trained on owner/base"):
        lora_resume.check(lora, earlier[0], base, "owner/other", False)
    stored = load_file(earlier[0] / lora_resume.WEIGHTS)
    name = sorted(stored)[0]
    save_file({**stored, name: stored[name].fill_(float("inf"))}, earlier[0] / lora_resume.WEIGHTS)
    with pytest.raises(InputError, match="holds NaN or an infinity"):
        learned(load, base, ctx, tmp_path, lora={"modules_to_save": ["norm"]}, start=earlier[0])


def test_the_key_changes_with_the_earlier_adapters_bytes_not_with_its_place(fitting, tmp_path):
    earlier = (shutil.copytree(fitting, tmp_path / "earlier_adapter"),)
    shutil.copytree(fitting, tmp_path / "b" / "earlier_adapter")
    context = {"folder": str(tmp_path)}
    one, two = (
        Lora.model_validate({"start_from": str(path)}, context=context)
        for path in (earlier[0], tmp_path / "b" / "earlier_adapter")
    )
    assert one.model_dump() == two.model_dump() and one.start_folder != two.start_folder
    assert lora_resume.fingerprint(one) == lora_resume.fingerprint(two) != {}
    weights = tmp_path / "b" / "earlier_adapter" / lora_resume.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert lora_resume.fingerprint(one) != lora_resume.fingerprint(two)
    assert lora_resume.fingerprint(Lora()) == {}
    weights.unlink()
    with pytest.raises(InputError, match="holds no adapter_model"):
        lora_resume.fingerprint(two)


def test_an_adapter_on_the_hub_is_pinned_by_its_commit_and_downloaded(fitting, hub, ctx, base):
    commit = hub.plant("me/adapter", {p.name: p.read_bytes() for p in fitting.iterdir()})
    lora = Lora(r=4, modules_to_save=["norm"], start_from="me/adapter@main")
    assert lora_resume.fingerprint(lora) == {"start_from": commit}
    folder = lora_resume.folder_of(lora, ctx)
    lora_resume.check(lora, folder, base, "owner/base", False)
    assert lora_resume.folder_of(Lora(), ctx) is None


def test_another_attempt_begins_with_the_bases_own_modules(load, base, ctx, tmp_path):
    """After the device ran out of memory (train/oom.py) everything that peft put in is gone."""
    model = load()
    before = {n: type(m) for n, m in model.named_modules()}
    lora = {"modules_to_save": ["lm_head", "embed_tokens"]}
    learned(lambda: model, base, ctx, tmp_path, lora=lora)
    oom.remove_adapters(model)
    assert {n: type(m) for n, m in model.named_modules()} == before


# --- what cannot work -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lora, expected",
    [
        ({"last_layers": 3}, "3 are more than the 2 layers of the base"),
        ({"last_layers": 1, "targets": ["layers.0.mlp.up_proj"]}, "in the last 1 of 2 layers"),
        ({"modules_to_save": ["q_proj"]}, "q_proj is a linear module, which is quantised"),
        ({"modules_to_save": ["embed_tokenz"]}, "did you mean embed_tokens"),
        ({"modules_to_save": ["mlp"]}, "no module with weights of its own is named 'mlp'"),
        ({"targets": r".*mlp\..*"}, "also matches model.layers.0.mlp.act_fn, which is not a linear module"),
    ],
)
def test_what_the_base_cannot_do_is_refused_before_its_weights_are_read(base, lora, expected):
    with pytest.raises(InputError, match=expected):
        lora_config.check_targets(Lora(**lora), base, False)


@pytest.mark.parametrize("name", EVERY)
def test_what_the_base_can_do_passes(base, name):
    lora_config.check_targets(Lora(**EVERY[name][0]), base, False)


@pytest.mark.parametrize("name", EVERY)
def test_a_plan_counts_what_peft_trains(base, name):
    from peft import get_peft_model

    recipe = parse_recipe(RECIPE, base.parent / "small.yaml", []).model_copy(update={"lora": Lora(**EVERY[name][0])})
    model = empty_model(base)
    adapted = get_peft_model(model, lora_config.lora_config(recipe.lora, model), low_cpu_mem_usage=True)
    count = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert adapter_parameters(read_shapes(recipe, base), recipe) == count


@pytest.mark.parametrize(
    "section, fields, expected",
    [
        (Lora, {"last_layers": 2, "targets": ".*q_proj"}, "put the layers into the regular expression"),
        (Lora, {"targets": ["lm_head"]}, "name it in modules_to_save"),
        (Lora, {"modules_to_save": ["norm", "norm"]}, "norm is listed twice"),
        (Lora, {"start_from": "no hub name"}, "allowed: RECIPE, RECIPE@RUN, folder .* or OWNER/NAME@REVISION"),
        (Train, {"keep_best": True}, "needs train.eval_steps"),
        (Train, {"patience": 2}, "needs train.eval_steps"),
        (Train, {"decay_fraction": 0.2}, "only the schedule wsd"),
        (Train, {"schedule": "wsd", "warmup_fraction": 0.5, "decay_fraction": 0.6}, "more than all the steps"),
        (Train, {"lora_plus_ratio": 0.5}, "greater than or equal to 1"),
    ],
    ids=lambda value: None if isinstance(value, dict) else getattr(value, "__name__", None),
)
def test_contradictions_of_a_recipe(section, fields, expected):
    with pytest.raises(ValidationError, match=expected):
        section(**fields)


def test_an_earlier_adapter_on_the_hub_has_a_name_and_perhaps_a_revision():
    assert Lora(start_from="me/adapter@v1.0").start_from == "me/adapter@v1.0"
    assert Lora(start_from="me/adapter").start_folder is None
