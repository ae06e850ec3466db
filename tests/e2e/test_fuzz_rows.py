"""Whatever the rows hold: no row and no token is lost without a reason, and only answers are learned."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.data.records import Example
from finetune.errors import GateRefused, InputError
from tests.e2e.in_process import Done, Laboratory

PIECES = (
    "</s>", "<s>", "<unk>", "<pad>", "[INST]", "[/INST]", "<|im_end|>", "<<SYS>>", "</", "s>", "<",
    "a", "word ", " and", "Why?", "é", "e\u0301", "日本", "🙂", "\x00", "\x1b[0m", "\u2028", "\u202e", "\ufeff", "\xa0",
    " ", "  ", "\n", "\r\n", "\t", "\ud800", "\U00100000", "\U00108000", "\U0010ffff", "{{ 1/0 }}", "{% endfor %}",
)  # fmt: skip
WORDS = st.lists(st.sampled_from(PIECES), max_size=6).map("".join) | st.text(max_size=12)
TEXT = st.text("abcdefgh ?.", min_size=1, max_size=30).filter(str.strip) | WORDS
FIELD = TEXT | st.sampled_from([None, 7, 1.5, True, "", " ", [], {}, ["a"], {"type": "text", "text": "a"}])
ROLE = st.sampled_from(["user", "assistant", "system", "tool", "User", "asistant", "human", "gpt", "", None, 3])
EXTRA = st.dictionaries(st.sampled_from(["name", "score", "tags", "lang"]), FIELD, max_size=2)


def turns(role: str, content: str, user: str, answer: str) -> st.SearchStrategy[list[Any]]:
    """Conversations: mostly well-formed ones, and lists of whatever."""
    said = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3)
    good = said.map(
        lambda pairs: [{role: r, content: t} for p in pairs for r, t in zip((user, answer), p, strict=True)]
    )
    any_turn = st.fixed_dictionaries({}, optional={role: ROLE, content: FIELD, "name": FIELD}) | st.just(1)
    return good | st.lists(any_turn, max_size=4) | good.map(lambda t: [{role: "system", content: "Be brief."}, *t])


def with_extra(row: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Rows with other columns beside."""
    return st.builds(lambda a, b: {**b, **a}, row, EXTRA)


def columns(*names: str, **optional: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Rows of these columns, mostly good texts."""
    return with_extra(st.fixed_dictionaries(dict.fromkeys(names, TEXT), optional=optional)) | with_extra(
        st.fixed_dictionaries({}, optional={**dict.fromkeys(names, FIELD), **optional})
    )


LLAMA2 = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=2).map(
    lambda said: "".join(f"<s>[INST] {q} [/INST] {a} </s>" for q, a in said)
)
MESSAGES = turns("role", "content", "user", "assistant")
ROWS: dict[str, tuple[dict[str, Any], st.SearchStrategy[dict[str, Any]]]] = {
    # format -> a row that decides it, and what may follow
    "alpaca": ({"instruction": "Say a.", "output": "a"}, columns("instruction", "output", input=FIELD, system=FIELD)),
    "prompt_completion": (
        {"prompt": "Say b.", "completion": "b"},
        columns("prompt", "completion") | st.fixed_dictionaries({"prompt": MESSAGES, "completion": TEXT}),
    ),
    "messages": (
        {"messages": [{"role": "user", "content": "Say c."}, {"role": "assistant", "content": "c"}]},
        with_extra(st.fixed_dictionaries({"messages": MESSAGES | FIELD})),
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Say d."}, {"from": "gpt", "value": "d"}]},
        with_extra(st.fixed_dictionaries({"conversations": turns("from", "value", "human", "gpt") | FIELD})),
    ),
    "llama2_text": ({"text": "<s>[INST] Say e. [/INST] e </s>"}, st.fixed_dictionaries({"text": LLAMA2 | FIELD})),
    "text": ({"text": "Say f."}, st.fixed_dictionaries({"text": FIELD})),
}
SETS = st.sampled_from([[], ["filter=null"], ["filter.max_length_tokens=40"], ["split={eval_fraction: 0.3}"],
                        ["render.overlong=drop"], ["dedup=null"], ["render.supervise=last"]])  # fmt: skip


@pytest.fixture(scope="module")
def base(pristine) -> Path:
    return pristine.folder / "base"


def every_row_is_accounted_for(done: Done, rows_in: int) -> list[str]:
    """No row leaves without a reason; returns the ids that were packed."""
    ids = sorted(r.id for r in done.rows("ingest"))
    refused = done.table("ingest", "refused.parquet")
    assert len(ids) + len(refused) == rows_in and all(r["reason"] and r["detail"] for r in refused)
    for stage, name, column in (("filter", "rejects.parquet", "id"), ("dedup", "pairs.parquet", "dropped_id")):
        if stage in done.folders:
            kept = [r.id for r in done.rows(stage)]
            gone = [r[column] for r in done.table(stage, name)]
            assert sorted(kept + gone) == ids
            ids = sorted(kept)
    if "split" in done.folders:
        sides = [[r.id for r in done.rows("split", f"{side}.parquet")] for side in ("train", "eval")]
        assert sorted(itertools.chain(*sides)) == ids
    rendered = [r["id"] for side in ("train", "eval") for r in done.table("render", f"{side}.parquet")]
    metrics = done.metrics["render"]
    assert set(rendered) <= set(ids) and len(rendered) + metrics["dropped"] == len(ids)
    assert sum(metrics["dropped_because"].values()) == metrics["dropped"]
    return [r["id"] for r in done.table("render", "train.parquet")]


def every_token_is_packed_once(done: Done, ids: list[str]) -> None:
    """Each document lies whole in one bin, with its labels, and positions begin again with it."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rendered = {r["id"]: r for r in done.table("render", "train.parquet")}
    names = [r["row_ids"] for r in done.table("pack", "row_ids.parquet")]
    bins = done.table("pack", "packed.parquet")
    assert sorted(itertools.chain(*names)) == sorted(ids)
    assert sum(len(b["input_ids"]) for b in bins) == sum(len(r["input_ids"]) for r in rendered.values())
    collate = DataCollatorForLanguageModeling(pad_token_id=3, padding_free=True)
    for packed, inside in zip(bins, names, strict=True):
        documents = [rendered[name] for name in inside]
        assert packed["seq_lengths"] == [len(d["input_ids"]) for d in documents]
        assert packed["input_ids"] == list(itertools.chain(*(d["input_ids"] for d in documents)))
        labels = [i if m else -100 for d in documents for i, m in zip(d["input_ids"], d["mask"], strict=True)]
        assert packed["labels"] == labels and any(label != -100 for label in labels)
        positions = collate([packed])["position_ids"][0].tolist()
        assert positions == [p for d in documents for p in range(len(d["input_ids"]))]


def runs(ids: list[int], mask: list[int]) -> Iterator[list[int]]:
    """The stretches of supervised tokens."""
    for label, group in itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1]):
        if label:
            yield [i for i, _ in group]


