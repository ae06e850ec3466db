"""The notebook, executed from its first cell to its last in a real kernel; what Colab and Kaggle add is made up."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import venv
import zipfile

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
SECRET = "hf_" + "s" * 30
ON_KAGGLE = {"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}


def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def cell(name):
    return next(c for c in notebook().cells if c.id == name).source


def prepared(work, changes="publish.what=[merged]", last="publish"):
    """The notebook as a person would fill in its form, as far as the cell `last`."""
    book = notebook()
    settings = next(c for c in book.cells if c.id == "settings")
    settings.source = settings.source.replace('RECIPE = "qwen2.5-7b-chat"', 'RECIPE = "small.yaml"')
    settings.source = settings.source.replace("MAX_LENGTH_TOKENS = 1024", "MAX_LENGTH_TOKENS = 0")
    settings.source = settings.source.replace('CHANGES = ""', f'CHANGES = "{changes}"')
    assert settings.source.count("small.yaml") == 1 and changes in settings.source
    book.cells = book.cells[: [c.id for c in book.cells].index(last) + 1]
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


def test_its_recipes_are_ours_and_the_badges_and_the_form_name_one_place():
    listed = json.loads(cell("settings").split("RECIPE = ")[1].split("# @param ")[1].split(" {allow")[0])
    assert set(listed) <= {p.stem for p in (ROOT / "recipes").glob("*.yaml")}
    text = NOTEBOOK.read_text(encoding="utf-8") + (ROOT / "README.md").read_text(encoding="utf-8")
    badges = set(re.findall(r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob/main/scripts/", text))
    assert badges == set(re.findall(r'^REPO = "https://github.com/(.+)"  # @param', cell("settings"), re.MULTILINE))


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


@pytest.fixture(scope="module")
def new_python(tmp_path_factory):
    """The Python of an environment that holds pip alone."""
    folder = tmp_path_factory.mktemp("environment")
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--retries=0", "--timeout=20", "hatchling"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if asked.returncode:
        pytest.skip(f"no package index answers: {asked.stderr.strip().splitlines()[-1]}")
    venv.create(folder / "env", with_pip=True)
    return folder / "env" / "bin" / "python"


def install_torch(python, folder, version):
    """Put `version` of a torch there: a wheel of one module, of which pip knows what it knows of the real one."""
    wheel, facts = folder / f"torch-{version}-py3-none-any.whl", f"torch-{version}.dist-info"
    kind = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("torch/__init__.py", f"__version__ = {version!r}\n")
        file.writestr(f"{facts}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        file.writestr(f"{facts}/WHEEL", kind)
        file.writestr(f"{facts}/RECORD", "")
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-index", wheel], check=True)


DRY = """
import subprocess
def really(command, run=subprocess.run):  # what pip finds out is the point, not a gigabyte on the disk
    return run([*command, "--dry-run", "--report", "report.json"])
