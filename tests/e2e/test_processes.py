"""Two processes that really run, over gloo: `accelerate launch` with recipes/accelerate/multi_cpu.yaml."""

import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from tests.e2e.conftest import ROOT, Workspace

NO_DROPOUT = ("--set", "lora.dropout=0", "--until", "train")  # each process draws its own dropout


def test_two_processes_train_the_adapter_of_one(pristine, tmp_path):
    import subprocess

    adapters, shown = [], []
    for name in ("one", "two"):
        shutil.copytree(pristine.folder, tmp_path / name)
        work = Workspace(tmp_path / name)
        if name == "one":
            work.run("run", "small.yaml", *NO_DROPOUT)
        else:
            launcher = Path(sys.executable).parent / "accelerate"
            config = ROOT / "recipes" / "accelerate" / "multi_cpu.yaml"
            command = [launcher, "launch", "--config_file", config, *work.command("run", "small.yaml", *NO_DROPOUT)[1:]]
            done = subprocess.run(
                list(map(str, command)),
                env=work.environment(),
                cwd=work.folder,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            assert (
                done.stderr.count("train …") == 1 and done.stderr.count("ingest …") == 1
            )  # one process builds and speaks
        shown.append(work.show()["stages"]["train"])
        adapters.append(load_file(str(Path(shown[-1]["path"]) / "adapter" / "adapter_model.safetensors")))
    assert [s["metrics"]["processes"] for s in shown] == [1, 2]
    assert shown[0]["key"] == shown[1]["key"]
    assert shown[0]["metrics"]["tokens"] == shown[1]["metrics"]["tokens"]
    for name in adapters[0]:
        np.testing.assert_allclose(adapters[0][name], adapters[1][name], atol=1e-5)
