"""Rules of one's own: found, loaded, and what is said where that fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.data.records import Example
from finetune.errors import InputError
from finetune.filters import custom
from finetune.filters.registry import own_check
from finetune.recipe.filters import Filter, Own

ROW = Example("s:7", "s", text="x")


def rule(folder: Path | None, function: str) -> Own:
    return Own(rule="own", function=function, folder=folder)


def written(folder: Path, text: str, name: str = "mine.py") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_beside_the_recipe_in_a_package_and_installed(tmp_path):
    written(tmp_path, "LIMIT = 3\n", "neighbour.py")
    written(tmp_path, "from neighbour import LIMIT\ndef f(row):\n    return f'over {LIMIT}'\n")
    written(tmp_path, "def g(row):\n    return None\n", "inner/rules.py")
    assert custom.load(rule(tmp_path, "mine:f"))(ROW) == "over 3"
    assert custom.load(rule(tmp_path, "inner.rules:g"))(ROW) is None
    assert custom.module_file(rule(None, "json.decoder:JSONDecoder")).name == "decoder.py"
    assert custom.load(rule(tmp_path, "textwrap:dedent"))("  x") == "x"


def test_two_folders_with_a_module_of_one_name(tmp_path):
    for name in ("a", "b"):
        written(tmp_path / name, f"def f(row):\n    return {name!r}\n")
    found = [custom.load(rule(tmp_path / name, "mine:f"))(ROW) for name in ("a", "b")]
    assert found == ["a", "b"]


def test_looking_for_it_runs_nothing(tmp_path):
    written(tmp_path, "raise SystemExit\ndef f(row): ...\n")
    assert custom.module_file(rule(tmp_path, "mine:f")).name == "mine.py"
    assert len(custom.digest(rule(tmp_path, "mine:f"))) == 32


@pytest.mark.parametrize(
    ("text", "function", "says"),
    [
        ("def f(row): ...\n", "absent:f", "no module absent"),
        ("def f(row): ...\n", "mine.absent:f", "no module mine.absent"),
        ("def first(row): ...\n", "mine:frist", "does not define frist at its top level; did you mean first"),
        ("def f(row:\n", "mine:f", "cannot be read as Python"),
        ("import absent_package\ndef f(row): ...\n", "mine:f", "cannot be imported: ModuleNotFoundError"),
        ("f = 1 / 0\n", "mine:f", "cannot be imported: ZeroDivisionError"),
        ("f = 3\n", "mine:f", "f in .* must be a function, found 3"),
        ("def g():\n    f = 3\n", "mine:f", "must be a function, found None"),
    ],
    ids=range(8),
)
def test_what_cannot_be_used_is_said(tmp_path, text, function, says):
    written(tmp_path, text)
    with pytest.raises(InputError, match=says):
        custom.load(rule(tmp_path, function))


def test_its_answers():
    assert own_check("m:f", lambda row: None)(ROW) is None
    found = own_check("m:f", lambda row: " too \udcff odd ")(ROW)
    assert found and (found.reason, found.detail) == ("m:f", "too \\udcff odd")
    for wrong in ("", True, 3):
        with pytest.raises(InputError, match=r"rule m:f: row s:7: found .*allowed: None .keep the row. or a reason"):
            own_check("m:f", lambda row, wrong=wrong: wrong)(ROW)
    with pytest.raises(InputError, match="rule m:f: row s:7: it raised KeyError: 'x'"):
        own_check("m:f", lambda row: {}["x"])(ROW)


def test_it_is_off_unless_it_is_named():
    assert Filter().rules == []
    assert (
        Filter(rules=["a.b:c"]).rules == Filter(rules=[{"rule": "a.b:c"}]).rules == [Own(rule="own", function="a.b:c")]
    )
