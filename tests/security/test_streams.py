"""stdin, stdout and stderr that are closed, full or of a small alphabet: the work goes on, and its status is told."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.report.made_run import MadeRun
from tests.security.conftest import roots

RECIPE = "schema: 1\nname: r\nmodel: builtin:tiny-mistral\ndata: [{source: pydoc}]\n"
SHOW_BYTES = 1000  # at least, of the table
CLOSED = {"stdin": "<&-", "stdout": ">&-", "stderr": "2>&-", "all": "<&- >&- 2>&-", "stdin, stdout": "<&- >&-"}


def run(words: list[str], redirect: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[bytes]:
    """`finetune WORDS REDIRECT` in a shell of its own."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(cwd / "cache"), **more}
    command = ["sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable, "-P", "-m", "finetune", *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, check=False, timeout=60)


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[str], str]:
    """The path of a recipe with a name of its own."""

    def write(extra: str = "") -> str:
        (tmp_path / "r.yaml").write_text(RECIPE + extra)
        return str(tmp_path / "r.yaml")

    return write


@pytest.mark.parametrize("what", sorted(CLOSED))
def test_closed_descriptors(what: str, made: MadeRun, recipe: Callable[[str], str], tmp_path: Path) -> None:
    ended = run(["show", "made", *roots(made)], CLOSED[what], tmp_path)
    assert ended.returncode == 0 and b"Traceback" not in ended.stderr
    assert len(ended.stdout) > SHOW_BYTES or "stdout" in what or what == "all"
    ended = run(["validate", recipe("x: 1\n")], CLOSED[what], tmp_path)
    assert ended.returncode == 2 and b"Traceback" not in ended.stderr


def test_what_is_written_goes_into_no_file_that_took_a_closed_descriptor(made: MadeRun, tmp_path: Path) -> None:
    """Without the null device in their place, the first file that a command opens is stdout."""
    ended = run(["report", "made", *roots(made)], "<&- >&- 2>&-", tmp_path)
    assert ended.returncode == 0
    for path in made.store.artifacts.rglob("*"):
        assert not path.is_file() or not path.read_bytes().startswith(str(made.store.artifacts).encode())


@pytest.mark.parametrize("redirect", [">/dev/full", "2>/dev/full", ">/dev/full 2>&1"])
def test_a_full_disk_under_the_output(
    redirect: str, made: MadeRun, recipe: Callable[[str], str], tmp_path: Path
) -> None:
    ended = run(["show", "made", *roots(made)], redirect, tmp_path)
    assert ended.returncode == 0 and b"Traceback" not in ended.stderr and b"Exception" not in ended.stderr
    if redirect == ">/dev/full":
        assert ended.stderr == b"stdout: output is lost: No space left on device\n"
    ended = run(["validate", recipe("x: 1\n")], redirect, tmp_path)
    assert ended.returncode == 2 and b"Traceback" not in ended.stderr


def test_a_reader_that_leaves(made: MadeRun, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "finetune", "show", "made", *roots(made)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(60) == 0 and process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_small_alphabet_gets_escapes(encoding: str, made: MadeRun, tmp_path: Path) -> None:
    made.note("train", "failed", message="日本 \ud800 é")
    made.save()
    settings = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "LC_ALL": "C"}
    ended = run(["show", "made", *roots(made)], "", tmp_path, **settings)
    assert ended.returncode == 0 and b"Traceback" not in ended.stderr
    text = ended.stdout.decode(encoding)
    assert ("\\u65e5\\u672c" in text) == (encoding != "utf-8") and ("日本" in text) == (encoding == "utf-8")
    ended = run(["show", "made", "--json", *roots(made)], "", tmp_path, **settings)
    assert ended.returncode == 0 and "\\ud800" in ended.stdout.decode(encoding)


def test_in_a_notebook_or_under_a_test_the_streams_stay(capsys: pytest.CaptureFixture[str]) -> None:
    from finetune.utils.streams import steady

    before = sys.stdin, sys.stdout, sys.stderr
    steady()
    assert (sys.stdin, sys.stdout, sys.stderr) == before


def test_a_pipe_that_is_full_is_waited_for(tmp_path: Path) -> None:
    code = (
        "import os, sys, threading, time\nfrom finetune.utils.streams import Steady\nread, write = os.pipe()\n"
        "os.set_blocking(write, False)\nsteady = Steady(write)\ngot = []\n"
        "def drain():\n    time.sleep(0.3)\n    while sum(map(len, got)) < 300000: got.append(os.read(read, 65536))\n"
        "t = threading.Thread(target=drain); t.start()\n"
        "assert steady.write(b'x' * 300000) == 300000 and steady.lost is None\nt.join(); print('all')"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False, timeout=30)
    assert done.stdout == "all\n", done.stderr
