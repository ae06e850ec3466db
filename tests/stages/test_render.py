"""The stage as the pipeline runs it, on a real small tokenizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from finetune.context import Context
from finetune.data.records import Example, Message, write_rows
from finetune.errors import GateRefused
from finetune.recipe import Render, Runtime, Tracking
from finetune.stages import render
from finetune.tokenization import chat_template
from finetune.utils.files import read_json, write_json
from tests.helpers.base_templates import MISTRAL_LATER
from tests.helpers.tiny_tokenizers import build


def rows(count: int, start: int = 0) -> list[Example]:
    said = [
        (f"What is {i} and </s>?", f"It is {i}, the sea. " + "blue " * (i % 7)) for i in range(start, start + count)
    ]
    return [
        Example(f"r:{i}", "r", (Message("user", q), Message("assistant", a))) for i, (q, a) in enumerate(said, start)
    ]


@pytest.fixture(autouse=True)
def no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the trial of each template in a process of its own, which tests/report/test_hostile_text.py covers."""
    monkeypatch.setattr(chat_template, "check_template", lambda *_: None)


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    folders = {"base": tmp_path / "base", "split": tmp_path / "split"}
    folders["split"].mkdir()
    build("metaspace", MISTRAL_LATER).save_pretrained(folders["base"])
    write_rows(folders["split"] / "train.parquet", rows(240))
    write_rows(folders["split"] / "eval.parquet", rows(20, 240))
    return folders


def run(spec: Render, inputs: dict[str, Path], out: Path, lines: list[str] | None = None) -> dict[str, object]:
    out.mkdir()
    context = Context(scratch=out.parent, runtime=Runtime(), tracking=Tracking())
    if lines is not None:
        context = replace(context, say=lines.append)
    return render.run(spec, inputs, out, context)


def test_both_splits_are_written_and_audited(inputs, tmp_path) -> None:
    metrics = run(Render(), inputs, tmp_path / "out")
    assert metrics["rows"] == 240 and metrics["eval_rows"] == 20
    assert metrics["dropped"] == 0 and metrics["truncated"] == 0
    assert metrics["template"] == "base" and metrics["terminator"] == "</s>"
    train = pq.read_table(tmp_path / "out" / "train.parquet").to_pylist()
    assert [r["id"] for r in train[:2]] == ["r:0", "r:1"]
    assert metrics["tokens"] == sum(len(r["input_ids"]) for r in train) == sum(r["length"] for r in train)
    labels = sum(sum(r["mask"]) for r in train)
    assert metrics["supervised_fraction"] == labels / metrics["tokens"]
    for r in train:
        assert r["input_ids"].count(2) == 1 and r["input_ids"][-1] == 2 and r["mask"][-1] == 1  # the typed </s> is text
        assert r["supervised"] == sum(r["mask"]) and r["input_ids"][0] == 1
    template = read_json(tmp_path / "out" / "template" / "template.json")
    assert template["terminators"] == [2] and template["pad_token"] == "<unk>" and template["bos"] is True
    assert (tmp_path / "out" / "template" / "inference.jinja").read_text() == MISTRAL_LATER
    assert (tmp_path / "out" / "template" / "chat_template.jinja").read_text() == MISTRAL_LATER
    audit = read_json(tmp_path / "out" / "audit.json")
    assert audit["splits"]["train"]["rows"] == 240 and audit["prompts_proved"] == 200
    assert audit["ids_equal"] == 200 and not audit["ids_not_compared"] and metrics["unterminated"] == 0
    assert metrics["masked_turns"] == 0


def test_rows_with_the_text_of_a_special_token_are_summed_over_the_splits(inputs, tmp_path) -> None:
    metrics = run(Render(), inputs, tmp_path / "out")
    assert metrics["special_text"] == {"</s>": 260}  # each question holds it


def test_a_number_of_rows_is_proved_where_the_recipe_names_one(inputs, tmp_path) -> None:
    run(Render(prove_rows=40), inputs, tmp_path / "out")
    audit = read_json(tmp_path / "out" / "audit.json")
    assert audit["prompts_proved"] == audit["ids_equal"] == 40


def test_the_same_rows_give_the_same_bytes(inputs, tmp_path) -> None:
    first, second = tmp_path / "one", tmp_path / "two"
    run(Render(), inputs, first)
    run(Render(), inputs, second)
    files = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
    assert len(files) == 7
    assert all((first / f).read_bytes() == (second / f).read_bytes() for f in files)


def test_without_a_split_all_rows_are_for_training(inputs, tmp_path) -> None:
    (inputs["split"] / "eval.parquet").unlink()
    (inputs["split"] / "train.parquet").rename(inputs["split"] / "rows.parquet")
    metrics = run(Render(template="alpaca"), inputs, tmp_path / "out")
    assert metrics["rows"] == 240 and metrics["eval_rows"] == 0 and metrics["template"] == "alpaca"
    assert pq.read_table(tmp_path / "out" / "eval.parquet").num_rows == 0


def test_too_many_cut_rows_stop_the_run(inputs, tmp_path) -> None:
    with pytest.raises(GateRefused, match=r"would be cut.*r:"):
        run(Render(max_length_tokens=30), inputs, tmp_path / "out")


def test_too_many_dropped_rows_stop_the_run(inputs, tmp_path) -> None:
    with pytest.raises(GateRefused, match=r"longer than render.max_length_tokens \(r:"):
        run(Render(max_length_tokens=30, overlong="drop"), inputs, tmp_path / "out")


