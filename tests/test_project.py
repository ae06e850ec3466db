"""pyproject.toml declares what the package imports; the project's files name each other rightly."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

DEVELOPMENT = ("test", "check")


def plain(name):
    return re.match(r"[\w.-]+", name)[0].lower().replace("_", "-")


def test_every_package_that_is_imported_is_declared():
    extras = [n for extra, needs in PROJECT["optional-dependencies"].items() if extra not in DEVELOPMENT for n in needs]
    declared = {plain(need) for need in PROJECT["dependencies"] + extras}
    imported = set()
    for path in (ROOT / "finetune").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    imported -= set(sys.stdlib_module_names) | {"finetune", "compression"}  # compression: the library of Python 3.14
    homes = importlib.metadata.packages_distributions()
    missing = {name for name in imported if not {plain(home) for home in homes.get(name, [name])} & declared}
    assert missing == set()


def test_doctor_asks_for_the_distribution_by_its_name():
    from finetune.cli.doctor import DISTRIBUTION

    assert DISTRIBUTION == PROJECT["name"]


def test_the_changelog_names_the_version_of_every_stage_that_was_raised():
    from finetune.pipeline.stage_list import STAGES

    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert [s.name for s in STAGES if s.version > 1 and f"{s.name} {s.version}" not in text] == []
