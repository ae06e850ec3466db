"""`finetune validate` and completion, as processes: results, exit status, and which libraries they import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.recipe.test_load import GOOD

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "numpy", "pyarrow", "rich", "jinja2", "huggingface_hub"}


def run(arguments, **environment):
    code = (
        "import sys; sys.argv[0] = 'finetune'; from finetune.cli.main import main\n"
        "try: main()\nfinally: print('loaded', *sorted(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False,
        cwd=ROOT, env={**os.environ, **environment},
    )  # fmt: skip
    out, _, loaded = done.stdout.rpartition("loaded ")
    return done, out, {name.partition(".")[0] for name in loaded.split()}


def test_validate_loads_nothing_heavy(tmp_path):
    (tmp_path / "mine.yaml").write_text(GOOD)
    done, out, loaded = run(["validate", "tiny-pydoc", "zephyr-7b-qlora", str(tmp_path / "mine.yaml")])
    assert (done.returncode, out.count("fine")) == (0, 3)
    assert loaded & HEAVY == set()


def test_validate_exits_2_without_a_traceback(tmp_path):
    (tmp_path / "bad.yaml").write_text("modle: x\n")
    (tmp_path / "gone.yaml").write_text(GOOD + "  - {source: local, path: gone.jsonl}\n")
    done, out, loaded = run(["validate", str(tmp_path / "bad.yaml"), str(tmp_path / "gone.yaml"), "tiny-pydoc"])
    assert done.returncode == 2 and "fine (tiny-pydoc)" in out and "Traceback" not in done.stderr
    said = " ".join(done.stderr.split())
    assert "bad.yaml:1: modle: unknown field; did you mean model?" in said
    assert "gone.yaml:6: data.1.path: no such file" in said
    assert loaded & (HEAVY - {"rich"}) == set()  # errors are printed in colour


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("finetune validate tiny", ["tiny-evol", "tiny-preference", "tiny-pydoc"]),
        ("finetune run mistral", ["mistral-guanaco", "mistral-platypus"]),
        ("finetune validate tiny-pydoc zep", ["zephyr-7b-dpo", "zephyr-7b-qlora"]),
        ("finetune show llama", ["llama2-alpaca"]),
        ("finetune plan ./recipes/", []),  # a path: the shell's own
        ("finetune vali", ["validate"]),
    ],
)
def test_the_shell_completes_recipes_and_loads_nothing_heavy(words, expected):
    done, out, loaded = run(
        [], _MAIN_COMPLETE="complete_bash", _FINETUNE_COMPLETE="complete_bash", _C_COMPLETE="complete_bash",
        COMP_WORDS=words, COMP_CWORD=str(len(words.split()) - 1),
    )  # fmt: skip
    assert out.split() == expected, done.stderr
    assert loaded & (HEAVY | {"yaml"}) == set()


def test_completion_installs_itself_for_bash(tmp_path):
    # typer asks which shell called it, and in CI none may have
    done, *_ = run(
        ["--install-completion", "bash"], HOME=str(tmp_path), _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1"
    )
    assert done.returncode == 0, done.stderr
    script = (tmp_path / ".bash_completions" / "finetune.sh").read_text()
    assert "_FINETUNE_COMPLETE=complete_bash" in script and "complete " in script
    assert str(tmp_path / ".bash_completions" / "finetune.sh") in (tmp_path / ".bashrc").read_text()


TICKETS = """\
schema: 1
name: tickets
model: builtin:tiny-mistral
data:
  - source: local
    path: tickets.csv
    format: prompt_completion
    columns: {prompt: question, completion: answer}
filter: {keep_where: ["rating>=3"]}
"""


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("prompt: question", "prompt: qestion", "tickets.yaml:5: data.0: data source tickets.csv: "),
        ("rating>=3", "ratings>=3", "tickets.yaml:9: filter.keep_where.0: ratings>=3: no row among the first 1,000 has "
         "a column 'ratings'; did you mean rating?"),
        ("rating>=3", "channel==mail", "other columns there: rating"),
        ("", "", None),
    ],
)  # fmt: skip
def test_validate_opens_the_file_and_checks_columns(old, new, words, tmp_path):
    (tmp_path / "tickets.csv").write_text("question;answer;rating\nHow much is it?;Two euros a piece.;4\n")
    (tmp_path / "tickets.yaml").write_text(TICKETS.replace(old, new) if old else TICKETS)
    done, _, loaded = run(["validate", str(tmp_path / "tickets.yaml")])
    said = " ".join(done.stderr.split())
    assert (done.returncode, "Traceback" in said) == (0 if words is None else 2, False), said
    assert words is None or words in said
    assert not loaded & {"torch", "transformers", "peft", "trl", "datasets"}
