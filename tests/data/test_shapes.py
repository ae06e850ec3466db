"""Every shape of row × how it is stored: no word of a row is lost without a message, and the same turns come out.

The check knows nothing of formats: it takes the words out of the raw row, and looks for each in what was made of it.
"""

from __future__ import annotations

import ast
import copy
import gzip
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune.data.files import evaluation_files
from finetune.data.formats import decide
from finetune.data.records import Example
from finetune.data.sources import read_source
from finetune.errors import InputError
from finetune.recipe import LocalSource

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "sumtool", "arguments": '{"left": "two", "right": "three"}'},
}
TOOL = {"type": "function", "function": {"name": "sumtool", "description": "addsup", "parameters": {"type": "object"}}}
ASK, SAY = {"role": "user", "content": "question one"}, {"role": "assistant", "content": "answer one"}

SHAPES: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{"role": "system", "content": "system text"}, ASK, SAY]},
    "weights": {"messages": [ASK, {**SAY, "weight": 0}, {"role": "user", "content": "more"}, {**SAY, "weight": 1}]},
    "tools": {
        "messages": [
            ASK,
            {"role": "assistant", "content": None, "tool_calls": [CALL], "thinking": "thought one"},
            {"role": "tool", "content": "result five", "tool_call_id": "c1"},
            SAY,
        ],
        "tools": [TOOL],
    },
    "tools as text": {
        "messages": [ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
        "tools": json.dumps([TOOL]),
    },
    "function_call": {
        "messages": [
            ASK,
            {
                "role": "assistant",
                "content": None,
                "function_call": {"name": "sumtool", "arguments": '{"left": "two"}'},
            },
            {"role": "function", "name": "sumtool", "content": "result five"},
            SAY,
        ],
        "functions": [TOOL["function"]],
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "question one"}, {"from": "gpt", "value": "answer one"}],
        "system": "system text",
    },
    "sharegpt tools": {
        "conversations": [
            {"from": "human", "value": "question one"},
            {"from": "function_call", "value": '{"name": "sumtool", "arguments": {"left": "two"}}'},
            {"from": "observation", "value": "result five"},
            {"from": "gpt", "value": "answer one"},
        ],
        "tools": json.dumps([TOOL["function"]]),
    },
    "alpaca": {
        "instruction": "question one",
        "input": "given two",
        "output": "answer one",
        "history": [["earlier", "reply"]],
        "system": "system text",
    },
    "alpaca reasoning": {"instruction": "question one", "output": "answer one", "reasoning": "thought one"},
    "prompt completion": {"prompt": "question one", "completion": "answer one", "context": "passage one"},
    "prompt turns": {"prompt": [ASK], "completion": [SAY]},
    "prompt response": {"prompt": "question one", "response": "answer one"},
    "query response": {"query": "question one", "response": "answer one", "history": [["earlier", "reply"]]},
    "question answer": {"question": "question one", "answer": "answer one", "context": "passage one"},
    "squad": {
        "id": "7",
        "title": "heading",
        "context": "passage one",
        "question": "question one",
        "answers": {"text": ["answer one"], "answer_start": [3]},
    },
    "dialog": {"dialog": ["question one", "answer one", "question two", "answer two"]},
    "pairs": {
        "conversation": [{"human": "question one", "assistant": "answer one"}, {"human": "more", "assistant": "last"}]
    },
    "weights as text": {"messages": [ASK, {**SAY, "train": "false"}, {"role": "user", "content": "more"}, SAY]},
    "parts": {
        "messages": [
            {"role": "user", "content": [{"text": "question one"}, {"type": "input_text", "text": "part two"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "answer one"}]},
        ]
    },
    "speakers": {
        "conversation": [{"speaker": "Human", "text": "question one"}, {"speaker": "AI", "message": "answer one"}]
    },
    "titled columns": {"Instruction": "question one", " Input": "given two", "Output ": "answer one", "": "7"},
    "turns in Python's notation": {"messages": str([ASK, {**SAY, "name": None}])},
    "text": {"text": "once upon a time"},
    "written chat": {"text": "<|im_start|>user\nquestion one<|im_end|>\n<|im_start|>assistant\nanswer one<|im_end|>\n"},
}


def as_is(rows: list[dict[str, Any]], folder: Path) -> Path:
    """JSON lines."""
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "x.jsonl"


