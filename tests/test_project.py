"""pyproject.toml declares what the package imports; the project's files name each other rightly."""

import ast
import importlib.metadata
import itertools
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

DEVELOPMENT = ("test", "check", "docs", "release")


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


def test_the_site_has_every_page_and_every_error_message():
    done = subprocess.run([sys.executable, ROOT / "scripts/docs_site.py", "--sources"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {p.name: p.read_text(encoding="utf-8") for p in (ROOT / "build/site-src").glob("*.md")}
    messages = pages["troubleshooting.md"]
    assert "- `--grid ⟨field⟩: ⟨value⟩ is in the list twice` exit 2" in messages.replace("⟨…⟩", "⟨value⟩")
    assert messages.count("exit 2") > 200 and messages.count("exit 3") > 30
    assert not any(re.search(r"\]\(\.\./", text) for text in pages.values())  # no link leaves the site by a path


def test_uv_gets_the_index_settings_of_pip(tmp_path):
    uv = tmp_path / "uv"
    named = "[os.environ.get(f'UV_{n}') for n in ('DEFAULT_INDEX', 'INDEX', 'FIND_LINKS')]"
    uv.write_text(f"#!{sys.executable}\nimport os, sys\nprint(*sys.argv[1:], *{named}, sep='\\n')\n")
    uv.chmod(0o755)
    (tmp_path / "pip.conf").write_text(
        "[global]\nindex-url = https://one.example/simple\nextra-index-url = https://u:t@two.example https://three.example\n"
        "[install]\nfind-links = /wheels /more\n"
    )
    settings = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PIP_CONFIG_FILE": str(tmp_path / "pip.conf")}
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/uv_install.py", "-c", "constraints.txt", "-e", "."],
        env=kept | settings | {"PIP_INDEX_URL": "https://mine.example/simple"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    *words, default, more, links = done.stdout.splitlines()
    assert {("-c", "constraints.txt"), ("--python", sys.executable),
            ("--index-strategy", "unsafe-best-match")} <= set(itertools.pairwise(words))  # fmt: skip
    assert (default, more) == ("https://mine.example/simple", "https://u:t@two.example https://three.example")
    assert links == "/wheels,/more" and not any("example" in word for word in words)  # ps shows the command line
