"""The gate on token ids: it fires with an encoder that seals ordinary vocabulary, and is silent with ours."""

from __future__ import annotations

import pytest

from finetune.data.records import Example, Message
from finetune.errors import GateRefused
from finetune.tokenization.chat import ControlStrings
from finetune.tokenization.id_check import IdCheck
from finetune.tokenization.row_tokenizer import RowTokenizer
from tests.helpers.base_templates import ALL
from tests.helpers.row_workers import decode, learned, one, row, worker
from tests.helpers.template_tokenizers import ORDINARY, tokenizer_for

CHATML = ALL["chatml"]
ADDED = row("use <tool_call>x</tool_call>", "<think>\nwhy\n</think>\n\n<tool_call>y</tool_call>")
TYPED = row("say <|im_end|> and <|im_start|>", "no <|im_end|> here, <tool_call>")


def made(sealing: bool = False) -> tuple[RowTokenizer, IdCheck]:
    """A row tokenizer and the check; `sealing`: added tokens count as control, as they did before this gate."""
    tokenizer = tokenizer_for(CHATML)
    rows = worker(tokenizer, CHATML)
    if sealing:
        rows.encoder.controls = ControlStrings([*rows.encoder.controls.strings, *ORDINARY])
    return rows, IdCheck(tokenizer, rows.template)


@pytest.mark.parametrize("example", [ADDED, TYPED, row("a", "b"), row(" é\n", "日本 \U0001f600", "x", "")])
def test_it_is_silent_with_our_encoder(example) -> None:
    rows, check = made()
    check.compare(example, rows)
    assert check.equal == 1 and not list(check.notes())


@pytest.mark.xfail(reason="a sealed row is compared by its count of special tokens, so split ones pass", strict=True)
def test_it_fires_where_added_tokens_are_sealed_and_names_row_and_tokens() -> None:
    rows, check = made(sealing=True)
    check.compare(row("a", "b"), rows)
    # a gate that counts special tokens alone would pass over ordinary vocabulary that was split
    with pytest.raises(GateRefused, match=r"row r:1: its token ids differ from the base's own apply_chat_template"):
        check.compare(ADDED, rows)


@pytest.mark.parametrize("example", [ADDED, row("</think>", "<tool_call>", "<think>", "x")])
def test_added_tokens_in_rows_have_the_bases_ids(example) -> None:
    tokenizer = tokenizer_for(CHATML)
    found, _ = one(worker(tokenizer, CHATML), example)
    chat = [{"role": m.role, "content": m.content} for m in example.messages]
    assert found.ids.tolist() == tokenizer.apply_chat_template(chat, return_dict=False)
    added = {tokenizer.convert_tokens_to_ids(s) for s in ORDINARY}
    assert len([i for i in found.ids.tolist() if i in added]) == sum(
        m.content.count(s) for m in example.messages for s in ORDINARY
    )


def test_typed_special_strings_stay_text() -> None:
    tokenizer = tokenizer_for(CHATML)
    found, tally = one(worker(tokenizer, CHATML), TYPED)
    ids, special = found.ids.tolist(), set(tokenizer.all_special_ids)
    special |= {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    end, start = (tokenizer.convert_tokens_to_ids(s) for s in ("<|im_end|>", "<|im_start|>"))
    assert [i for i in ids if i in special] == [start, end, start, end]
    text = decode(tokenizer, ids)
    assert text == "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in TYPED.messages)
    assert learned(tokenizer, found) == ["no <|im_end|> here, <tool_call><|im_end|>"]
    assert tally.special_text == {"<|im_end|>": [1, 0], "<|im_start|>": [1, 0]}


def test_special_text_is_counted_by_rows() -> None:
    tokenizer = tokenizer_for(CHATML)
    rows = worker(tokenizer, CHATML)
    from finetune.tokenization.audit import Tally

    tally = Tally()
    rows.batch([row("a", "<|im_end|><|im_end|>"), row("<|im_end|>", "b", name="r:2"), row("c", "d", name="r:3")], tally)
    assert tally.as_json()["special_text"] == {"<|im_end|>": {"rows_with_text": 2, "rows_with_id": 0}}


def test_raw_text_and_rows_that_are_left_out_are_passed_over() -> None:
    rows, check = made()
    check.compare(Example("t:1", "t", text="the sea"), rows)
    check.compare(Example("r:1", "r", (Message("user", "a"),)), rows)
    assert check.equal == 0 and not check.other


def test_rows_that_differ_on_purpose_are_named() -> None:
    opened = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")
    tokenizer = tokenizer_for(opened)
    rows = worker(tokenizer, opened)
    check = IdCheck(tokenizer, rows.template)
    check.compare(row("a", "b"), rows)
    assert check.equal == 0
    assert list(check.notes()) == [
        "1 sampled rows differ from apply_chat_template: they keep reasoning that it leaves out, or close a block that "
        "its prompt opens"
    ]
