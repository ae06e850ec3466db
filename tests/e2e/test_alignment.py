"""Preference training in a real run: killed, in two processes, from nothing, and its gates."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.e2e import launches
from tests.e2e.conftest import RECIPE, make_workspace

ALIGN = ("--until", "align")
PREFERENCE = """\
preference:
  data:
    - {source: local, path: pairs.jsonl}
  batch_pairs: 4
  learning_rate: 5e-3
  epochs: 2
  max_length_tokens: 128
  min_accuracy: null
  max_perplexity_ratio: null
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workspace in which everything before align is done."""
    work = make_workspace(tmp_path_factory.mktemp("trained") / "work", RECIPE + PREFERENCE)
    work.run("run", "small.yaml", "--until", "train")
    return work


@pytest.fixture
def copies(trained, tmp_path):
    import shutil

    from tests.e2e.conftest import Workspace

    def make(name):
        shutil.copytree(trained.folder, tmp_path / name)
        return Workspace(tmp_path / name)

    return make


def aligned(work):
    return Path(work.show()["stages"]["align"]["path"]) / "adapter" / "adapter_model.safetensors"


@pytest.mark.slow
def test_the_whole_run_takes_the_aligned_adapter_to_the_merged_model(copies):
    work = copies("one")
    work.run("run", "small.yaml")
    stages = work.show()["stages"]
    assert {n for n, s in stages.items() if s["status"] not in ("done", "off")} == set()
    manifests = {n: json.loads((Path(stages[n]["path"]) / "manifest.json").read_text()) for n in ("merge", "align")}
    assert manifests["merge"]["inputs"]["train"] == manifests["align"]["digest"]
    assert stages["align"]["metrics"]["loss"] < stages["align"]["metrics"]["first_loss"]


@pytest.mark.slow
def test_two_processes_align_as_one(copies):
    one, two = copies("one"), copies("two")
    # Each process draws a dropout mask of its own, and a last step with fewer pairs is filled up by repeating some.
    same = ("--set", "lora.dropout=0", "--set", "preference.max_steps=12", *ALIGN)
    one.run("run", "small.yaml", *same)
    launches.finish(two, launches.ours(two, 2, *same))
    first, second = (load_file(str(aligned(w))) for w in (one, two))
    for name in first:
        np.testing.assert_allclose(first[name], second[name], atol=1e-4)
    assert [w.show()["stages"]["align"]["metrics"]["processes"] for w in (one, two)] == [1, 2]


@pytest.mark.slow
def test_a_killed_alignment_goes_on_to_the_same_bits(copies):
    whole, cut = copies("whole"), copies("cut")
    whole.run("run", "small.yaml", *ALIGN)
    process = launches.begin(cut, cut.command("run", "small.yaml", *ALIGN))
    launches.wait_until(lambda: any(cut.folder.glob("artifacts/align/*/checkpoints/*/COMPLETE")), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    cut.run("run", "small.yaml", *ALIGN)
    assert cut.show()["stages"]["align"]["metrics"]["resumed_from_steps"] > 0
    assert aligned(whole).read_bytes() == aligned(cut).read_bytes()


@pytest.mark.slow
def test_without_sft_the_reference_is_the_base(copies):
    work = copies("zero")
    work.run("run", "small.yaml", "--set", "train=null", *ALIGN)
    stages = work.show()["stages"]
    start = load_file(str(Path(stages["train"]["path"]) / "adapter" / "adapter_model.safetensors"))
    assert all(not v.any() for n, v in start.items() if ".lora_B." in n)
    assert all(v.any() for v in load_file(str(aligned(work))).values())
