"""The import graph is the design: a folder imports only folders above it, and a stage imports no stage."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import finetune

ROOT = Path(__file__).parent.parent / "finetune"
ORDER = (  # parts of the package; each may import itself and what is above it
    "errors", "metrics", "utils", "engine", "recipe", "context", "hub", "models", "data", "dedup", "filters",
    "tokenization", "lora", "merge", "eval", "gguf", "quantized", "serve", "synth", "tiny", "estimate", "train",
    "preference", "publish", "stages", "pipeline", "report", "init", "cli", "__main__",
)  # fmt: skip
PURE = ("data/formats", "data/records", "data/text", "dedup/jaccard", "dedup/measures", "dedup/recall", "dedup/select",
        "filters/basic", "filters/endings", "filters/quality", "filters/registry", "tokenization/audit",
        "tokenization/chat", "tokenization/inspection", "tokenization/label_mask", "tokenization/row_tokenizer",
        "tokenization/token_rows", "eval/metrics")  # fmt: skip
HEAVY = {"torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate", "sklearn", "faiss", "pandas"}


def modules():
    """Module name -> syntax tree, for every module of the package."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(("finetune", *(parts[:-1] if parts[-1] == "__init__" else parts)))
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imported(tree):
    """Every name imported anywhere in a module: at its top, inside a function, for type checkers only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(module):
    return module.split(".")[1] if module != "finetune" else ""


def test_imports_go_one_way_and_no_two_modules_import_each_other():
    trees = modules()
    imports = {name: {n for n in imported(tree) if n in trees and n != name} for name, tree in trees.items()}
    assert {part(name) for name in trees} - {""} == set(ORDER)
    up = [
        f"{name} imports {other}"
        for name, others in imports.items()
        for other in others
        if part(name) and part(other) and ORDER.index(part(other)) > ORDER.index(part(name))
    ]
    mutual = {f"{min(a, b)} and {max(a, b)}" for a, others in imports.items() for b in others if a in imports[b]}
    packages = {name for name in trees if (ROOT / Path(*name.split(".")[1:])).is_dir()}
    mutual = {pair for pair in mutual if not set(pair.split(" and ")) & packages}
    between = [
        f"{name} imports {other}"
        for name, others in imports.items()
        for other in others
        if part(name) == part(other) == "stages" and other != "finetune.stages"
    ]
    assert (up, sorted(mutual), between) == ([], [], [])


def test_folders_and_modules_stay_small():
    crowded = {
        folder.name: count
        for folder in ROOT.iterdir()
        if folder.is_dir() and (count := len(list(folder.glob("*.py")))) > 16
    }
    crowded.pop("stages", None)  # one module a stage
    long = {p.name: n for p in ROOT.rglob("*.py") if (n := p.read_text(encoding="utf-8").count("\n")) >= 400}
    assert (crowded, long) == ({}, {})


def test_data_and_metric_code_imports_nothing_above_numpy_and_pyarrow():
    allowed = {"numpy", "pyarrow", "pydantic", "finetune", *sys.stdlib_module_names}
    trees = modules()
    outside = {
        path: found
        for path in PURE
        if (found := {n.split(".")[0] for n in imported(trees[f"finetune.{path.replace('/', '.')}"])} - allowed)
    }
    assert outside == {}


@pytest.mark.parametrize("module", ["cli.main", "cli.run", "pipeline.plan", "cli.show"])
def test_the_command_line_starts_without_a_training_library(module):
    code = f"import sys, finetune.{module}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_version_is_printed_without_a_training_library():
    code = (
        "import sys; from finetune.cli.main import main; sys.argv[1:] = ['--version']\n"
        f"try: main()\nfinally: print(*sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["finetune", finetune.__version__]
