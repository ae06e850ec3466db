"""`finetune report` and `finetune inspect --html` after real commands: finished, stopped early, and refused."""

import html
import json
import shutil

import pytest

from finetune.cli import show as cli_show
from finetune.errors import InputError
from finetune.pipeline import run_view
from finetune.pipeline.store import Store
from finetune.recipe.load import load_recipe
from finetune.report import page as report_page
from tests.report.chromium import BROWSER, NO_BROWSER, opened
from tests.report.test_page import HOSTILE, assert_only_ours, text_of

ROWS = 60


def run_with(workspace, *arguments, status=0):
    """`Workspace.run` with the roots given, for a command that the fixture does not know of."""
    roots = ["--artifacts", str(workspace.folder / "artifacts"), "--scratch", str(workspace.folder / "scratch")]
    return workspace.run(*arguments, *([] if arguments[0] in ("run", "show", "inspect") else roots), status=status)


def store_of(workspace):
    return Store(workspace.folder / "artifacts", workspace.folder / "scratch")


def newest(workspace):
    parent = workspace.folder / "artifacts" / "runs" / "small"
    return parent / (parent / "latest").read_text().strip()


@pytest.fixture(scope="module")
def hostile(pristine, tmp_path_factory):
    """Rows, file name and recipe that would own the page, run until pack."""
    folder = tmp_path_factory.mktemp("hostile") / "work"
    shutil.copytree(pristine.folder, folder)
    name = "rows <img src=x onerror=document.title='owned'>.jsonl"
    rows = [
        {"instruction": f"{HOSTILE} Number {i}?", "input": "", "output": f"{HOSTILE} It is {i // 3}."}
        for i in range(ROWS)
    ]
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"instruction": "\\ud800"}\n')
    recipe = (folder / "small.yaml").read_text()
    recipe = recipe.replace("rows.jsonl", json.dumps(name)).replace("max_length_tokens: 100", "max_length_tokens: 900")
    recipe = recipe.replace("max_length_tokens: 128", "max_length_tokens: 1000").replace("{eval_fraction: 0.1}", "null")
    recipe = recipe.replace("threshold: 0.98", "threshold: 0.98, max_dropped_fraction: 1")  # three questions an answer
    recipe += 'ingest: {max_refused_fraction: 0.5}\n# </pre><script>document.title="owned"</script>{{7*7}}\n'
    (folder / "small.yaml").write_text(recipe)
    workspace = type(pristine)(folder)
    workspace.run("run", "small.yaml", "--until", "pack")
    return workspace


def test_a_run_leaves_a_report_with_the_figures_that_show_has(finished):
    value = run_view.read(store_of(finished), "small")
    page = (newest(finished) / "report.html").read_bytes()
    words = text_of(page.decode())
    metrics = {name: stage["metrics"] for name, stage in finished.show()["stages"].items()}
    for figure in (
        f"{metrics['ingest']['rows_out']:,}",
        f"−{metrics['dedup']['exact'] + metrics['dedup']['embedding']}: ",
        "the same text as a kept row",
        f"{metrics['split']['train_rows']} to train on, {metrics['split']['eval_rows']} held out",
        f"{metrics['render']['tokens']:,} tokens",
        f"{metrics['pack']['efficiency']:.1%}".replace("%", " % full"),
        f"{metrics['train']['first_loss']:.4g} → {metrics['train']['loss']:.4g}",
        f"{metrics['evaluate']['perplexity_base']:.4g}",
        f"{metrics['evaluate']['perplexity_adapter']:.4g}",
        f"{metrics['certify']['perplexity_merged']:.4g}",
        f"{metrics['merge']['tensors']}, {metrics['merge']['changed_tensors']} of them changed",
        "The recipe turns export off.",
    ):
        assert figure in words, figure
    assert (
        report_page.render_page("report.jinja", report_page.read_facts(store_of(finished), value)) == page
    )  # the same run, again


def test_a_model_that_never_stops_is_told_at_the_end_of_every_run(finished):
    assert finished.show()["stages"]["evaluate"]["metrics"]["stop_rate"] == 0  # two answers of a model of 12 steps
    again = finished.run("run", "small.yaml")
    assert again.stderr.count("NO ANSWER ENDED BY ITSELF (0 of 2,") == 1


@pytest.mark.slow
def test_a_stopped_run_has_a_report_and_its_rows_stay_text(hostile):
    path = newest(hostile) / "report.html"
    before = path.read_bytes()
    path.write_text("an old one")
    assert run_with(hostile, "report", "small").stdout.strip() == str(path)
    assert path.read_bytes() == before
    text = before.decode()
    words = text_of(text)
    assert_only_ours(text)
    assert "Finished as far as pack; train and what follows it has not run." in words
    assert "train has not run." in words and "{{7*7}}" in words and "rows read refused" in words
    assert "dropped for" in words and '<script>document.title="owned"</script>' in html.unescape(text)


@pytest.fixture(scope="module")
def rows_page(hostile):
    path = hostile.folder / "rows.html"
    assert run_with(hostile, "inspect", "small.yaml", "--html", path, "--rows", "6").stdout.strip() == str(path)
    return path


def test_inspect_writes_a_page_of_rows_and_prints_the_same_in_short(hostile, rows_page, capsys, monkeypatch):
    text = rows_page.read_text()
    assert_only_ours(text)
    assert text.count('<section class="row">') == 6
    assert "dropped as its duplicate" in text and 'document.title="owned"' in html.unescape(text)
    monkeypatch.chdir(hostile.folder)  # the base is found beside the recipe
    recipe = load_recipe("small.yaml").recipe
    cli_show.print_rows(recipe, store_of(hostile), 3)
    printed = capsys.readouterr().out
    assert "dropped for it: rows <img" in printed and " supervised" in printed
    with pytest.raises(InputError, match="cannot be written"):
        cli_show.write_rows_page(recipe, store_of(hostile), 1, hostile.folder / "none" / "x.html")


def test_a_refused_run_has_a_report_with_the_reason(hostile):
    before = newest(hostile)
    refused = hostile.run(
        "run", "small.yaml", "--set", "filter.max_length_tokens=1", "--set", "filter.count=raw", status=3
    )
    folder = newest(hostile)
    assert folder != before and "the filter leaves none" in refused.stderr
    words = text_of((folder / "report.html").read_text())
    assert "A gate refused filter: the filter leaves none of 60 rows" in words
    assert "filter.max_length_tokens=1" in words and "dedup has not run." in words
    assert report_page.write_report(store_of(hostile), f"small@{before.name}") == before / "report.html"


@pytest.mark.skipif(not BROWSER, reason=NO_BROWSER)
def test_no_script_of_the_data_or_the_recipe_runs_in_a_browser(hostile, rows_page, tmp_path):
    assert opened(rows_page, tmp_path / "one").titles == ["small: rows as the model sees them"]
    assert opened(newest(hostile) / "report.html", tmp_path / "two").titles == ["small: report of a run"]
