"""What ruins a model without an error, a case each: with the fault the run stops, without it the run says nothing.

Only what rows, templates and packing can do; the faults of training have theirs in tests/train/test_trainer.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from finetune.context import Context
from finetune.data.records import Example, Message, write_rows
from finetune.errors import GateRefused
from finetune.recipe import Render, Runtime, Tracking
from finetune.stages import pack, render
from finetune.tokenization.row_tokenizer import TokenizedRow, table
from finetune.utils.files import read_json
from tests.helpers.base_templates import ALL
from tests.helpers.tiny_tokenizers import build

CARD, CHATML, ZEPHYR, PHI3 = ALL["mistral_card"], ALL["chatml"], ALL["zephyr"], ALL["phi3"]
GENERATED = "{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}"
MARKED = "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}Q: {{ m['content'] }}\nA: {% else %}"
MARKED += GENERATED + "{% endif %}{% endfor %}"
TOOLS = '{"tool_calls":[{"function":{"arguments":{"at":"sea"},"name":"look"}}]}'
# a template that changes one word, which few rows have
QUIRK = (
    "{% for m in messages %}{% set said = m['content'] | replace('zebra', 'horse') %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}{{ said }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VARIABLE = "{{ bos_token }}{% for m in messages %}{% set x = m.role ~ ': ' ~ m.content ~ END %}{{ x }}{% endfor %}"
GREEDY = (
    "{% generation %}"
    + MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    + "{% endgeneration %}"
)


def chat(number: int, *said: str, system: str | None = None) -> Example:
    turns = [Message(("user", "assistant")[i % 2], s) for i, s in enumerate(said)]
    return Example(f"r:{number}", "r", tuple([Message("system", system)] * (system is not None) + turns))


def chats(count: int = 12) -> list[Example]:
    return [
        chat(i, f"What is the capital of France {i}?", f"It is {i}, the sea is wide and blue.") for i in range(count)
    ]


def called(number: int) -> Example:
    turns = (Message("user", "Look."), Message("assistant", "", TOOLS), Message("tool", "blue"))
    return Example(f"r:{number}", "r", (*turns, Message("assistant", "It is blue.")))


def zebra(place: int) -> list[Example]:
    return [chat(i, "the zebra" if i == place else "the horse", "runs") for i in range(700)]


@dataclass(frozen=True)
class Case:
    """A fault and what is right beside it; both are (kind of tokenizer, template of the base, rows)."""

    says: str
    bad: tuple[str, str | None, list[Example]]
    good: tuple[str, str | None, list[Example]]
    spec: dict[str, object] = field(default_factory=dict)
    good_spec: dict[str, object] = field(default_factory=dict)


GOOD = ("metaspace", CARD, chats())
CASES = {
    "the end of an answer carries no label": Case(
        r"row r:0: the terminator .* carries no label",
        (
            "metaspace",
            MARKED.replace("{{ eos_token }}{% endgeneration %}", "{% endgeneration %}{{ eos_token }}"),
            chats(),
        ),
        ("metaspace", MARKED, chats()),
    ),
    "the terminator is no token of the base": Case(
        "writes no token that ends an answer.*alpaca and mistral",
        ("metaspace", CHATML, chats()),
        ("byte_level", CHATML, chats()),
    ),
    "no special token is left to pad with": Case(
        "no unused special token to pad with",
        ("metaspace", CARD.replace("'[INST] '", "'<unk>[INST] '"), chats()),
        GOOD,
    ),
    "two BOS": Case("row r:0 begins with two BOS", ("metaspace", "{{ bos_token }}" + CARD, chats()), GOOD),
    "two BOS in raw text": Case(
        "row t:1 begins with two BOS",
        ("metaspace", CARD, [Example("t:1", "t", text="<s><s>the sea")]),
        ("metaspace", CARD, [Example("t:1", "t", text="<s>the sea")]),
    ),
    "an answer has no end": Case(
        "writes no token that ends an answer.* would never learn to stop",
        ("metaspace", VARIABLE.replace("END", "'\n'"), chats()),
        ("metaspace", VARIABLE.replace("END", "eos_token"), chats()),
    ),
    "no chat template": Case("no chat template of its own", ("metaspace", None, chats()), GOOD),
    "the generation prompt does not begin an answer": Case(
        r"the generation prompt ends with 'Sure: ', which the template does not write before an answer \(r:0",
        ("byte_level", CHATML.replace("assistant\n' }}{% endif", "assistant\nSure: ' }}{% endif"), chats()),
        ("byte_level", CHATML, chats()),
    ),
    "answers are cut": Case(
        "rows would be cut.*r:0", GOOD, GOOD, {"max_length_tokens": 24}, {"max_length_tokens": 200}
    ),
    "answers are cut before their end": Case(
        "hold an answer without its end.*r:0",
        GOOD,
        GOOD,
        {"max_length_tokens": 24, "max_truncated_fraction": 1.0},
        {"max_length_tokens": 200, "max_truncated_fraction": 1.0},
    ),
    "the cut takes every label": Case(
        r"no supervised token within render.max_length_tokens \(r:0",
        ("metaspace", CARD, [chat(0, "Which way, and why? " * 8, "West.")]),
        ("metaspace", CARD, [chat(0, "Which way, and why? " * 8, "West.")]),
        {"max_length_tokens": 32, "max_truncated_fraction": 1.0},
        {"max_length_tokens": 200, "max_truncated_fraction": 1.0},
    ),
    "long rows are dropped": Case(
        r"longer than render.max_length_tokens \(r:0",
        GOOD,
        GOOD,
        {"max_length_tokens": 16, "overlong": "drop"},
        {"max_length_tokens": 200, "overlong": "drop"},
    ),
    "a tool's result is passed over": Case(
        r"no place for tool calls and their results \(r:0",
        ("metaspace", ZEPHYR, [called(0), *chats()[1:4]]),
        ("byte_level", ALL["qwen_tools"], [called(0), *chats()[1:4]]),
    ),
    "a call is passed over": Case(
        r"no place for tool calls and their results \(r:0",
        ("metaspace", CARD, [Example("r:0", "r", called(0).messages[:2]), *chats()[1:4]]),
        ("byte_level", ALL["llama3.1"], [Example("r:0", "r", called(0).messages[:2]), *chats()[1:4]]),
    ),
    "a system message without a place": Case(
        "row r:0 has a system message",
        ("metaspace", CARD, [chat(0, "Q", "A", system="Be brief."), *chats()[1:]]),
        ("metaspace", CARD, [chat(0, "Q", "A")]),
        {"system": "refuse"},
        {"system": "refuse"},
    ),
    "conversations that the template refuses": Case(
        "takes none of the 1 rows",
        ("metaspace", CARD, [Example("r:0", "r", (Message("assistant", "A"), Message("user", "Q")))]),
        GOOD,
    ),
}


def stage(tmp: Path, base: tuple[str, str | None, list[Example]], spec: dict[str, object]) -> Path:
    kind, template, rows = base
    folders = {"base": tmp / "base", "split": tmp / "split"}
    folders["split"].mkdir(parents=True)
    build(kind, template).save_pretrained(folders["base"])
    write_rows(folders["split"] / "train.parquet", rows)
    write_rows(folders["split"] / "eval.parquet", [])
    (tmp / "out").mkdir()
    context = Context(scratch=tmp, runtime=Runtime(), tracking=Tracking())
    render.run(Render(**spec), folders, tmp / "out", context)
    return tmp / "out"


@pytest.mark.parametrize("name", CASES)
def test_the_gate(name, tmp_path) -> None:
    case = CASES[name]
    for which, base, spec in (("bad", case.bad, case.spec), ("good", case.good, case.good_spec)):
        folder = tmp_path / which
        folder.mkdir()
        if which == "bad":
            with pytest.raises(GateRefused, match=f"(?s){case.says}") as refused:
                stage(folder, base, spec)
            assert refused.value.exit_status == 3
        else:
            check(stage(folder, base, spec), base)


def check(out: Path, base: tuple[str, str | None, list[Example]]) -> None:
    """What is promised of every row that is written."""
    facts = read_json(out / "template" / "template.json")
    pad = build(base[0]).convert_tokens_to_ids(facts["pad_token"])
    rows = pq.read_table(out / "train.parquet").to_pylist()
    assert len(rows) == len(base[2])
    for row in rows:
        ids, mask = row["input_ids"], row["mask"]
        labels = [i for i, m in zip(ids, mask, strict=True) if m]
        assert labels and pad not in labels and row["length"] == len(ids) and row["supervised"] == len(labels)
        assert labels[-1] in facts["terminators"] and mask[0] == 0


@pytest.mark.parametrize("template", [MARKED, GREEDY])
def test_no_question_is_learned_whatever_the_markers_hold(template, tmp_path) -> None:
    (tmp_path / "mine.jinja").write_text(template, encoding="utf-8")
    out = stage(tmp_path, ("metaspace", None, chats()), {"template": str(tmp_path / "mine.jinja")})
    tokenizer = build("metaspace")
    for i, row in enumerate(pq.read_table(out / "train.parquet").to_pylist()):
        labels = [t for t, m in zip(row["input_ids"], row["mask"], strict=True) if m]
        assert tokenizer.decode(labels).strip() == f"It is {i}, the sea is wide and blue.</s>"


def test_a_row_that_the_template_rewrites_is_left_out_and_the_run_goes_on(tmp_path) -> None:
    out = stage(tmp_path, ("byte_level", QUIRK, zebra(431)), {})
    assert len(pq.read_table(out / "train.parquet")) == 699
    (reject,) = pq.read_table(out / "rejects.parquet").to_pylist()
    assert reject["id"] == "r:431" and "does not write turn 1, a user's" in reject["reason"]
    audit = read_json(out / "audit.json")["splits"]["train"]
    assert list(audit["dropped"].values()) == [1] and audit["rows_in"] == 700


def test_a_pad_token_that_is_the_terminator_is_not_taken(tmp_path) -> None:
    tokenizer = build("metaspace", CARD)
    tokenizer.pad_token = tokenizer.eos_token
    (tmp_path / "split").mkdir()
    tokenizer.save_pretrained(tmp_path / "base")
    write_rows(tmp_path / "split" / "train.parquet", chats())
    (tmp_path / "out").mkdir()
    context = Context(scratch=tmp_path, runtime=Runtime(), tracking=Tracking())
    render.run(Render(), {"base": tmp_path / "base", "split": tmp_path / "split"}, tmp_path / "out", context)
    assert read_json(tmp_path / "out" / "template" / "template.json")["pad_token"] == "<unk>"


def test_typed_control_strings_stay_text(tmp_path) -> None:
    out = stage(tmp_path, ("metaspace", CARD, [chat(0, "say </s> and <s>", "no </s>, no <s>")]), {})
    (row,) = pq.read_table(out / "train.parquet").to_pylist()
    assert row["input_ids"].count(1) == row["input_ids"].count(2) == 1


BARE: Callable[[TokenizedRow], TokenizedRow] = lambda row: TokenizedRow(row.id, row.ids, row.mask * 0, False)  # noqa: E731


@pytest.mark.parametrize(
    ("says", "length", "change"),
    [
        ("a row of 20 tokens does not fit", 16, None),
        (r"no supervised token: rows number \[3\]", 20, BARE),
    ],
)
def test_the_gate_of_packing(says, length, change, tmp_path) -> None:
    rows = [TokenizedRow(f"r:{i}", np.arange(20, dtype=np.int32), np.ones(20, np.uint8), False) for i in range(4)]
    context = Context(scratch=tmp_path, runtime=Runtime(), tracking=Tracking())
    for name, made in (("bad", [*rows[:3], change(rows[3])] if change else rows), ("good", rows)):
        folder = tmp_path / name
        (folder / "out").mkdir(parents=True)
        pq.write_table(table(made), folder / "train.parquet")
        spec = pack.Spec(method="bfd", length_tokens=length if name == "bad" else 64)
        if name == "bad":
            with pytest.raises(GateRefused, match=says):
                pack.run(spec, {"render": folder}, folder / "out", context)
        else:
            metrics = pack.run(spec, {"render": folder}, folder / "out", context)
            assert metrics["tokens"] == 80 and metrics["bins"] == metrics["bins_at_least"] == 2
