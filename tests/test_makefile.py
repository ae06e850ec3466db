"""What `make` types for a person."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def typed(tmp_path):
    """A function that gives what `make sft` with some words would run in a checkout that is set up."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name in (".venv/bin/python", ".venv/.ready"):
        (tmp_path / name).touch()

    def typed(*words):
        outside = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}  # of the make that runs the tests
        command = ["make", "-n", "sft", *words]
        done = subprocess.run(command, cwd=tmp_path, env=outside, capture_output=True, text=True, check=True)
        return done.stdout.strip().splitlines()[-1].split()

    return typed


def test_one_gpu_or_several(typed):
    assert typed() == [".venv/bin/finetune", "run", "tiny-pydoc"]
    assert typed("RECIPE=mine", "GPUS=4") == [".venv/bin/finetune", "run", "mine", "--processes", "4"]
    edits = [word.strip("'") for word in typed("RECIPE=mine", "SET=lora.r=8 seed=1", "UNTIL=pack")]
    assert edits[2:] == ["mine", "--set", "lora.r=8", "--set", "seed=1", "--until", "pack"]


@pytest.mark.parametrize("config", ["fsdp", "deepspeed_zero2"])
def test_a_configuration_of_accelerate(config, typed):
    variable, launcher, *options = typed("RECIPE=mine", "GPUS=4", f"CONFIG={config}")
    assert (variable, launcher) == ("PYTHONSAFEPATH=1", ".venv/bin/accelerate")
    assert options[:3] == ["launch", "--config_file", f"recipes/accelerate/{config}.yaml"]
    assert options[3:] == ["--num_processes", "4", "-m", "finetune", "run", "mine"]