def padded(rows: list[dict[str, Any]], folder: Path) -> Path:
    """Parquet, together with a row that has fields of its own, which Arrow gives to every row as null."""
    odd = copy.deepcopy(rows[0])
    for value in odd.values():
        for turn in value if isinstance(value, list) else []:
            if isinstance(turn, dict):
                turn["name"] = "odd"
    odd["added_column"] = "odd"
    pq.write_table(pa.Table.from_pylist([*rows, odd]), folder / "x.parquet")
    return folder / "x.parquet"


def shards(rows: list[dict[str, Any]], folder: Path) -> Path:
    """A folder of two files, the second with a column more."""
    for name, part in (("a.jsonl", rows), ("b.jsonl", [{**row, "added_column": "odd"} for row in rows])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def reordered(rows: list[dict[str, Any]], folder: Path) -> Path:
    """The keys of rows and turns the other way round."""

    def turned(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: turned(v) for k, v in reversed(value.items())}
        return [turned(v) for v in value] if isinstance(value, list) else value

    return as_is([turned(row) for row in rows], folder)


def packed(rows: list[dict[str, Any]], folder: Path) -> Path:
    """JSON lines with a byte order mark and Windows line ends, packed."""
    text = "\ufeff" + "".join(json.dumps(row) + "\r\n" for row in rows)
    (folder / "x.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return folder / "x.jsonl.gz"


def table(rows: list[dict[str, Any]], folder: Path) -> Path:
    """Columns of numbered values, as pandas' to_json writes them."""
    columns = {name: {str(i): row[name] for i, row in enumerate(rows)} for name in rows[0]}
    (folder / "x.json").write_text(json.dumps(columns))
    return folder / "x.json"


STORED: dict[str, Callable[[list[dict[str, Any]], Path], Path]] = {
    "as is": as_is,
    "padded": padded,
    "shards": shards,
    "reordered": reordered,
    "packed": packed,
    "table": table,
}


def words(value: object, key: str = "") -> Iterator[str]:
    """The words of a raw row that a model should see: no keys of the notation, no roles, no numbers."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name not in ("role", "from", "speaker", "train", "type", "weight", "id", "answer_start", "title"):
                yield from words(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from words(inner, key)
    elif isinstance(value, str) and value.startswith("[{'"):
        yield from words(ast.literal_eval(value))
    elif isinstance(value, str):
        yield from re.findall(r"[a-z]{3,}", re.sub(r"<\|[^|]*\|>(user|assistant)?", " ", value))


def of_example(row: Example) -> str:
    """All that was made of a row, tool calls and tools included."""
    parts = [row.text or "", row.tools or "", row.extra or ""]
    return "\n".join([*parts, *(part for m in row.messages for part in (m.content, m.extra or ""))])


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_word_of_a_row_is_lost(shape: str, stored: str, tmp_path: Path) -> None:
    row = SHAPES[shape]
    path = STORED[stored]([row, row], tmp_path)
    decision, found = read_source(LocalSource(source="local", path=path), "s", tmp_path)
    rows = list(found)
    assert all(isinstance(r, Example) for r in rows), rows
    plain = next(iter(read_source(LocalSource(source="local", path=as_is([row], tmp_path)), "s", tmp_path)[1]))
    assert isinstance(plain, Example)
    assert [m.role for m in rows[0].messages] == [m.role for m in plain.messages]  # type: ignore[union-attr]
    for example in rows:
        assert isinstance(example, Example)
        lost = sorted(set(words(row)) - set(re.findall(r"[a-z]{3,}", of_example(example))))
        assert not lost, f"{shape}, {stored}: {lost} lost; unused {decision.unused}, notes {dict(decision.notes)}"
        if stored in ("as is", "packed", "table"):
            assert (example.messages, example.text, example.tools) == (plain.messages, plain.text, plain.tools)
    kept = rows[0] if stored in ("padded", "reordered") else plain
    assert isinstance(kept, Example)
    assert [(m.role, m.content, m.learn) for m in kept.messages] == [
        (m.role, m.content, m.learn) for m in plain.messages
    ]
    if stored == "padded":
        assert "null" not in of_example(kept)
        assert [m.extra for m in kept.messages] == [m.extra for m in plain.messages]


EXAMPLES = re.findall(r"### ([^\n]+)\n\nRead as `(\w+)`.*?```json\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.S)


@pytest.mark.parametrize(("name", "format_", "text"), EXAMPLES, ids=[name for name, _, _ in EXAMPLES])
def test_the_examples_of_the_page_are_read_as_it_says(name: str, format_: str, text: str, tmp_path: Path) -> None:
    row = json.loads(text)
    assert decide("auto", {}, [row]).format == format_
    (example,) = read_source(LocalSource(source="local", path=as_is([row], tmp_path)), "s", tmp_path)[1]
    assert isinstance(example, Example)
    assert not set(words(row)) - set(re.findall(r"[a-z]{3,}", of_example(example)))
    assert len(text.splitlines()) <= 5


def test_the_page_has_every_shape() -> None:
    assert len(EXAMPLES) == DOCS.read_text(encoding="utf-8").count("```json") == 10


def read(path: Path, **more: Any) -> list[list[str]]:
    """The contents of each row's turns; a refused row as its reason."""
    _, rows = read_source(LocalSource.model_validate({"source": "local", "path": str(path), **more}), "s", path.parent)
    return [[m.content for m in r.messages] if isinstance(r, Example) else [r.reason] for r in rows]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.json", '{"question": ["q", "r"], "answer": ["a", "b"]}'),
        ("x.json", '{"question": {"0": "q", "7": "r"}, "answer": {"0": "a", "7": "b"}}'),
        ("x.csv", "sep=;\nquestion;answer\nq;a\nr;b\n"),
        ("x.csv", '"sep=|"\nQuestion|Answer\nq|a\nr|b\n'),
        ("x.csv", ",question,answer\n0,q,a\n1,r,b\n"),
        ("x.csv", "question|answer\nq|a\nr|b\n"),
    ],
)
def test_a_table_is_read_by_rows(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert read(tmp_path / name) == [["q", "a"], ["r", "b"]]


def test_one_row_of_lists_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"prompt": [ASK], "completion": [SAY]}))
    assert read(tmp_path / "x.json") == [["question one", "answer one"]]
    (tmp_path / "x.json").write_text(json.dumps({"dialog": ["a", "b"]}))
    assert read(tmp_path / "x.json") == [["a", "b"]]


