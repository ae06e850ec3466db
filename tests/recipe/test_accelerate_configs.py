"""The files in recipes/accelerate, and what a process makes of the launcher that started it."""

import argparse
import json
import os
import subprocess
import sys

import pytest

from finetune.errors import FinetuneError, GateRefused, InputError, Stopped
from finetune.pipeline import launch
from finetune.train import distributed
from tests.e2e.conftest import ROOT

FOLDER = ROOT / "recipes" / "accelerate"
KINDS = {"ddp": "MULTI_GPU", "multi_cpu": "MULTI_GPU", "fsdp": "FSDP", "deepspeed_zero2": "DEEPSPEED"}


def options():
    """Every option of `accelerate launch`: what a nested key of a config file must be one of."""
    from accelerate.commands.launch import launch_command_parser

    parser = launch_command_parser()
    assert isinstance(parser, argparse.ArgumentParser)
    return {action.dest for action in parser._actions}


def test_every_config_is_here_and_says_what_its_name_says():
    assert {p.stem for p in FOLDER.glob("*.yaml")} == set(KINDS)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_accelerate_knows_every_key(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))  # refuses a key it does not know at the top
    assert config.distributed_type.value == KINDS[name]
    nested = {*config.fsdp_config, *config.deepspeed_config}
    assert nested <= options()
    assert bool(nested) == (name in ("fsdp", "deepspeed_zero2"))


@pytest.mark.parametrize("name", sorted(set(KINDS) - {"deepspeed_zero2"}))
def test_accelerate_turns_the_config_into_the_launch_it_names(name):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = launch_command_parser().parse_args(
        ["--config_file", str(FOLDER / f"{name}.yaml"), "--main_process_port", "0", "x"]
    )
    arguments, _, _ = _validate_launch_command(arguments)
    assert arguments.num_processes == 2 and (arguments.multi_gpu or arguments.use_fsdp)
    environment = prepare_multi_gpu_env(arguments)
    assert environment.get("ACCELERATE_USE_FSDP") == ("true" if name == "fsdp" else None)
    if name == "fsdp":
        assert environment["FSDP_VERSION"] == "2"


def test_ranks_come_from_the_launcher():
    assert launch.ranks({}) == (0, 1)
    assert launch.ranks({"RANK": "3", "WORLD_SIZE": "4"}) == (3, 4)
    assert launch.ranks({"MASTER_ADDR": "a cluster's own"}) == (0, 1)


def test_accelerate_that_starts_one_process_of_two_without_a_word_is_found_out():
    with pytest.raises(InputError, match="started one"):
        launch.ranks({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"})


@pytest.mark.parametrize(
    ("kind", "processes", "environment"),
    [("NO", 1, {}), ("MULTI_CPU", 2, {}), ("MULTI_GPU", 4, {}), ("FSDP", 2, {"ACCELERATE_USE_FSDP": "true"})],
)
def test_what_was_asked_for_passes(kind, processes, environment):
    distributed.verify(kind, processes, processes, environment)


@pytest.mark.parametrize(
    ("kind", "processes", "world", "environment", "said"),
    [
        ("MULTI_CPU", 2, 2, {"ACCELERATE_USE_FSDP": "true"}, "FSDP was requested, but accelerate uses MULTI_CPU"),
        ("MULTI_GPU", 2, 2, {"ACCELERATE_USE_DEEPSPEED": "true"}, "DEEPSPEED was requested"),
        ("NO", 1, 2, {}, "2 processes were started"),
        ("NO", 2, 2, {}, "distributed_type is NO"),
    ],
)
def test_what_was_not_asked_for_is_refused(kind, processes, world, environment, said):
    with pytest.raises(GateRefused, match=said):
        distributed.verify(kind, processes, world, environment)


def test_a_marker_of_another_shape_is_told_in_one_line(tmp_path):
    now = {"batch_rows": 8, "micro_batch_rows": 1, "processes": 2, "device": "cpu"}
    marker = tmp_path / "COMPLETE"
    marker.write_text(json.dumps(now))
    assert distributed.changes(marker, now) == ""
    marker.write_text(json.dumps({**now, "processes": 1, "device": "Tesla T4"}))
    said = distributed.changes(marker, now)
    first = {**now, "processes": 1, "device": "Tesla T4", "until_step": 40}
    assert distributed.before(marker, now, 40) == [first]
    marker.write_text(json.dumps({**now, "before": [first]}))
    assert distributed.before(marker, now, 60) == [first]  # as before: one entry a change
    assert distributed.before(marker, {**now, "device": "A100"}, 60) == [first, {**now, "until_step": 60}]
    assert "device was Tesla T4, is cpu, processes was 1, is 2" in said and "stays 8 rows" in said
    marker.write_text("all ranks have written and synced this checkpoint\n")
    assert distributed.changes(marker, now) == "" and distributed.before(marker, now, 60) == []


def test_only_rank_0_says_what_every_rank_would_say(monkeypatch):
    monkeypatch.setattr(launch, "FLOOR_SECONDS", 0.0)
    assert launch.message(InputError("wrong"), {}) == "wrong"
    assert launch.message(InputError("wrong"), {"RANK": "0"}) == "wrong"
    assert launch.message(FinetuneError("disk full"), {"RANK": "1"}) == "process 2: disk full"
    assert launch.message(Stopped(15), {"RANK": "1"}) == ""


def test_another_process_that_is_gone_is_a_sentence_and_other_errors_pass():
    lost = RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1")
    with pytest.raises(FinetuneError, match="another process"), distributed.explained(2):
        raise lost
    for world, error in ((1, lost), (2, RuntimeError("CUDA error: an illegal memory access"))):
        with pytest.raises(RuntimeError, match=r"pair\.cc|illegal"), distributed.explained(world):
            raise error


FSDP = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, MistralConfig
from finetune.train import distributed as distribution
from finetune.train.trainer import save_adapter

def model():
    torch.manual_seed(0)
    config = MistralConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=2)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(AutoModelForCausalLM.from_config(config), lora)

def step(model, ids):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()

ids = torch.arange(64).reshape(4, 16)
dist.init_process_group("gloo")
rank = dist.get_rank()
whole = model()
step(whole, ids)
assert distribution.whole_adapter(whole) is None
expected = get_peft_model_state_dict(whole)
sharded = model()
mesh = init_device_mesh("cpu", (2,))
for layer in sharded.base_model.model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(sharded, mesh=mesh)
step(sharded, ids[rank * 2 : rank * 2 + 2])
gathered = distribution.whole_adapter(sharded)
assert gathered is not None
assert distribution.highest(15 * rank, torch.device("cpu")) == 15
if rank == 0:
    from pathlib import Path
    from safetensors.torch import load_file
    save_adapter(sharded, Path(sys.argv[1]), "base", None, gathered)
    found = load_file(sys.argv[1] + "/adapter_model.safetensors")
    assert found.keys() == expected.keys()
    worst = max(float((found[n] - expected[n]).abs().max()) for n in found)
    assert worst < 1e-5, worst
distribution.part()
assert not dist.is_initialized()
"""


@pytest.mark.slow
def test_a_step_under_fsdp2_is_the_step_of_one_process_and_its_adapter_is_whole(tmp_path):
    script = tmp_path / "step.py"
    script.write_text(FSDP)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(
        [*command, str(tmp_path / "adapter")], capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
