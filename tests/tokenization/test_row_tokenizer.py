"""Rows to ids and masks: what is supervised, what is dropped, which gates fire."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.data.records import Example, Message
from finetune.errors import GateRefused, InputError
from finetune.tokenization.chat_template import choose_template, template_text
from finetune.tokenization.row_tokenizer import RowTokenizer, TokenizedRow, table
from tests.helpers import row_workers
from tests.helpers.row_workers import learned, one, row
from tests.helpers.tiny_tokenizers import build


def worker(kind: str = "metaspace", source: str | None = None, system: str = "merge", **rules: Any) -> RowTokenizer:
    tokenizer, text = build(kind), source or template_text("mistral", None)
    made = row_workers.template(tokenizer, text, "mistral", system)
    return row_workers.worker(tokenizer, made, **{"max_length": 2048, **rules})


def supervised(made: TokenizedRow | None, kind: str = "metaspace") -> list[str]:
    """The supervised runs, decoded."""
    return [text.strip() for text in learned(build(kind), made)]


@pytest.mark.parametrize(
    ("supervise", "expected"),
    [
        ("assistant", ["one</s>", "two</s>"]),
        ("last", ["two</s>"]),
        ("all", ["[INST] Q [/INST] one</s>[INST] R [/INST] two</s>"]),
    ],
)
def test_what_is_supervised(supervise, expected) -> None:
    made, tally = one(worker(supervise=supervise), row("Q", "one", "R", "two"))
    assert supervised(made) == expected
    assert (tally.rows, tally.tokens, tally.supervised) == (1, len(made.ids), int(made.mask.sum()))


@pytest.mark.parametrize(
    ("kind", "name", "end"),
    [
        ("metaspace", "mistral", "</s>"),
        ("sentencepiece", "llama2", "</s>"),
        ("byte_level", "llama3", "<|eot_id|>"),
        ("byte_level", "chatml", "<|im_end|>"),
        ("metaspace", "zephyr", "</s>"),
        ("metaspace", "alpaca", "</s>"),
    ],
)
def test_only_answers_and_terminators_carry_labels(kind, name, end) -> None:
    w = worker(kind, template_text(name, None))
    asked = row("ask me", "an answer", "and then", "no more", system="Be good.")
    made, _ = one(w, asked)
    assert [s.replace(" ", "") for s in supervised(made, kind)] == [f"ananswer{end}", f"nomore{end}"]
    assert w.terminators == {build(kind).convert_tokens_to_ids(end)}
    assert w.check_prompts([asked]) == 1


def test_raw_text_is_wholly_supervised_and_ends_with_eos() -> None:
    w = worker()
    made, _ = one(w, Example("t:1", "t", text="the sea"))
    assert supervised(made) == ["the sea</s>"] and made.ids[0] == 1
    again, _ = one(w, Example("t:1", "t", text="<s>[INST] Q [/INST] A </s>\n"))
    assert again.ids.tolist().count(1) == again.ids.tolist().count(2) == 1  # already there: not added twice
    assert supervised(again) == ["[INST] Q [/INST] A </s>"]


def test_a_cut_row_loses_its_terminator_and_is_counted() -> None:
    full, _ = one(worker(), row("Q", "one two three four"))
    cut, tally = one(worker(max_length=len(full.ids) - 1), row("Q", "one two three four"))
    assert cut.truncated and cut.ids.tolist() == full.ids.tolist()[:-1] and tally.truncated == 1
    assert not full.truncated
    assert cut.unterminated and tally.unterminated == 1 and not full.unterminated


def test_a_row_cut_in_a_question_has_all_its_ends() -> None:
    said = row("Q", "one", "R " * 20, "two")
    full, _ = one(worker(), row("Q", "one"))
    cut, tally = one(worker(max_length=len(full.ids) + 6), said)
    assert cut.truncated and not cut.unterminated and tally.as_json()["unterminated"] == 0
    deeper, _ = one(worker(), said)
    cut, _ = one(worker(max_length=len(deeper.ids) - 1), said)
    assert cut.unterminated  # the second answer is there but for its end
    cut, _ = one(worker(max_length=len(deeper.ids) - 1, supervise="all"), said)
    assert cut.unterminated


def test_raw_text_without_eos_has_no_end() -> None:
    made, _ = one(worker(eos=None), Example("t:1", "t", text="the sea"))
    assert made.unterminated


def test_a_turn_that_the_template_passes_over_drops_the_row() -> None:
    deaf = template_text("zephyr", None).replace(
        "{%- for message in messages -%}", "{%- for message in messages if 'skipped' not in message.content -%}"
    )
    made, tally = one(worker(source=deaf), row("Q", "A", "skipped", "B"))
    assert made is None and "does not write turn 3, a user's" in next(iter(tally.dropped))


@pytest.mark.parametrize(
    ("example", "rules", "reason"),
    [
        (row("Q " * 40, "A"), {"max_length": 16}, "no supervised token"),
        (row("Q", "A " * 40), {"max_length": 16, "overlong": "drop"}, "longer than"),
        (row("Q"), {}, "no assistant turn"),
        (Example("r:1", "r", (Message("system", "S"), Message("assistant", "y"))), {}, "can be merged only into"),
        (Example("r:1", "r", (Message("tool", "x"), Message("assistant", "y"))), {}, "no place for tool calls"),
        (Example("r:1", "r", (Message("assistant", "x"), Message("user", "y"))), {}, "refused"),
        (row("a\U00100000</s>", "b"), {}, "private-use"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_dropped_with_a_reason(example, rules, reason) -> None:
    made, tally = one(worker(**rules), example)
    assert made is None and sum(tally.dropped.values()) == 1
    assert reason in next(iter(tally.dropped))
    assert next(iter(tally.examples.values())) == ["r:1"]


def test_an_answer_that_fuses_with_the_prompt_is_dropped() -> None:
    chatml = template_text("chatml", None)
    fusing = chatml.replace("assistant\\n'", "assistant: th'").replace("+ '\\n' -}}", "+ ': th' -}}", 1)
    assert fusing.count(": th") == 2
    w = worker("byte_level", fusing)
    assert one(w, row("Q", "Paris"))[0] is not None
    made, tally = one(w, row("Q", "e sea"))
    assert made is None and "fuses" in next(iter(tally.dropped))


def test_a_system_message_is_merged_or_refused() -> None:
    made, _ = one(worker(), row("Q", "A", system="Be good."))
    assert build("metaspace").decode(made.ids.tolist()).startswith("<s>[INST] Be good.\n\nQ [/INST]")
    assert one(worker(system="refuse"), row("Q", "A"))[0] is not None
    rows = [row("Q", "A"), row("Q", "A", system="Be good.", name="r:2")]
    with pytest.raises(GateRefused, match=r"row r:2 has a system message.*render\.system: merge"):
        choose_template("mistral", None, build("metaspace"), rows, "refuse")


def test_a_system_message_outside_of_the_sample_is_refused_too() -> None:
    with pytest.raises(GateRefused, match=r"row r:1 has a system message.*render\.system: merge"):
        one(worker(system="refuse"), row("Q", "A", system="Be good."))


def test_two_bos_tokens_are_refused() -> None:
    with pytest.raises(GateRefused, match="two BOS"):
        one(worker(source="{{ bos_token }}" + template_text("mistral", None)), row("Q", "A"))


def test_a_terminator_that_is_no_token_is_refused() -> None:
    made, tally = one(worker(source=template_text("chatml", None)), row("Q", "A"))
    assert made is None and "writes no token that ends an answer" in next(iter(tally.dropped))
    with pytest.raises(GateRefused, match=r"chatml: .*no token that ends an answer.*alpaca and mistral use its EOS"):
        choose_template("chatml", None, build("metaspace"), [row("Q", "A")])


def test_markers_around_a_question_never_let_it_be_trained() -> None:
    bare = template_text("zephyr", None).replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    made, tally = one(worker(source="{% generation %}" + bare + "{% endgeneration %}"), row("Q", "A"))
    assert supervised(made) == ["A</s>"] and not tally.dropped


def test_a_prompt_that_does_not_begin_the_row_is_dropped_with_its_words() -> None:
    chatml = template_text("chatml", None)
    wrong = chatml.replace("{{- '<|im_start|>assistant\\n' -}}", "{{- '<|im_start|>assistant\\nthink' -}}")
    assert wrong != chatml
    assert worker("byte_level", chatml).check_prompts([row("Q", "A")]) == 1
    w = worker("byte_level", wrong)
    made, tally = one(w, row("Q", "A"))
    assert made is None and "ends with 'think', which the template does not write" in next(iter(tally.dropped))
    assert w.check_prompts([row("Q", "A")]) == 0


def test_a_space_that_the_template_leaves_out_of_its_block_carries_no_label() -> None:
    spaced = template_text("mistral", None).replace(
        "{%- generation -%}\n        {{- ' ' + ", "{{- ' ' -}}\n{%- generation -%}\n{{- "
    )
    tokenizer = build("byte_level")
    made, _ = one(row_workers.worker(tokenizer, spaced), row("Q", "\none"))
    assert learned(tokenizer, made) == ["\none<|end_of_text|>"]


def test_the_table_has_the_promised_columns() -> None:
    made, _ = one(worker(), row("Q", "A"))
    for rows in ([], [made, made]):
        schema = table(rows).schema
        assert [f"{f.name}: {f.type}" for f in schema] == [
            "id: string",
            "input_ids: list<item: int32>",
            "mask: list<item: uint8>",
            "length: int32",
            "supervised: int32",
            "truncated: bool",
        ]
    assert table([made]).to_pylist()[0]["input_ids"] == made.ids.tolist()


def test_a_template_that_outgrows_the_memory_on_some_rows_only_ends_in_one_sentence() -> None:
    """The trial of the template sees conversations of four turns; here the sixth asks for a text without end."""
    greedy = (
        template_text("chatml", None)
        + "{% if messages | length > 5 %}{{ 'a' * (10 ** (messages | length + 4)) }}{% endif %}"
    )
    w = worker("byte_level", greedy)
    assert one(w, row("Q", "A", "R", "B"))[0] is not None
    with pytest.raises(InputError, match=r"row r:1: the chat template builds a text that outgrows 1 GB"):
        one(w, row("Q", "A", "R", "B", "S", "C"))
