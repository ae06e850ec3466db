"""Names that a person, a script or a shared recipe gives: too long, leading elsewhere, full of escapes, too many."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.report.made_run import MadeRun
from tests.security.conftest import Command, roots

UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
ESCAPES = "\x1b[31m\x07\x9b2J[/INST]"
RECIPE = "schema: 1\nname: {}\nmodel: builtin:tiny-mistral\ndata: [{{source: local, path: rows.jsonl}}]\n"
NAMES = (
    "../../x",
    "made@../../x",
    "@",
    "a@b@c",
    ESCAPES,
    f"made@{ESCAPES}",
    "x" * 5000,
    f"made@{'x' * 5000}",
    ".",
    "/",
)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe with rows beside it."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "r.yaml").write_text(RECIPE.format("r"))
    return tmp_path / "r.yaml"


@pytest.mark.parametrize("command", ["show", "report", "rm", "publish"])
def test_a_name_that_is_none_is_one_sentence(command: str, made: MadeRun, finetune: Command) -> None:
    for name in NAMES:
        ended = finetune(command, name, *roots(made))
        assert ended.status == 2 and "Traceback" not in ended.err, (name, ended)
        assert not UNSEEN.search(ended.out + ended.err) and len(ended.err) < 6500


@pytest.mark.parametrize("words", [("clean", "--yes"), ("runs",), ("show", "made"), ("report", "made")])
def test_an_artifacts_folder_of_any_name_is_one_sentence(
    words: tuple[str, ...], finetune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("/dev/null", ESCAPES, "x" * 5000, "../" * 2000, "/proc/self/mem"):
        ended = finetune(*words, "--artifacts", name)
        assert ended.status in (0, 2) and "Traceback" not in ended.err
        assert not UNSEEN.search(ended.out + ended.err)


@pytest.mark.parametrize(
    "name", ["../../x", "/etc", "..", "a/b", "x" * 300, "-rf", "\\e[31m", "a\\0b", "\\u202egnp", "\\ud83d", "~", ""]
)
def test_a_recipes_name_is_no_path(name: str, recipe: Path, finetune: Command) -> None:
    recipe.write_text(RECIPE.format(f'"{name}"'))
    ended = finetune("validate", recipe, status=2)
    assert not UNSEEN.search(ended.err) and len(ended.err) < 2000


@pytest.mark.parametrize(
    "option",
    ["a.b.c.d" * 2000 + "=1", f"{'k' * 90_000}=1", "=1", ".=1", f"model={ESCAPES}", "seed=" + "9" * 4000,
     "train.learning_rate=.nan", "dedup.threshold=.nan", "lora.r=" + "9" * 25,
     f"publish.repo={ESCAPES}/x", "lora.start_from=r@../../x", "model={id: a/b, revision: ../../x}",
     f'data.0.columns={{"{"x" * 5000}": 3}}', "render.template=/dev/zero", "tracking.wandb_project=../../x",
     'tracking.wandb_project="\\e[31m"', 'export.gguf=["../../x"]'],
    ids=lambda o: o[:20],
)  # fmt: skip
def test_a_hostile_set_is_one_short_sentence(option: str, recipe: Path, finetune: Command) -> None:
    ended = finetune("validate", recipe, "--set", option, status=2)
    assert "Traceback" not in ended.err and not UNSEEN.search(ended.err) and len(ended.err) < 6000


def test_a_key_of_90_kB_is_clipped(recipe: Path, finetune: Command) -> None:
    recipe.write_text(f"{recipe.read_text()}? {'k' * 90_000}\n: 1\n")
    assert len(finetune("validate", recipe, status=2).err) < 6000


def test_far_too_many_processes_are_refused_before_one_is_started(
    recipe: Path, finetune: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*words: object, **more: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    for count in ("129", "9" * 30):
        assert "--processes" in finetune("run", recipe, "--processes", count, status=2).err


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/stdin", "/proc/self/mem", "/etc"])
def test_a_configuration_to_translate_that_is_no_file_is_not_read(path: str, finetune: Command) -> None:
    ended = finetune("init", "--from", path, status=2)
    assert path in ended.err and "Traceback" not in ended.err


def test_notes_show_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    from finetune.cli.options import note

    note(ESCAPES)
    assert not UNSEEN.search(capsys.readouterr().err)