def only_answers_are_supervised(done: Done, base: Path, last_only: bool) -> None:
    """The supervised text is, turn by turn, what the assistant said and the terminator, and nothing else."""
    from finetune.models.loading import load_tokenizer

    tokenizer = load_tokenizer(base)
    rows: dict[str, Example] = {r.id: r for r in done.rows("ingest")}
    for rendered in done.table("render", "train.parquet"):
        row, ids = rows[rendered["id"]], rendered["input_ids"]
        said = [tokenizer.decode(r, clean_up_tokenization_spaces=False) for r in runs(ids, rendered["mask"])]
        if row.text is not None:
            assert rendered["mask"] == [0] + [1] * (len(ids) - 1)
            continue
        answers = [f" {m.content}</s>" for m in row.messages if m.role == "assistant"][-1 if last_only else 0 :]
        if rendered["truncated"]:  # may end within a character
            whole = answers[: len(said) - 1]
            assert said[:-1] == whole and answers[len(said) - 1].startswith(said[-1].rstrip("\ufffd"))
        else:
            assert said == answers
            typed = set(tokenizer.all_special_ids)
            turns = sum(m.role == "assistant" for m in row.messages)
            assert [i for i in ids if i in typed] == [tokenizer.bos_token_id] + [tokenizer.eos_token_id] * turns


def whatever_comes(base: Path, format_: str, rows: list[dict[str, Any]], sets: list[str]) -> None:
    """One run on a file that begins with a good row of the format."""
    first = ROWS[format_][0]
    with tempfile.TemporaryDirectory() as folder:
        lab = Laboratory(Path(folder), base)
        path = lab.put("x.jsonl", [first, *rows])
        try:
            done = lab.run(path, source={"format": format_}, sets=sets)
        except (InputError, GateRefused) as error:
            refused = ("x.jsonl:", "split", "to pad with")  # raw text may hold every special token there is
            assert any(word in str(error) for word in refused), error
            return
        assert done.metrics["ingest"]["formats"] == {"x.jsonl": format_}
        ids = every_row_is_accounted_for(done, 1 + len(rows))
        every_token_is_packed_once(done, ids)
        only_answers_are_supervised(done, base, sets == ["render.supervise=last"])


CALM = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("format_", ROWS)
@settings(CALM, max_examples=5)
@given(data=st.data())
def test_no_row_and_no_token_is_lost(base: Path, format_: str, data: st.DataObject) -> None:
    whatever_comes(base, format_, data.draw(st.lists(ROWS[format_][1], max_size=8)), data.draw(SETS))


@pytest.mark.slow
@pytest.mark.parametrize("format_", ROWS)
@settings(CALM, max_examples=25)
@given(data=st.data())
def test_no_row_and_no_token_is_lost_in_many_more(base: Path, format_: str, data: st.DataObject) -> None:
    whatever_comes(base, format_, data.draw(st.lists(ROWS[format_][1], max_size=12)), data.draw(SETS))
