"""The report's section on preference training: funnel with reasons, intervals, rows; also of a run that was refused."""

import json

import pyarrow as pa
import pyarrow.parquet as pq

from finetune.data.records import Reject, reject_writer
from finetune.report.page import write_report
from tests.report.made_run import MadeRun

PAIRS = {
    "rows_in": 50, "rows": 38, "eval_rows": 4, "refused": {"missing_side": 1}, "dropped": 7,
    "dropped_because": {"contaminated": 5, "too_long": 2}, "sources": {"my<pairs>": {"rows": 49, "refused": 1}},
    "formats": {"my<pairs>": "preference"}, "length_bias": 0.25, "chosen_tokens": 30.5, "rejected_tokens": 28.25,
    "longest": 200, "contradictions": 0,
}  # fmt: skip
HELD_OUT = {"pairs": 2, "accuracy": 0.7, "accuracy_interval": [0.6, 0.8], "margin": 0.4, "margin_interval": [0.2, 0.6]}
ALIGN = {
    "method": "dpo", "loss_type": "sigmoid", "first_loss": 0.693, "loss": 0.41, "steps": 40, "batch_pairs": 16,
    **HELD_OUT, "eval_pairs": 4, "by_source": {"my<pairs>": HELD_OUT, "other": HELD_OUT},
    "drift_chosen": -0.05, "drift_chosen_interval": [-0.07, -0.03], "drift_rejected": -0.23,
    "drift_rejected_interval": [-0.26, -0.2], "displacement": True, "mean_kl_from_start": 0.17,
    "perplexity_ratio": 1.1, "perplexity_start": 26.3, "perplexity_aligned": 29.0, "stop_rate_start": 0.65,
    "stop_rate": 0.85, "answer_tokens_start": 79.5, "answer_tokens": 55.25,
}  # fmt: skip


def said(text, **more):
    return json.dumps([{"role": "assistant", "content": text, **more}])


def made(tmp_path, sides=("chosen", "rejected"), **pairs):
    run = MadeRun(tmp_path)
    folder = run.folder("pairs")
    row = {"prompt": said("Why <i>snow</i>?"), **{side: said(f"{side} & 1", tool_calls=[{"a": 1}]) for side in sides}}
    texts = [{"pair_id": f"p:{n}", "split": "eval" if n > 8 else "train", **row, "tools": None} for n in range(1, 11)]
    pq.write_table(pa.Table.from_pylist(texts), folder / "texts.parquet")
    with reject_writer(folder / "rejects.parquet") as reject:
        for n in range(3):
            reject(Reject(f"r:{n}", "p", "contaminated", f"shares the words 'a <b> {n}'", "Its <text>", None, None))
    run.done("pairs", **PAIRS | pairs)
    return run


def test_the_page_shows_funnel_reasons_intervals_and_rows(tmp_path):
    run = made(tmp_path)
    steps = [{"step": n, "loss": 0.69 / n, "margin": 0.1 * n, "pairs_right": 0.5} for n in range(1, 9)]
    (run.folder("align") / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    run.done("align", **ALIGN)
    run.save()
    page = write_report(run.store, "made").read_text()
    for words in (
        '<a href="#preference">', "− contaminated", "− too long", "− missing side", "my&lt;pairs&gt;", "25.0 %",
        "shares the words &#39;a &lt;b&gt; 1", "ranked correctly: my&lt;pairs&gt;", "70.0 %, 95 % 0.6 to 0.8",
        "-0.05 nats a token, 95 % -0.07 to -0.03", "displacement: chosen answers lost", "65.0 % → 85.0 %",
        "79.5 → 55.25", "Why &lt;i&gt;snow", "chosen &amp; 1", "held out: ", "0.5 is chance",
    ):  # fmt: skip
        assert words in page, words
    assert "r:2" not in page  # two rows of each reason
    assert page.count("<code>p:") == 6 and "<code>p:9</code>" in page  # held-out pairs first


def test_single_answers_and_a_run_whose_alignment_was_refused(tmp_path):
    run = made(tmp_path, sides=("completion",), labels={"false": 18, "true": 20}, length_bias=None)
    run.note("align", "refused", message="policy and <reference> differ")
    run.save()
    page = write_report(run.store, "made").read_text()
    assert "align was refused: policy and &lt;reference&gt; differ" in page
    assert "false 18, true 20" in page and "completion &amp; 1" in page and "the longer one" not in page


def test_pairs_that_were_refused_are_named_and_a_recipe_without_the_section_shows_nothing(tmp_path):
    run = MadeRun(tmp_path)
    run.note("pairs", "refused", message="9 of 10 are left out")
    run.note("align", "missing")
    run.save()
    assert "pairs was refused: 9 of 10 are left out" in write_report(run.store, "made").read_text()
    for status in ("off", "missing"):
        run.note("pairs", status)
        run.note("align", status)
        run.save()
        assert "preference" not in write_report(run.store, "made").read_text().lower()
