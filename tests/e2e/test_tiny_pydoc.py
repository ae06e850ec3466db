"""The default recipe, whole, as `make sft` runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return ["--artifacts", str(folder / "artifacts"), "--scratch", str(folder / "scratch")]


def finetune(*arguments):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "finetune", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def stages(roots):
    finetune("run", "tiny-pydoc", *roots)
    return json.loads(finetune("show", "tiny-pydoc", "--json", *roots[:2], *roots[2:]))["stages"]


def test_the_adapter_learned_and_reads_its_prompt(stages):
    metrics = stages["evaluate"]["metrics"]
    assert metrics["perplexity_adapter"] < 0.6 * metrics["perplexity_base"]
    assert metrics["nll_true"] < metrics["nll_shuffled"]
    assert metrics["nll_difference_interval"][0] > 0
    assert metrics["stop_rate"] > metrics["stop_rate_base"]


def test_the_merge_is_certified(stages):
    metrics = stages["certify"]["metrics"]
    assert metrics["agreement"] > 0.95
    assert metrics["mean_kl"] < 1e-3
    assert abs(metrics["perplexity_merged"] / metrics["perplexity_trained"] - 1) < 0.01


def test_near_duplicates_are_those_of_brute_force(stages):
    """Greedy in float64 over all pairs, longest first, as the guarantee is worded."""
    threshold = 0.85
    filtered = pq.read_table(Path(stages["filter"]["path"]) / "rows.parquet").to_pylist()
    vectors = np.load(Path(stages["embed"]["path"]) / "vectors.npy").astype(np.float64)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)  # float32 rows are unit to 1e-8 only
    pairs = pq.read_table(Path(stages["dedup"]["path"]) / "pairs.parquet").to_pylist()
    kept = {r["id"] for r in pq.read_table(Path(stages["dedup"]["path"]) / "rows.parquet", columns=["id"]).to_pylist()}
    position = {row["id"]: i for i, row in enumerate(filtered)}
    near = [p for p in pairs if p["method"] == "embedding"]
    assert len(near) == stages["dedup"]["metrics"]["embedding"] >= 100
    chosen = vectors[[position[i] for i in sorted(kept, key=position.get)]]
    scores = chosen @ chosen.T
    np.fill_diagonal(scores, 0)
    assert scores.max() < threshold
    for pair in near:
        assert pair["kept_id"] in kept and pair["dropped_id"] not in kept
        score = vectors[position[pair["dropped_id"]]] @ vectors[position[pair["kept_id"]]]
        assert score >= threshold and score == pytest.approx(pair["score"], abs=1e-9)
    assert len(kept) + len(pairs) == len(filtered)


def test_a_second_run_builds_nothing(stages, roots):
    before = json.loads(finetune("show", "tiny-pydoc", "--json", *roots))
    finetune("run", "tiny-pydoc", *roots)
    assert json.loads(finetune("show", "tiny-pydoc", "--json", *roots)) == before
