"""The Colab notebook, executed from its first cell to its last in a real kernel; google.colab is not there."""

import json
import os
import re
import shutil
import subprocess
import sys

import nbformat
import psutil
import pytest

from tests.e2e import launches
from tests.e2e.conftest import ROOT, Workspace

NOTEBOOK = ROOT / "scripts" / "colab_launcher.ipynb"
EXECUTE = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
try:
    nbclient.NotebookClient(notebook, timeout=400, kernel_name="python3").execute()
finally:
    nbformat.write(notebook, sys.argv[2])
"""


def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def cell(name):
    return next(c for c in notebook().cells if c.id == name).source


def prepared(work, recipe="small.yaml"):
    """The notebook as a person would fill in its form."""
    book = notebook()
    settings = next(c for c in book.cells if c.id == "settings")
    settings.source = settings.source.replace('RECIPE = "mistral-guanaco"', f'RECIPE = "{recipe}"')
    settings.source = settings.source.replace('CHANGES = ""', 'CHANGES = "publish.what=[merged]"')
    assert settings.source.count("small.yaml") == 1 and "merged" in settings.source
    nbformat.write(book, work.folder / "mine.ipynb")
    return [sys.executable, "-c", EXECUTE, "mine.ipynb", "done.ipynb"]


def text_of(work):
    """Everything the executed notebook shows, as {cell id: text}."""
    book = nbformat.read(work.folder / "done.ipynb", as_version=4)
    return {c.id: "".join(json.dumps(o) for o in c.outputs) for c in book.cells if c.cell_type == "code"}


def test_it_is_valid_small_and_holds_no_output():
    book = notebook()
    nbformat.validate(book)
    assert book.nbformat == 4
    for c in book.cells:
        assert len(c.source.splitlines()) <= 50, c.id
        if c.cell_type == "code":
            assert c.outputs == [] and c.execution_count is None
            compile(c.source, c.id, "exec")


def test_every_recipe_on_its_list_is_one_of_ours():
    listed = json.loads(cell("settings").split("RECIPE = ")[1].split("# @param ")[1].split(" {allow")[0])
    assert set(listed) <= {p.stem for p in (ROOT / "recipes").glob("*.yaml")}


@pytest.mark.parametrize("versions", [{"torch": "2.9.1+cu126", "torchvision": "0.24.1+cu126", "numpy": "2.0.2"}, {}])
def test_the_install_keeps_the_torch_that_is_here(versions, tmp_path):
    """The cell in a Python that has only these packages; its pip and git write down what they are asked for."""
    site = tmp_path / "site"
    for name, version in versions.items():
        (site / f"{name}-{version}.dist-info").mkdir(parents=True)
        (site / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    (site / "pip").mkdir(parents=True)
    (site / "pip" / "__init__.py").touch()
    (site / "pip" / "__main__.py").write_text(
        "import sys, pathlib; pathlib.Path('asked').write_text(' '.join(sys.argv[1:]))"
    )
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "git").write_text('#!/bin/sh\necho "$@" > cloned\n')
    (tools / "git").chmod(0o755)
    subprocess.run(
        [sys.executable, "-S", "-c", f"REPO = 'https://example.org/x'\n{cell('install')}"], cwd=tmp_path, check=True,
        env={"PYTHONPATH": str(site), "PATH": f"{tools}:{os.environ['PATH']}"}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    assert (tmp_path / "asked").read_text() == "install -q -c keep.txt ./finetune-source"
    assert (tmp_path / "keep.txt").read_text().split() == [f"{n}=={v}" for n, v in versions.items()]
    assert "https://example.org/x" in (tmp_path / "cloned").read_text()


@pytest.mark.slow
def test_run_all_twice_with_a_kill_in_between(pristine, tmp_path):
    shutil.copytree(pristine.folder, tmp_path / "work")
    work = Workspace(tmp_path / "work")
    settings = {"HF_TOKEN": "hf_" + "x" * 30, "IPYTHONDIR": str(tmp_path / "ipython")}
    first = launches.begin(work, prepared(work), **settings)
    launches.wait_until(lambda: launches.complete(work), first)
    for process in psutil.Process(first.pid).children(recursive=True):  # the machine goes away
        process.kill()
    first.kill()
    first.communicate()
    launches.finish(work, prepared(work), **settings)
    said = text_of(work)
    assert "goes on from checkpoint-" in said["run"] and json.dumps("ingest …")[1:-1] not in said["run"]
    assert "found" in said["folders"] and "x" * 30 not in "".join(said.values())
    assert "image/svg+xml" in said["loss"] and "12 logged steps" in said["loss"]
    assert "t4" in said["machine"] and "iframe" in said["report"]
    assert "files" in said["publish"] and said["chat"] and "supervised" in said["inspect"]
    assert "u001b" not in said["run"]  # plain lines: no bars that a notebook cannot redraw
    assert work.show()["stages"]["merge"]["status"] == "done"


def test_what_is_kept_on_the_hub_needs_no_drive(tmp_path):
    before = (
        "import os, subprocess, sys\nfrom pathlib import Path\n"
        "CHANGES, TRACK_WITH_WANDB, KEEP_ON_DRIVE, KEEP_ON_HUB = '', False, True, 'me/runs'\n"
    )
    after = "\nassert os.environ['FINETUNE_MIRROR'] == 'me/runs'"
    done = subprocess.run(
        [sys.executable, "-c", before + cell("folders") + after], cwd=tmp_path, check=True, capture_output=True,
        text=True, env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert "datasets/me/runs, private" in done.stdout and f"{tmp_path}/artifacts" in done.stdout


def test_a_place_nobody_filled_in_is_said_before_anything_is_cloned(tmp_path):
    asked = subprocess.run(
        [sys.executable, "-S", "-c", f"REPO = 'https://github.com/OWNER/REPO'\n{cell('install')}"], cwd=tmp_path,
        env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "REPO must name the place" in asked.stderr and not list(tmp_path.iterdir())


def test_the_badges_and_the_form_name_one_place():
    text = NOTEBOOK.read_text(encoding="utf-8") + (ROOT / "README.md").read_text(encoding="utf-8")
    badges = set(re.findall(r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob/main/scripts/", text))
    (form,) = re.findall(r'^REPO = "https://github.com/(.+)"  # @param', cell("settings"), re.MULTILINE)
    assert badges == {form}


def test_on_colab_a_key_comes_from_its_secrets_and_is_never_shown(tmp_path):
    colab = tmp_path / "site" / "google" / "colab"
    colab.mkdir(parents=True)
    (colab / "drive.py").write_text("def mount(folder): print('mounted', folder)\n")
    (colab / "userdata.py").write_text(
        "class SecretNotFoundError(Exception): pass\nclass NotebookAccessError(Exception): pass\n"
        "def get(name):\n    if name == 'HF_TOKEN': return 'secret-value'\n    raise SecretNotFoundError(name)\n"
    )
    before = (
        "import os, subprocess, sys\nfrom pathlib import Path\n"
        "CHANGES, TRACK_WITH_WANDB, KEEP_ON_DRIVE, KEEP_ON_HUB = 'seed=1', True, True, ''\n"
    )
    after = "\nassert os.environ['HF_TOKEN'] == 'secret-value' and 'WANDB_API_KEY' not in os.environ\nprint(changes)"
    done = subprocess.run(
        [sys.executable, "-c", before + cell("folders") + after], cwd=tmp_path, check=True, capture_output=True,
        text=True, env={"PYTHONPATH": str(tmp_path / "site"), "PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert "HF_TOKEN  found" in done.stdout and "WANDB_API_KEY  none" in done.stdout
    assert "secret-value" not in done.stdout
    assert "mounted /content/drive" in done.stdout and "/content/drive/MyDrive/finetune/artifacts" in done.stdout
    assert f"{tmp_path}/scratch" in done.stdout  # the large things stay on the local disk
    assert "['--set=seed=1', '--set=tracking.wandb=true']" in done.stdout
