"""Text from rows, file names, recipes and records is data: no escape of it reaches a terminal, no markup counts."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest

from finetune.errors import FinetuneError, InputError
from finetune.utils import console
from finetune.utils.format import json_text
from finetune.utils.limits import reading
from finetune.utils.streams import print_text
from tests.report.made_run import RUN, MadeRun, made_run
from tests.security.conftest import Command, roots

HOSTILE = "a\x1b[31mred\x1b]0;title\x07\x9b2J\x7f\u202egnp[/INST] [bold]x[/bold] [/] \\[y] :smile:"
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def steered(text: str) -> str:
    """`text` without what rich itself writes on a terminal: colours, and the moves of a live bar."""
    return re.sub(r"\x1b\[([0-9;]*m|\?25[lh]|[0-9]*[AK]|2K|1A)|\r", "", text)


@pytest.mark.parametrize("terminal", [False, True])
def test_lines_bars_errors_and_tables_show_hostile_text(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    streams = {name: io.StringIO() for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
        monkeypatch.setattr(sys, name, stream)
    monkeypatch.setattr(console, "PLAIN_SECONDS", 0.0)
    screen = console.Screen()
    screen._console = console.Quiet(file=streams["stderr"], force_terminal=terminal, soft_wrap=True, width=400)
    screen.say(HOSTILE)
    bar = screen.bar(HOSTILE, 3)
    bar.advance(1, HOSTILE)
    bar.close()
    console.print_error(HOSTILE)
    console.print_table(HOSTILE, [HOSTILE, "x"], [[HOSTILE, HOSTILE]])
    print_text(HOSTILE)
    shown = {name: steered(stream.getvalue()) for name, stream in streams.items()}
    assert not UNSEEN.search(shown["stdout"]) and not UNSEEN.search(shown["stderr"])
    assert "␛[31mred␛]0;title" in shown["stderr"]
    assert "[/INST]" in shown["stderr"] and "[bold]" in shown["stdout"] and ":smile:" in shown["stdout"]


@pytest.mark.parametrize("place", ["message", "column", "reason", "sets"])
def test_show_and_report_of_hostile_records_show_it(place: str, tmp_path: Path, finetune: Command) -> None:
    run = made_run(tmp_path, text=HOSTILE, label=HOSTILE) if place == "column" else made_run(tmp_path)
    if place == "message":
        run.note("train", "failed", message=HOSTILE)
    if place == "reason":
        run.stages["filter"] |= {"status": "done", "metrics": {"rejected": {HOSTILE: 3}, "rows_in": 5, "rows_out": 2}}
    run.save(sets=[f"a={HOSTILE}"] if place == "sets" else ())
    text = finetune("show", "made", *roots(run), status=0).out
    assert not UNSEEN.search(text)
    if place in ("message", "reason"):
        assert "␛" in text
    structured = finetune("show", "made", "--json", *roots(run), status=0).out
    assert not UNSEEN.search(structured) and json.loads(structured)["stages"]
    finetune("report", "made", *roots(run), status=0)
    page = (run.store.artifacts / "runs/made" / RUN / "report.html").read_text(encoding="utf-8")
    assert not UNSEEN.search(page)


def test_show_of_two_runs_with_hostile_recipes_shows_both(made: MadeRun, finetune: Command) -> None:
    import shutil

    folder = made.store.artifacts / "runs" / "made" / RUN
    other = shutil.copytree(folder, folder.with_name("20270101T000000Z-76543210"))
    recipe = (other / "recipe.yaml").read_text() + 'split: {eval_rows: "\\e[31m[/INST]"}\n'
    (other / "recipe.yaml").write_text(recipe)
    ended = finetune("show", f"made@{RUN}", f"made@{other.name}", *roots(made), status=0)
    assert not UNSEEN.search(ended.out + ended.err)


@pytest.mark.parametrize(
    "yaml",
    ['"\\e[31m[/INST]": 3', 'model: "\\e]0;x\\a[/INST]"', 'lora: {"\\e[2J": 1, r: "[/red]"}', 'name: "\\x9b2J"'],
)
def test_errors_of_a_recipe_show_its_keys_and_values(yaml: str, tmp_path: Path, finetune: Command) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"schema: 1\nname: r\nmodel: builtin:tiny-mistral\ndata: [{{source: pydoc}}]\n{yaml}\n")
    ended = finetune("validate", path, status=2)
    assert not UNSEEN.search(ended.err + ended.out) and "Traceback" not in ended.err


def test_a_recipe_and_a_folder_with_hostile_names_are_shown(made: MadeRun, tmp_path: Path, finetune: Command) -> None:
    path = tmp_path / "r\x1b[31m[bold].yaml"
    path.write_text("schema: 1\nname: r\nmodel: builtin:tiny-mistral\ndata: [{source: pydoc}]\n")
    ended = finetune("validate", path, status=0)
    assert "r␛[31m[bold].yaml" in ended.out
    (made.store.artifacts / "dedup" / "x\x1b[2J").mkdir()
    assert not UNSEEN.search(finetune("clean", *roots(made), status=0).out)


def test_what_a_template_holds_is_shown() -> None:
    from finetune.tokenization.template_sandbox import check_template

    with pytest.raises(InputError) as caught:
        check_template("{{ 1 }}{% for [/INST]\x1b[31m %}", {}, "\x1b[31m[/INST]")
    assert "␛[31m[/INST]" in _printed(caught.value) and "\x1b" not in _printed(caught.value)


def _printed(error: FinetuneError) -> str:
    """What `main` prints of an error."""
    stream, real = io.StringIO(), sys.stderr
    sys.stderr = stream
    try:
        console.print_error(str(error))
    finally:
        sys.stderr = real
    return stream.getvalue()


def test_json_text_is_json_of_visible_characters() -> None:
    value = {"a": HOSTILE, "b": ["é中", "\ud800", "\u2028"], "c": {"\x9b": 1.5}}
    text = json_text(value)
    assert json.loads(text) == value and not UNSEEN.search(text) and "é中" in text


def test_markdown_of_a_card_holds_no_escape() -> None:
    from finetune.publish.markdown import code, escaped, fence

    assert not UNSEEN.search("".join(made(HOSTILE) for made in (code, escaped, fence)))


@pytest.mark.parametrize("depth", [10, 100_000])
def test_what_a_library_raises_is_one_line(depth: int) -> None:
    with pytest.raises(InputError) as caught, reading("x"):
        json.loads("[" * depth)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
