"""`finetune sweep` with real trainings: killed once, continued, data stages shared."""

import json
import shutil
import signal
import time

import pytest


@pytest.mark.slow
def test_four_trainings_killed_once_share_their_data_stages(pristine, tmp_path):
    shutil.copytree(pristine.folder, tmp_path / "work")
    workspace = type(pristine)(tmp_path / "work")
    roots = ["--artifacts", "artifacts", "--scratch", "scratch"]
    words = ["sweep", "small.yaml", "--grid", "train.learning_rate=[1e-3, 5e-3]", "--grid", "lora.r=[2, 4]", *roots]
    process = workspace.start(*words)
    deadline = time.monotonic() + 120
    while len(list((workspace.folder / "artifacts" / "train").glob("*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    done = workspace.run(*words, "--json")
    value = json.loads(done.stdout)
    assert "is there already" in done.stderr and [run["status"] for run in value["runs"]] == ["done"] * 4
    counts = {
        stage: len(list((workspace.folder / "artifacts" / stage).glob("*")))
        for stage in ("ingest", "dedup", "render", "pack", "train", "merge")
    }
    assert counts == {"ingest": 1, "dedup": 1, "render": 1, "pack": 1, "train": 4, "merge": 0}
    values = [run["value"] for run in value["runs"]]
    assert len(set(values)) == 4 and all(
        run["interval"][0] <= run["value"] <= run["interval"][1] for run in value["runs"]
    )
    assert next(run["value"] for run in value["runs"] if run["name"] == value["best"]) == min(values)
    shown = json.loads(workspace.run("show", value["best"], "--json").stdout)
    assert shown["stages"]["evaluate"]["metrics"]["perplexity_adapter"] == min(values)
