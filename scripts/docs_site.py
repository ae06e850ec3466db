"""Build the documentation site: docs/, the changelog and a page of the error messages, by Zensical in strict mode.

.venv/bin/python scripts/docs_site.py            # build/site
.venv/bin/python scripts/docs_site.py --sources  # only build/site-src, for `zensical serve`
"""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "build" / "site-src"
EXIT = {"InputError": 2, "GateRefused": 3}
OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)")  # a link from docs/ to a file of the repository
INSIDE = {"CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md"}  # pages that are not in docs/
HEAD = """\
# Troubleshooting by message

Search this page for some words of the message that you see. It lists every message with which a command refuses its
input (exit 2) or a check stops a run (exit 3), as it stands in the code; a value that depends on the case is shown as
`⟨name⟩`. A message says what was found, what is allowed and how to fix it. Errors of a recipe's fields come from their
types: see the [recipe reference](recipe-reference.md). Exit 1 means that a run failed; the same command continues it.
"""


def text_of(node: ast.expr) -> str:
    """Return a message's text with placeholders; empty if it is made elsewhere."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(map(text_of, parts))
        case ast.FormattedValue(value=ast.Name(id=name) | ast.Attribute(attr=name)):
            return f"⟨{name.strip('_')}⟩"
        case ast.FormattedValue():
            return "⟨…⟩"
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return text_of(left) + text_of(right)
        case _:
            return ""


def messages() -> Iterator[tuple[str, str, int]]:
    """Yield (module, text, exit status) of every InputError and GateRefused that is made with a text of its own."""
    for path in sorted((ROOT / "finetune").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in EXIT and node.args:
                text = " ".join(text_of(node.args[0]).split())
                if len(re.sub("⟨[^⟩]*⟩", "", text).split()) >= 2:  # else only handed on
                    yield path.relative_to(ROOT / "finetune").with_suffix("").as_posix(), text, EXIT[node.func.id]


def troubleshooting() -> str:
    """Return the page of all messages, by module."""
    found: dict[str, set[tuple[str, int]]] = defaultdict(set)
    for module, text, status in messages():
        found[module].add((text, status))
    lines = [HEAD]
    for module, of_module in found.items():
        lines.append(f"## {module}\n")
        for text, status in sorted(of_module):
            code = f"`` {text} ``" if "`" in text else f"`{text}`"
            lines.append(f"- {code} exit {status}")
        lines.append("")
    return "\n".join(lines)


def prepare(repository: str) -> None:
    """Write the site's sources: links that leave docs/ lead to the repository."""
    shutil.rmtree(SOURCES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", SOURCES)
    for name, page in INSIDE.items():
        text = re.sub(r"\]\((?!https?://|#)(?:docs/)?([^)\s]+)", r"](\1", (ROOT / name).read_text(encoding="utf-8"))
        (SOURCES / page).write_text(text, encoding="utf-8")
    (SOURCES / "troubleshooting.md").write_text(troubleshooting(), encoding="utf-8")
    for path in SOURCES.glob("*.md"):
        text = path.read_text(encoding="utf-8")
        text = OUTSIDE.sub(lambda m: f"]({INSIDE.get(m[1]) or f'{repository}/blob/main/{m[1]}'}", text)
        path.write_text(text, encoding="utf-8")


def pages_of(nav: list[dict[str, str | list[dict[str, str]]]]) -> Iterator[str]:
    """Yield the page of every entry of the navigation."""
    for entry in nav:
        for target in entry.values():
            if isinstance(target, str):
                yield target
            else:
                yield from pages_of(target)  # type: ignore[arg-type]


def main() -> int:
    """Build; return Zensical's status, or 1 if the navigation and the pages differ."""
    project = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
    prepare(project["repo_url"])
    named, there = set(pages_of(project["nav"])), {p.name for p in SOURCES.glob("*.md")}
    if named != there:
        print(f"zensical.toml: nav names no page {sorted(named - there)}, leaves out {sorted(there - named)}")
        return 1
    if "--sources" in sys.argv:
        return 0
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