subprocess.run = really
REPO = ""
"""


@pytest.mark.slow
@pytest.mark.parametrize(("version", "fits"), [("2.9.0+cu128", True), ("2.5.1+cu121", False)])
def test_pip_itself_keeps_another_torch_and_refuses_rather_than_replace_one_too_old(
    version, fits, new_python, tmp_path
):
    """The cell as it is, with a real pip that asks its index for all the rest."""
    assert f"torch=={version.partition('+')[0]}" not in (ROOT / "constraints.txt").read_text()
    install_torch(new_python, tmp_path, version)
    (tmp_path / "finetune-source").symlink_to(ROOT)
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # finetune is not there yet
    done = subprocess.run(
        [new_python, "-c", DRY + cell("install")], cwd=tmp_path, env=bare, capture_output=True, text=True, check=False
    )
    assert (tmp_path / "keep.txt").read_text() == f"torch=={version}", done.stderr
    if fits:
        assert done.returncode == 0, done.stderr
        names = {i["metadata"]["name"].lower() for i in json.loads((tmp_path / "report.json").read_text())["install"]}
        assert {"finetune-recipes", "transformers", "bitsandbytes"} <= names and "torch" not in names
    else:
        assert f"cannot install it beside torch=={version}" in done.stderr and "take a newer runtime" in done.stderr
    found = subprocess.run([new_python, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True)
    assert found.stdout.strip() == version


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


@pytest.mark.slow
def test_on_kaggle_the_stop_button_saves_and_the_cells_below_show_what_there_is(pristine, tmp_path):
    shutil.copytree(pristine.folder, tmp_path / "work")
    work = Workspace(tmp_path / "work")
    command = prepared(work, "train.max_steps=2000 runtime.save_steps=1000", last="inspect")
    book = work.folder / "mine.ipynb"
    book.write_text(book.read_text().replace("/kaggle/working", str(work.folder)).replace("/tmp/scratch", "scratch"))
    site = os.pathsep.join([str(kaggle_site(tmp_path)), str(ROOT)])
    settings = {**ON_KAGGLE, "PYTHONPATH": site, "IPYTHONDIR": str(tmp_path / "ipython")}
    process = launches.begin(work, command, **settings)
    launches.wait_until(lambda: launches.steps_taken(work) > 2, process)
    (kernel,) = [c.pid for c in psutil.Process(process.pid).children() if "ipykernel_launcher" in c.cmdline()]
    os.killpg(os.getpgid(kernel), signal.SIGINT)  # as Jupyter's button does: to the kernel and to what it has started
    (text,) = launches.outputs([process])
    said = text_of(work)
    assert process.returncode == 0, text
    assert "stopped by signal 2" in said["run"] and "stopped; run this cell again to go on" in said["run"]
    assert launches.complete(work) and work.show()["stages"]["train"]["status"] == "partial"
    assert "image/svg+xml" in said["loss"] and "iframe" in said["report"] and "supervised" in said["inspect"]
    assert "HF_TOKEN  found" in said["folders"] and SECRET not in "".join(said.values())
    assert f"{work.folder}/artifacts" in said["folders"]


def kaggle_site(tmp_path):
    """A folder with the modules that are on Kaggle, google.colab among them, which must not be asked there."""
    colab = tmp_path / "site" / "google" / "colab"
    colab.mkdir(parents=True)
    for name in ("drive", "userdata"):
        (colab / f"{name}.py").write_text("raise AssertionError('Kaggle is no Colab')\n")
    (tmp_path / "site" / "kaggle_secrets.py").write_text(
        "class BackendError(Exception): pass\n"
        "class UserSecretsClient:\n"
        "    def get_secret(self, label):\n"
        f"        if label == 'HF_TOKEN': return '{SECRET}'\n"
        "        raise BackendError('no user secrets exist for kernel id 1 and label ' + label)\n"
    )
    return tmp_path / "site"


def folders_cell(tmp_path, settings, after, **environment):
    """What the folders cell prints when the form says `settings`, and `after` holds behind it."""
    names = "CHANGES, TRACK_WITH_WANDB, KEEP_ON_DRIVE, KEEP_ON_HUB"
    before = f"import os, subprocess, sys\nfrom pathlib import Path\n{names} = {settings!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{before}{cell('folders')}\n{after}"], cwd=tmp_path, check=True, capture_output=True,
        text=True, env={"PATH": os.environ["PATH"], **environment},
    )  # fmt: skip
    return done.stdout


@pytest.fixture
def helper(tmp_path):
    """Starts the notebook's `finetune()` on a program that stands in for the package."""
    source = cell("machine").partition("if shutil.which")[0]

    def start(program):
        (tmp_path / "finetune").mkdir()
        (tmp_path / "finetune" / "__init__.py").touch()
        (tmp_path / "finetune" / "__main__.py").write_text(program)
        return subprocess.Popen(
            [sys.executable, "-c", f"import os, subprocess, sys\n{source}\nfinetune('run')\nprint('the next cell')"],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)},
        )  # fmt: skip

    return start


