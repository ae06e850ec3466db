"""The Dockerfile against the checkout it copies from: it cannot be built where the tests run."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LINES = [line for line in TEXT.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]


def instructions(name):
    return [line.split(maxsplit=1)[1] for line in LINES if line.split()[0] == name]


def test_what_it_copies_is_there_and_reaches_the_engine():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [path for line in instructions("COPY") for path in line.split()[:-1]]
    assert set(copied) == allowed
    for path in copied:
        assert (ROOT / path).exists(), path


def test_its_python_is_one_that_the_package_takes():
    (image,) = instructions("FROM")
    found = tuple(map(int, re.fullmatch(r"python:(\d+)\.(\d+)-slim", image).groups()))
    least = tuple(map(int, re.fullmatch(r">=(\d+)\.(\d+)", PROJECT["project"]["requires-python"]).groups()))
    assert found >= least


def test_every_install_is_held_to_the_tested_set_and_its_extras_exist_and_are_pinned():
    installs = re.findall(r"pip install[^&]*", "\n".join(instructions("RUN")))
    assert installs and all("--constraint constraints.txt" in one for one in installs)
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").open()}
    for extra in re.search(r"\.\[([\w,]+)\]", TEXT)[1].split(","):
        for need in PROJECT["project"]["optional-dependencies"][extra]:
            assert re.match(r"[\w-]+", need)[0].lower() in pinned, need


def test_it_runs_as_nobody_in_particular_and_holds_no_secret():
    assert instructions("USER") == ["1000"]
    assert instructions("ENTRYPOINT") == ['["finetune"]'] and "finetune" in PROJECT["project"]["scripts"]
    assert not [line for line in LINES if re.search(r"token|secret|password|^ARG", line, re.IGNORECASE)]
