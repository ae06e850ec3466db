"""Whole runs with the training variants on: the rest of the pipeline takes what comes of them."""

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e import launches
from tests.e2e.conftest import Workspace

pytestmark = pytest.mark.slow
LORA = "lora: {r: 4, alpha: 8, dropout: 0.1"
TRAIN = "train: {learning_rate: 5e-3, max_steps: 12, batch_rows: 2, warmup_fraction: 0.2"
WHOLE = ", last_layers: 1, modules_to_save: [embed_tokens, lm_head]"
LOOKED_AT = ", neftune_alpha: 5, lora_plus_ratio: 4, eval_steps: 3, eval_rows: 8, keep_best: true, patience: 3"


@pytest.fixture
def work(pristine, tmp_path):
    """A workspace whose recipe asks for nearly everything."""
    shutil.copytree(pristine.folder, tmp_path / "work")
    made = Workspace(tmp_path / "work")
    text = made.recipe.read_text()
    made.recipe.write_text(text.replace(LORA, LORA + WHOLE).replace(TRAIN, TRAIN + LOOKED_AT))
    return made


def train_of(work):
    return work.show()["stages"]["train"]


def measured(work):
    lines = map(json.loads, (Path(train_of(work)["path"]) / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}


def test_what_was_trained_is_evaluated_certified_merged_and_gone_on_from(work):
    work.run("run", "small.yaml")
    shown = work.show()["stages"]
    losses = measured(work)
    assert list(losses) == [3, 6, 9, 12]
    assert shown["train"]["metrics"]["held_out_best_loss"] == min(losses.values())
    assert shown["train"]["metrics"]["held_out_rows"] == 8
    assert shown["merge"]["status"] == "done"
    certificate = json.loads((Path(shown["certify"]["path"]) / "certificate.json").read_text())
    assert "dequantized" in json.dumps(certificate)

    (work.folder / "earlier").mkdir()
    text = work.run("run", "small.yaml", "--set", "lora.start_from=./earlier", status=2).stderr
    assert "lora.start_from" in text and "holds no adapter_config.json" in text
    shutil.copytree(Path(shown["train"]["path"]) / "adapter", work.folder / "earlier", dirs_exist_ok=True)
    work.run("run", "small.yaml", "--set", "lora.start_from=./earlier", "--set", "train.max_steps=3")
    again = work.show()["stages"]
    assert again["train"]["key"] != shown["train"]["key"] and again["merge"]["status"] == "done"
    assert again["train"]["metrics"]["first_loss"] < shown["train"]["metrics"]["first_loss"] - 1
    assert again["evaluate"]["metrics"]["perplexity_adapter"] < shown["evaluate"]["metrics"]["perplexity_adapter"]


def test_two_processes_measure_what_one_does_also_when_one_of_them_dies_on_the_way(work, tmp_path):
    quiet = ("--set", "lora.dropout=0", "--set", "train.neftune_alpha=null", "--until", "train")
    work.run("run", "small.yaml", *quiet)
    shutil.copytree(work.folder, tmp_path / "cut", ignore=shutil.ignore_patterns("train", "runs"))
    cut = Workspace(tmp_path / "cut")
    process = launches.begin(cut, launches.ours(cut, 2, *quiet))
    launches.wait_until(lambda: launches.complete(cut), process)
    launches.kill(launches.rank_of(process, 1))
    process.communicate(timeout=60)
    assert "goes on from checkpoint-" in launches.finish(cut, launches.ours(cut, 2, *quiet))
    assert list(measured(cut)) == [3, 6, 9, 12]
    assert measured(cut) == pytest.approx(measured(work), abs=1e-4)
    best = [train_of(w)["metrics"]["held_out_best_step"] for w in (work, cut)]
    assert len(set(best)) == 1
