"""The import graph is the design: lower layers know nothing of higher ones, and stages nothing of each other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "finetune"
LAYERS = {  # what each part of the package may import of it, whether at the top of a file or inside a function
    "errors": set(),
    "digests": {"errors"},
    "environment": set(),
    "records": {"errors"},
    "recipe_data": set(),
    "recipe_training": {"recipe_data"},
    "recipe_rules": {"recipe_data"},
    "recipe_lora": {"recipe_data"},
    "recipe": {"recipe_data", "recipe_lora", "recipe_rules", "recipe_training"},
    "recipe_errors": {"recipe", "recipe_data", "recipe_rules"},
    "recipe_names": set(),
    "recipe_file": {"recipe", "recipe_data", "recipe_errors", "recipe_names", "errors"},
    "context": {"recipe", "errors"},
    "leases": {"errors"},
    "store": {"errors", "digests", "leases"},
    "data": {"data", "recipe", "recipe_rules", "records", "errors"},
    "metrics": {"metrics", "errors"},
    "backends": {
        "backends",
        "data",
        "metrics",
        "recipe",
        "recipe_rules",
        "recipe_file",
        "recipe_names",
        "records",
        "context",
        "errors",
        "digests",
        "environment",
    },
}
LAYERS["backends"].add("prediction")
LAYERS["prediction"] = {"prediction", "backends", "recipe", "recipe_names"}
LAYERS["stages"] = LAYERS["backends"]
HEAVY = {"torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate", "sklearn", "faiss", "pandas"}


def modules():
    return sorted(p for p in ROOT.rglob("*.py") if p.name != "__main__.py")


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_flow_one_way(path):
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if part not in LAYERS:
        return
    inside = {name.split(".")[1] for name in imported(ast.parse(path.read_text())) if name.startswith("finetune.")}
    assert inside <= LAYERS[part] | ({part} if part in ("data", "metrics", "backends") else set())


def test_a_stage_never_imports_a_stage():
    for path in (ROOT / "stages").glob("*.py"):
        assert not [n for n in imported(ast.parse(path.read_text())) if n.startswith("finetune.stages")], path


@pytest.mark.parametrize("folder", ["data", "metrics"])
def test_pure_layers_import_nothing_above_numpy_and_pyarrow(folder):
    allowed = {"numpy", "pyarrow", "pydantic", "finetune", *sys.stdlib_module_names}
    for path in (ROOT / folder).glob("*.py"):
        outside = {n.split(".")[0] for n in imported(ast.parse(path.read_text()))} - allowed
        assert not outside, f"{path} imports {outside}"


@pytest.mark.parametrize("module", ["finetune.cli", "finetune.session", "finetune.planner", "finetune.shown"])
def test_the_command_line_starts_without_a_training_library(module):
    code = f"import sys, {module}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