def test_a_dropped_row_is_written_with_its_reason(inputs, tmp_path) -> None:
    spec = Render(max_length_tokens=30, overlong="drop", max_dropped_fraction=0.99)
    metrics = run(spec, inputs, tmp_path / "out")
    rejects = pq.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()
    kept = [r["id"] for s in ("train", "eval") for r in pq.read_table(tmp_path / "out" / f"{s}.parquet").to_pylist()]
    assert sorted(kept + [r["id"] for r in rejects]) == sorted(f"r:{i}" for i in range(260))
    assert metrics["dropped"] == len(rejects) > 40
    for reject in rejects:
        assert reject["reason"] == "longer than render.max_length_tokens" and reject["text"].startswith("What is")
        assert (
            reject["value"] > 30 == reject["limit"]
            and f"{reject['value']:.0f} tokens of at most 30" in reject["detail"]
        )


def test_a_template_file_is_trained_and_travels(inputs, tmp_path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(MISTRAL_LATER.replace("[INST]", "<Q>").replace("[/INST]", "</Q>"), encoding="utf-8")
    spec = Render(template=str(file))
    metrics = run(spec, inputs, tmp_path / "out")
    assert metrics["template"] == "mine.jinja"
    assert (tmp_path / "out" / "template" / "inference.jinja").read_text() == file.read_text()
    before = render.fingerprint(spec)
    file.write_text("changed", encoding="utf-8")
    assert render.fingerprint(spec) != before


def test_one_training_row_is_shown_as_the_model_sees_it(inputs, tmp_path) -> None:
    lines: list[str] = []
    run(Render(), inputs, tmp_path / "out", lines)
    shown = lines[-1]
    assert "[INST] What is 0 and </s>? [/INST]" in shown and "It is 0, the sea." in shown
    row = pq.read_table(tmp_path / "out" / "train.parquet").to_pylist()[0]
    assert f"{row['supervised']} of {row['length']} ids supervised" in shown
    before, _, behind = shown.partition("\n")[2].partition("»")
    assert "What is 0" in before and "It is 0" not in before and "</s>" in behind and "«" in behind
    assert f"ids {row['input_ids'][0]} '<s>'" in shown and f"{row['input_ids'][-1]} '</s>'" in shown


def test_typed_special_text_and_masked_turns_are_reported(inputs, tmp_path) -> None:
    some = rows(30)
    turns = (*some[0].messages[:1], Message("assistant", "so it is", learn=False), *some[1].messages)
    write_rows(inputs["split"] / "train.parquet", [*some, Example("r:99", "r", turns)])
    (inputs["split"] / "eval.parquet").unlink()
    lines: list[str] = []
    metrics = run(Render(), inputs, tmp_path / "out", lines)
    shown = "\n".join(lines)
    assert "31 rows hold the text '</s>', a special token of this base" in shown and "0 of these rows hold it" in shown
    assert "1 of 32 assistant turns carry no label: the row says that this turn is not learned" in shown
    assert metrics["special_text"] == {"</s>": 31} and metrics["masked_turns"] == 1
    audit = read_json(tmp_path / "out" / "audit.json")["splits"]["train"]
    assert audit["special_text"] == {"</s>": {"rows_with_text": 31, "rows_with_id": 0}} and audit["answers"] == 32


def test_rows_beyond_the_positions_of_the_base_are_counted(inputs: dict[str, Path], tmp_path: Path) -> None:
    write_json(inputs["base"] / "config.json", {"max_position_embeddings": 30})
    said: list[str] = []
    run(Render(), inputs, tmp_path / "out", said)
    tables = [pq.read_table(tmp_path / "out" / f"{n}.parquet")["length"].to_pylist() for n in ("train", "eval")]
    lengths = [n for table in tables for n in table]
    count = sum(n > 30 for n in lengths)
    words = f"WARNING: {count:,} of 260 rows are longer than the 30 positions that the base knows"
    assert 0 < count < 260 and any(words in line and f"has {max(lengths)} tokens" in line for line in said)


@pytest.mark.parametrize("pinned", [None, {"positions": 80}, {"positions": None}])
def test_none_are_where_the_base_or_rope_scaling_reaches_far_enough(
    pinned: dict[str, int | None] | None, inputs: dict[str, Path], tmp_path: Path
) -> None:
    write_json(inputs["base"] / "config.json", {"max_position_embeddings": 80 if pinned is None else 40})
    if pinned is not None:
        write_json(inputs["base"] / "base.json", pinned)
    said: list[str] = []
    run(Render(), inputs, tmp_path / "out", said)
    assert not any("positions" in line for line in said)


def test_a_new_token_that_no_row_holds_is_warned_of(inputs: dict[str, Path], tmp_path: Path) -> None:
    from finetune.models.loading import load_tokenizer
    from finetune.models.new_tokens import add_to_tokenizer
    from finetune.recipe import Tokens

    tokens = add_to_tokenizer(inputs["base"], Tokens(add=["<|a|>", "the sea"]), 900, load_tokenizer)
    write_json(inputs["base"] / "base.json", {"tokens": tokens.as_json()})
    said: list[str] = []
    run(Render(), inputs, tmp_path / "out", said)
    assert [line for line in said if "WARNING" in line] == [
        "render: WARNING: 1 of 2 new tokens are in no training row, such as '<|a|>'"
    ]
    rows = pq.read_table(tmp_path / "out" / "train.parquet")["input_ids"].to_pylist()
    assert all(row.count(tokens.ids[1]) == 1 for row in rows)
