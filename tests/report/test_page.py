"""The page of a run: every figure, every absence in a line, the same bytes again, and rows that stay text."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest

from finetune.errors import InputError
from finetune.pipeline import run_view
from finetune.report import page as report_page
from tests.report.chromium import BROWSER, NO_BROWSER, elements, opened, printed
from tests.report.made_run import RECIPE, MadeRun, example, made_run

HOSTILE = (
    '<script>document.title="owned"</script><img src=x onerror="document.title=\'owned\'"></style>'
    '<script>document.title="owned"</script></pre></title>"><svg onload="document.title=\'owned\'"></svg>'
    "'><body onpageshow=\"document.title='owned'\">{{7*7}}{% raw %}\x00\x1b[31m\x9b\u202e"
)
OURS = set(
    "html head meta title style body header footer main section nav div span h1 h2 h3 p a dl dt dd code pre strong "
    "details summary figure figcaption table thead tbody tr th td svg g line text polyline path circle rect".split()
)


def page(run: MadeRun) -> str:
    run.save()
    return report_page.write_report(run.store, "made").read_text(encoding="utf-8")


def text_of(page: str) -> str:
    """What a reader sees, on one line."""
    without = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", without)).split())


def assert_only_ours(page_text: str) -> None:
    found = elements(page_text)
    assert set(found.names) <= OURS, set(found.names) - OURS
    assert not [a for a in found.attributes if a[1].startswith("on") or a[1] in ("src", "srcdoc", "style")]
    assert all(value.startswith("#") for _, name, value in found.attributes if name == "href")


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    comment = "# " + HOSTILE.replace("\x00", "").replace("\x1b", "").replace("\x9b", "")
    run = made_run(tmp_path_factory.mktemp("hostile"), HOSTILE, HOSTILE, f"{comment}\n{RECIPE}")
    run.save(sets=["seed=1 # " + HOSTILE])
    return report_page.write_report(run.store, "made")


def test_every_figure_is_there(tmp_path: Path) -> None:
    words = text_of(page(made_run(tmp_path)))
    for figure in (
        "2026-01-02 03:04 UTC", "73.7 → 25.8", "26.3 → 26.4", "99.8 %", "Tokens per second 1,234 ", "2.00 GB",
        "6 to train on, 2 held out", "4 dropped for rows:0A plain text.", "270 tokens", "4 → 0.25",
        "0.600 nats per token likelier under their own prompt (95 %: 0.4 to 0.7)", "100.0 % of 6 (the base: 0.0 %)",
        "20.9 to 32", "1.001", "1e-05", "3, 2 of them changed", "c6e5a26, with changes not committed", "torch 2.13.0",
        "path: rows.jsonl", "ends by itself", "cut off", "predicted in all",
    ):  # fmt: skip
        assert figure in words, figure


def test_a_model_that_never_stops_is_said_at_the_head_and_with_what_to_do(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    assert "NO ANSWER" not in page(run)
    run.done("evaluate", **{**run.stages["evaluate"]["metrics"], "stop_rate": 0.0})
    words = text_of(page(run))
    assert words.index("NO ANSWER ENDED BY ITSELF (see Evaluation)") < words.index("Length of rows")
    assert "NO ANSWER ENDED BY ITSELF (0 of 6," in words and "train longer (train.epochs" in words


def test_the_same_run_gives_the_same_bytes_and_another_figure_gives_others(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    first = page(run)
    assert page(run) == first
    run.done("evaluate", **{**run.stages["evaluate"]["metrics"], "perplexity_adapter": 24.8})
    assert page(run) != first


def test_the_page_needs_nothing_from_outside_and_forbids_scripts(tmp_path: Path) -> None:
    text = page(made_run(tmp_path))
    assert_only_ours(text)
    assert "http" not in re.sub(r'http-equiv="Content-Security-Policy"', "", text)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy and html.unescape(policy[1]).startswith("default-src 'none'; style-src 'sha256-")
    assert "@import" not in text and "url(" not in text


def test_rows_stay_text(hostile_page: Path) -> None:
    text = hostile_page.read_text(encoding="utf-8")
    assert_only_ours(text)
    assert elements(text).titles == ["made: report of a run"]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)
    shown_text = html.unescape(text)
    assert "{{7*7}}{% raw %}␀␛[31m\ufffd⟨U+202E⟩" in shown_text
    assert shown_text.count('<script>document.title="owned"</script>') > 20


@pytest.mark.skipif(not BROWSER, reason=NO_BROWSER)
def test_no_script_of_a_row_runs_in_a_browser(hostile_page: Path, tmp_path: Path) -> None:
    found = opened(hostile_page, tmp_path / "profile")
    assert found.titles == ["made: report of a run"]
    assert set(found.names) <= OURS
    assert not [a for a in found.attributes if a[1].startswith("on")]


@pytest.mark.skipif(not BROWSER, reason=NO_BROWSER)
def test_the_browser_would_have_run_it_unescaped_and_the_policy_alone_stops_it(
    hostile_page: Path, tmp_path: Path
) -> None:
    unescaped = html.unescape(hostile_page.read_text(encoding="utf-8"))
    behind_policy = tmp_path / "policy.html"
    behind_policy.write_text(unescaped, encoding="utf-8")
    found = opened(behind_policy, tmp_path / "one")
    assert "script" in found.names and "owned" not in found.titles
    control = tmp_path / "control.html"
    control.write_text(re.sub(r"<meta http-equiv[^\n]*\n", "", unescaped, count=1), encoding="utf-8")
    assert "owned" in opened(control, tmp_path / "two").titles


@pytest.mark.skipif(not BROWSER, reason=NO_BROWSER)
@pytest.mark.parametrize(("medium", "width"), [("screen", 360), ("print", 688)])  # A4 without its margins: 182 mm
def test_no_page_is_wider_than_a_phone_or_a_sheet_of_paper(medium: str, width: int, tmp_path: Path) -> None:
    measure = (
        "<script>for (const d of document.querySelectorAll('details')) d.open = true;"
        "parent.postMessage(document.documentElement.scrollWidth, '*')</script></body>"
    )
    text = page(made_run(tmp_path, "wide" * 100, "source" * 100))
    text = re.sub(r"<meta http-equiv[^\n]*\n", "", text, count=1).replace("</body>", measure)
    if medium == "print":
        assert text.count("@media print {") == 1
        text = text.replace("@media print {", "@media screen {")
    (tmp_path / "inner.html").write_text(text, encoding="utf-8")
    (tmp_path / "outer.html").write_text(
        '<html><title>none</title><script>onmessage = m => document.title = "wide " + m.data</script>'
        f'<iframe src="inner.html" style="width: {width}px; height: 800px; border: 0"></iframe></html>'
    )
    (title,) = opened(tmp_path / "outer.html", tmp_path / "profile").titles
    assert int(title.removeprefix("wide ")) <= width


@pytest.mark.skipif(not BROWSER, reason=NO_BROWSER)
def test_a_report_is_printed_on_a_few_pages(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    run.save()
    pdf = printed(report_page.write_report(run.store, "made"), tmp_path / "profile")
    pages = len(re.findall(rb"/Type\s*/Page\b", pdf))
    assert pdf.startswith(b"%PDF-") and 3 <= pages <= 12


def test_a_lone_surrogate_and_a_torn_line_do_not_break_the_page(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    line = json.dumps({"id": "a\ud800b", "prompt": "\udfff", "reference": "", "adapter": {}, "base": {}})
    (run.folder("evaluate") / "samples.jsonl").write_text(line + '\n{"id": "torn')
    (run.folder("train") / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5, "grad_norm": NaN}\n{"step": 2, "lo')
    run.note("train", "partial")
    (run.folder("train") / "manifest.json").unlink()
    text = page(run)
    assert "a\ufffdb" in text and "train was begun and is not finished" in text
    assert "1 steps overflowed" not in text  # a curve without a point is not drawn at all


def test_an_empty_run_says_what_is_absent(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    run.folder("base")
    run.note("base", "partial")
    words = text_of(page(run))
    for sentence in (
        "Stopped in base", "No rows were read.", "train has not run.", "evaluate has not run.", "certify has not run.",
        "merge has not run.", "No source was read.", "no machine is on record",
    ):  # fmt: skip
        assert sentence in words, sentence


def test_a_refused_stage_gives_its_reason(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    run.note("certify", "refused", message="too far <b>away</b>")
    (run.folder("certify") / "manifest.json").unlink()
    for stage in ("merge", "export"):
        del run.stages[stage]
    text = page(run)
    words = text_of(text)
    assert "A gate refused certify: too far <b>away</b>" in words and "<b>" not in text
    assert "20.9 to 32" in words  # the figures that the gate judged by are there all the same
    assert "merge has not run." in words


def test_files_that_were_cleaned_away_are_said_to_be_gone(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    for stage in ("dedup", "render", "evaluate"):
        (run.folder(stage) / "manifest.json").unlink()
        for path in run.folder(stage).glob("*.*"):
            path.unlink()
        run.folder(stage).joinpath("template", "template.json").unlink(missing_ok=True)
        if run.folder(stage).joinpath("template").is_dir():
            run.folder(stage).joinpath("template").rmdir()
        run.folder(stage).rmdir()
    words = text_of(page(run))
    assert "The files of dedup are no longer there." in words and "done, files gone" in words
    assert "73.7 → 25.8" in words  # from the run's own record


def test_groups_show_the_farthest_rows_and_their_texts(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    stages = report_page._views(run.store, run_view.read(run.store, str(page(run) and "made")))
    from finetune.report.data_section import groups

    (group,) = groups(stages)
    assert (group["size"], group["exact"], group["lowest"]) == (4, 2, "0.800")
    assert [score for _, _, score, _ in group["rows"]] == ["0.800", "0.900", "1.000", "1.000"]
    assert group["rows"][0][3] == ("A plain text. 11?", "A plain text.")


def test_sources_are_counted_where_they_are_left(tmp_path: Path) -> None:
    from finetune.data.records import write_rows
    from finetune.report.data_section import sources

    run = made_run(tmp_path)
    write_rows(run.folder("split") / "train.parquet", [example("a:1", "a", "b", "a"), example("b:1", "a", "b", "b")])
    run.done("split", rows_in=8, train_rows=2, eval_rows=2, leaks=0)
    run.done("ingest", rows_out=9, sources={"a": {"rows": 8, "refused": 0}, "rows": {"rows": 1, "refused": 3}})
    run.save()
    found = sources(report_page._views(run.store, run_view.read(run.store, "made")))
    assert found == {
        "columns": ["rows read", "refused", "to train on", "held out"],
        "rows": [("a", "", ["8", "0", "1", "0"]), ("rows", "", ["1", "3", "0", "2"])],
    }


def test_no_such_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has not run yet"):
        report_page.write_report(MadeRun(tmp_path).store, "made")