def test_half_a_line_is_shown_while_the_rest_is_awaited(helper, tmp_path):
    process = helper(
        "import pathlib, time\nprint('half a', end='', flush=True)\n"
        "while not pathlib.Path('seen').exists(): time.sleep(0.01)\nprint(' line é')"
    )
    assert process.stdout.read(6) == "half a"
    (tmp_path / "seen").touch()
    assert process.communicate(timeout=60)[0] == " line é\nthe next cell\n"


SAVES = """
import signal, sys, time
stop = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: stop.append(128 + number))
print("training", flush=True)
while not stop:
    time.sleep(0.01)
time.sleep(0.2)
print("saved", flush=True)
sys.exit(STATUS)
"""


@pytest.mark.parametrize(
    ("status", "said", "error"),
    [
        ("stop[0]", "stopped; run this cell again to go on\nthe next cell\n", ""),
        ("1", "saved\n", "RuntimeError: finetune run ended with status 1"),
    ],
)
@pytest.mark.parametrize("group", [True, False], ids=["the kernel and its children", "the kernel alone"])
def test_the_stop_button_is_no_error_but_a_failure_while_saving_is(status, said, error, group, helper):
    process = helper(SAVES.replace("STATUS", status))
    assert process.stdout.readline() == "training\n"
    (os.killpg if group else os.kill)(process.pid, signal.SIGINT)
    shown, trouble = process.communicate(timeout=60)
    assert shown.endswith(said) and error in trouble
    assert bool(process.returncode) == bool(error)


def test_on_kaggle_keys_are_its_secrets_and_google_colab_is_not_asked(tmp_path):
    after = f"assert os.environ['HF_TOKEN'] == '{SECRET}' and 'WANDB_API_KEY' not in os.environ"
    site = str(kaggle_site(tmp_path))
    said = folders_cell(tmp_path, ("", False, True, ""), after, PYTHONPATH=site, **ON_KAGGLE)
    assert "HF_TOKEN  found" in said and "WANDB_API_KEY  none (Add-ons → Secrets)" in said and SECRET not in said
    assert " /kaggle/working/artifacts\n" in said and " /tmp/scratch\n" in said and "unless Persistence is on" in said
    after = "assert os.environ['FINETUNE_MIRROR'] == 'me/runs'"
    kept = folders_cell(tmp_path, ("", False, True, "me/runs"), after, PYTHONPATH=site, **ON_KAGGLE)
    assert "Persistence" not in kept and "datasets/me/runs, private" in kept


