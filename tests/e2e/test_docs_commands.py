"""Every command block of the pages "Get started" and "Your data", run in a clone of this working tree."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
HOME = "https://github.com/OWNER/REPO"
DATA = ("yaml", "json", "mermaid")
ROWS = "".join(f'{{"prompt": "What is {n} and {n + 1}?", "completion": "It is {2 * n + 1}."}}\n' for n in range(120))


def blocks(page):
    """The commands of a page: its fenced blocks, but those in a language of data. A fence that is read otherwise by
    Markdown than here (indented, of tildes, not closed) is an error, for its block would not be run.
    """
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.findall(r"^```([^\n]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(re.findall(r"^[\s>]*(?:```|~~~)", text, re.MULTILINE)) == 2 * len(found), f"{page}: an odd fence"
    return [body for language, body in found if language not in DATA]


def published(folder):
    """A repository with the files of this working tree."""
    folder.mkdir()
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-coz", "--exclude-standard"], capture_output=True, check=True
    ).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    own = ["git", "-C", folder, "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "as it is"]):
        subprocess.run([*own, *words], check=True)
    return folder


def environment_of(clone):
    """What `make setup` makes, from this environment's packages: a .venv in the clone that counts as installed."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", clone / ".venv"], check=True)
    paths = [str(clone), *(p for p in sys.path if "site-packages" in p)]
    (site,) = (clone / ".venv").glob("lib/python*/site-packages")
    (site / "all.pth").write_text("\n".join(paths))
    command = clone / ".venv" / "bin" / "finetune"
    command.write_text(f"#!{clone}/.venv/bin/python\nfrom finetune.cli.main import main\nmain()\n")
    command.chmod(0o755)
    (clone / ".venv" / ".ready").touch()


def test_no_block_of_commands_is_left_out(tmp_path):
    assert blocks("index.md") and blocks("data.md")
    page = tmp_path / "page.md"
    page.write_text("```\none\n```\n\n```bash\ntwo\n```\n```yaml\na: 1\n```\n")
    assert blocks(page) == ["one\n", "two\n"]
    for odd in ("- a\n  ```\n  one\n  ```\n", "~~~\none\n~~~\n", "```\none\n"):
        page.write_text(odd)
        with pytest.raises(AssertionError, match="odd fence"):
            blocks(page)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_command_block_runs(tmp_path):
    """One shell, as a reader would use it; `set -e` after each block finds a command that fails in its middle."""
    published(tmp_path / "published")
    script = tmp_path / "commands.sh"
    helper = [f"import sys; sys.path.insert(0, {str(ROOT)!r})", "from pathlib import Path",
              "from tests.e2e.test_docs_commands import environment_of", "environment_of(Path.cwd())"]  # fmt: skip
    lines = ["set -euo pipefail", f"cd {tmp_path}"]
    for number, body in enumerate(blocks("index.md")):
        lines += [f"echo '== index.md, block {number}' >&2", body]
        if "git clone" in body:
            lines.append(f"{sys.executable} -c '{'; '.join(helper)}'".replace(f"{str(ROOT)!r}", f'"{ROOT}"'))
    lines.append(f"cp {tmp_path}/rows.jsonl .")
    lines += [f"echo '== data.md' >&2\n{body}" for body in blocks("data.md")]
    (tmp_path / "rows.jsonl").write_text(ROWS)
    script.write_text("\n".join(lines))
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("FINETUNE_")}  # the store is the clone's own
    settings = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.{tmp_path}/published.insteadOf",
                "GIT_CONFIG_VALUE_0": HOME, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    done = subprocess.run(
        ["bash", script], env={**inherited, **settings}, capture_output=True, text=True, check=False,
        stdin=subprocess.DEVNULL, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "verdict" in done.stdout and "--set=evaluate.generations=0 --set=train.learning_rate=" in done.stdout
    assert done.stdout.count("Thank you. We look at") >= 2  # rows as the model sees them
