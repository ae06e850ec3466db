"""A run prints the product's own lines and nothing else: no library's warning, log line or bar."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import EVERY_STAGE, Workspace

RUNNER = Path(__file__).parent / "traced.py"


@pytest.fixture
def workspace(pristine, tmp_path):
    return Workspace(shutil.copytree(pristine.folder, tmp_path / "work"))


def foreign(command, workspace, name, **environment):
    """The lines on stdout and stderr that none of the package's printers wrote, and everything that was printed."""
    copy = workspace.folder / name
    given = workspace.environment(**environment)
    given.pop("PYTHONWARNINGS", None)
    traced = [sys.executable, str(RUNNER), str(copy), *command[3:]]
    done = subprocess.run(traced, cwd=workspace.folder, env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = []
    for suffix, printed in ((".out", done.stdout), (".err", done.stderr)):
        ours = copy.with_suffix(suffix).read_text(encoding="utf-8").splitlines()
        for line in printed.splitlines():
            if line in ours:
                ours.remove(line)
            else:
                lines.append(line)
    return lines, done.stdout + done.stderr


@pytest.mark.slow
def test_a_run_with_every_stage_and_export(workspace):
    workspace.recipe.write_text(EVERY_STAGE + "tracking: {wandb: true}\n")
    lines, printed = foreign(workspace.command("run", workspace.recipe), workspace, "every")
    assert lines == []
    assert "train: " in printed and "export" in printed and "tracking: W&B offline" in printed


@pytest.mark.slow
def test_the_default_recipe(workspace):
    lines, printed = foreign(workspace.command("run", "tiny-pydoc"), workspace, "default")
    assert lines == []
    assert "base: reading documentation" in printed


@pytest.mark.slow
def test_it_finds_a_line_of_somebody_else(workspace):
    (workspace.folder / "mine.py").write_text("print('a line of mine')\ndef keep(row): return None\n")
    recipe = EVERY_STAGE.replace("max_length_tokens: 100", "max_length_tokens: 100, rules: [{rule: 'mine:keep'}]")
    workspace.recipe.write_text(recipe)
    command = [*workspace.command("run", workspace.recipe), "--until", "filter"]
    lines, _ = foreign(command, workspace, "mine")
    assert lines == ["a line of mine"]
