"""A module in the working folder that is named as one of Python's own is data: no process of ours runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TRAPS = ("json", "typing", "dataclasses", "torch", "yaml", "numpy", "typer", "socket", "tempfile", "signal", "logging")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with a recipe, its rows, and a trap by the name of each of some modules."""
    for name in TRAPS:
        (tmp_path / f"{name}.py").write_text("import os\nopen('executed', 'a').write(__file__)\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "r.yaml").write_text(
        "schema: 1\nname: r\nmodel: builtin:tiny-mistral\ndata:\n  - {source: local, path: rows.jsonl}\n"
    )
    return tmp_path


def run(folder: Path, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the folder, with an environment that says nothing of paths."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return subprocess.run(
        command, cwd=folder, env={**kept, "HF_HUB_OFFLINE": "1", **more}, capture_output=True, text=True, check=False,
        stdin=subprocess.DEVNULL, timeout=120,
    )  # fmt: skip


def test_python_m_finetune_runs_no_module_of_the_working_folder(folder: Path) -> None:
    done = run(folder, sys.executable, "-m", "finetune", "validate", "r.yaml")
    assert done.returncode == 0, done.stderr
    assert not (folder / "executed").exists()


def test_site_modules_of_the_working_folder_are_not_run_but_by_the_users_own_path(folder: Path) -> None:
    """Python runs them before any code of ours where PYTHONPATH has an empty entry: SECURITY.md says so."""
    for name in ("sitecustomize", "usercustomize"):
        (folder / f"{name}.py").write_text("open('executed', 'a').write(__file__)\n")
    assert run(folder, sys.executable, "-m", "finetune", "validate", "r.yaml").returncode == 0
    assert not (folder / "executed").exists()
    run(folder, sys.executable, "-P", "-c", "pass", PYTHONPATH=":/nowhere")
    assert "sitecustomize" in (folder / "executed").read_text()
    assert "`:/x`" in (ROOT / "SECURITY.md").read_text()


def test_the_test_itself_can_fail(folder: Path) -> None:
    run(folder, sys.executable, "-c", "import json")
    assert (folder / "executed").exists()


def test_several_processes_run_no_module_of_the_working_folder(folder: Path) -> None:
    """`run --processes 2`: what `launch` starts, and what those start in turn."""
    code = "from finetune.pipeline.launch import launch; launch(['validate', 'r.yaml'], 2)"
    done = run(folder, sys.executable, "-P", "-c", code)
    assert done.returncode == 0 and done.stdout.count("fine (r)") == 2, done.stderr
    assert not (folder / "executed").exists()


def test_what_a_command_starts_has_a_safe_path(folder: Path) -> None:
    code = (
        "import subprocess, sys; sys.argv = ['finetune', 'validate', 'r.yaml']\n"
        "from finetune.cli.main import main\ntry: main()\nexcept SystemExit: pass\n"
        "subprocess.run([sys.executable, '-c', 'import json'], check=True)\n"
        "import os; assert os.environ['RUST_BACKTRACE'] == '0'  # which Rust reads at its first panic\n"
    )
    done = run(folder, sys.executable, "-P", "-c", code)
    assert done.returncode == 0, done.stderr
    assert not (folder / "executed").exists()


def test_the_documented_launches_set_a_safe_path() -> None:
    makefile, slurm = (ROOT / name for name in ("Makefile", "scripts/launch_slurm.sh"))
    lines = [line for line in makefile.read_text().splitlines() if "accelerate launch" in line]
    assert lines and all("PYTHONSAFEPATH=1 $(BIN)/accelerate launch" in line for line in lines)
    assert "export PYTHONSAFEPATH=1" in slurm.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("safe", [True, False])
def test_accelerate_launch_runs_no_module_of_the_working_folder(safe: bool, folder: Path) -> None:
    """As documented, and without the variable: `__main__` takes the folder off the path before it imports anything."""
    launcher = str(Path(sys.executable).parent / "accelerate")
    config = str(ROOT / "recipes" / "accelerate" / "multi_cpu.yaml")
    words = ("launch", "--config_file", config, "--num_processes", "2", "-m", "finetune", "validate", "r.yaml")
    (folder / "torch.py").unlink()
    done = run(folder, launcher, *words, **({"PYTHONSAFEPATH": "1"} if safe else {}))
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (folder / "executed").exists()