def test_files_of_a_folder_are_read_each_in_its_format(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [ASK, SAY]}) + "\n")
    (tmp_path / "b.csv").write_text("query;response;score\nq;r;1\n")
    (tmp_path / "c.jsonl").write_text(json.dumps({"nothing": "known"}) + "\n")
    assert read(tmp_path) == [["question one", "answer one"], ["q", "r"], ["type"]]
    assert read(tmp_path, format="messages")[1] == ["type"]  # the recipe says what they are
    decision, rows = read_source(LocalSource(source="local", path=tmp_path), "s", tmp_path)
    assert decision.unused == () and len(list(rows)) == 3
    assert any("score were read as prompt_completion" in note for note in decision.notes)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gzip.compress(b'{"prompt": "q", "completion": "a"}', mtime=0), "gzip; name it .gz"),
        (b"PK\x03\x04rest", "a ZIP archive or an Excel sheet"),
        (b"PAR1\x15\x04", "Parquet; name it .parquet"),
    ],
)
def test_packed_content_under_a_text_files_name_is_named(content: bytes, words: str, tmp_path: Path) -> None:
    for name in ("x.jsonl", "x.json", "x.csv"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=words):
            read(tmp_path / name)


def test_evaluation_files_among_others_are_named(tmp_path: Path) -> None:
    for name in ("train.jsonl", "test.jsonl", "contest.jsonl", "my-dev-2.jsonl"):
        (tmp_path / name).write_text(json.dumps({"messages": [ASK, SAY]}) + "\n")
    assert evaluation_files([tmp_path]) == ["my-dev-2.jsonl", "test.jsonl"]
    assert evaluation_files([tmp_path / "*.jsonl"]) == ["my-dev-2.jsonl", "test.jsonl"]
    assert evaluation_files([tmp_path / "test.jsonl"]) == evaluation_files([tmp_path / "t*st.jsonl"]) == []


def test_answers_that_write_tool_calls_are_noted(tmp_path: Path) -> None:
    row = {"query": "q", "answers": json.dumps([{"name": "f", "arguments": {}}]), "tools": json.dumps([TOOL])}
    decision, rows = read_source(LocalSource(source="local", path=as_is([row], tmp_path)), "s", tmp_path)
    assert len(list(rows)) == 1 and any("JSON of tool calls" in note for note in decision.notes)