def test_a_place_nobody_filled_in_is_said_before_anything_is_cloned(tmp_path):
    asked = subprocess.run(
        [sys.executable, "-S", "-c", f"REPO = 'https://github.com/OWNER/REPO'\n{cell('install')}"], cwd=tmp_path,
        env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "REPO must name the place" in asked.stderr and not list(tmp_path.iterdir())


def test_on_colab_a_key_comes_from_its_secrets_and_is_never_shown(tmp_path):
    colab = tmp_path / "site" / "google" / "colab"
    colab.mkdir(parents=True)
    (colab / "drive.py").write_text("def mount(folder): print('mounted', folder)\n")
    (colab / "userdata.py").write_text(
        "class SecretNotFoundError(Exception): pass\nclass NotebookAccessError(Exception): pass\n"
        "def get(name):\n    if name == 'HF_TOKEN': return 'secret-value'\n    raise SecretNotFoundError(name)\n"
    )
    after = "assert os.environ['HF_TOKEN'] == 'secret-value' and 'WANDB_API_KEY' not in os.environ\nprint(changes)"
    said = folders_cell(tmp_path, ("seed=1", True, True, ""), after, PYTHONPATH=str(tmp_path / "site"))
    assert "HF_TOKEN  found" in said and "WANDB_API_KEY  none" in said and "secret-value" not in said
    assert "mounted /content/drive" in said and "/content/drive/MyDrive/finetune/artifacts" in said
    assert f"{tmp_path}/scratch" in said  # the large things stay on the local disk
    assert "['--set=seed=1', '--set=tracking.wandb=true']" in said


def data_cell(tmp_path, data="rows.csv", **form):
    """What the data cell does with this form; the program that stands in for the package prints its arguments."""
    (tmp_path / "finetune").mkdir(exist_ok=True)
    (tmp_path / "finetune" / "__init__.py").touch()
    (tmp_path / "finetune" / "__main__.py").write_text(
        "import sys; print(sys.argv[1:]); sys.exit('the columns are a, b' if 'bad.csv' in sys.argv else 0)"
    )
    empty = dict.fromkeys(("EVAL_DATA", "QUESTION", "ANSWER", "SYSTEM", "KEEP"), "")
    fields = {"DATA": data, **empty, "BASE": "me/base", "GPU": "t4", "MAX_LENGTH_TOKENS": 512, "RECIPE": "tiny-pydoc"}
    fields |= form
    before = "\n".join(f"{name} = {value!r}" for name, value in fields.items())
    return subprocess.run(
        [sys.executable, "-c", f"import subprocess, sys\nchanges = []\n{before}\n{cell('data')}\nprint(changes)"],
        cwd=tmp_path, capture_output=True, text=True, env={"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)},
        check=False,
    )  # fmt: skip


def test_the_data_cell_makes_a_recipe_of_a_file_by_form_fields(tmp_path):
    done = data_cell(tmp_path, QUESTION="asked", ANSWER="said", KEEP="rating>=4")
    assert "'--question', 'asked', '--answer', 'said', '--keep', 'rating>=4'" in done.stdout
    assert "recipe  mine.yaml" in done.stdout and "['--set=render.max_length_tokens=512']" in done.stdout
    assert "'--eval-data', 'held'" in data_cell(tmp_path, EVAL_DATA="held").stdout
    assert "recipe  tiny-pydoc" in data_cell(tmp_path, data="").stdout
    assert "the columns are a, b" in data_cell(tmp_path, data="bad.csv").stderr
    assert "only Colab uploads here" in data_cell(tmp_path, data="upload").stderr


def test_a_wheel_beside_the_notebook_is_installed_in_place_of_a_repository(tmp_path):
    (tmp_path / "finetune_recipes-1.0-py3-none-any.whl").touch()
    fake = (
        "import subprocess\ndef run(command, **more):\n    print(command)\n    raise SystemExit\nsubprocess.run = run\n"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"{fake}REPO = 'https://github.com/OWNER/REPO'\n{cell('install')}"], cwd=tmp_path,
        env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "finetune_recipes-1.0-py3-none-any.whl" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("stage", "figures", "claim"),
    [
        ("evaluate", {}, ""),
        ("evaluate", {"perplexity_adapter": 80.0}, "did not fall"),
        ("evaluate", {"stop_rate": 0.0}, "no answer ends"),
        ("merge", None, "no certified merged model"),
    ],
)
def test_the_last_cell_asserts_what_the_notebook_claims(stage, figures, claim):
    stages = {
        "evaluate": {"metrics": {"perplexity_base": 74.0, "perplexity_adapter": 26.0, "stop_rate": 0.8}},
        "certify": {"metrics": {"agreement": 0.998}},
        "merge": {"status": "done"},
    }
    if figures is None:
        stages["merge"]["status"] = "missing"
    else:
        stages[stage]["metrics"] |= figures
    said = []
    shown = json.dumps({"stages": stages})
    here = {"json": json, "RECIPE": "x", "finetune": lambda *a, **k: shown, "print": said.append}
    if claim:
        with pytest.raises(AssertionError, match=claim):
            exec(cell("check"), here)
    else:
        exec(cell("check"), here)
        assert "74 → 26" in said[0] and "99.8%" in said[1]
