"""The stage with a real tokenizer: one token a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from finetune.context import Context
from finetune.data.records import Example, Message, read_rows, write_rows
from finetune.errors import GateRefused
from finetune.recipe import Recipe, Runtime, Tracking
from finetune.stages import filter as stage
from tests.helpers.tiny_tokenizers import KINDS, build

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ ' ' + m['role'] + ' ' + m['content'] }}{% endfor %}"
REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer that knows words."""
    return save_tokenizer(tmp_path_factory.mktemp("base"), TEMPLATE)


def save_tokenizer(folder: Path, template: str | None) -> Path:
    """A tokenizer that begins with <s> where special tokens are asked for."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "one": 2, "two": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


def chat(number: int, *contents: str, roles: str = "user assistant") -> Example:
    """A conversation with these contents."""
    turns = zip(roles.split(), contents, strict=True)
    return Example(f"s:{number}", "s", tuple(Message(role, content) for role, content in turns))


def run(rows: list[Example], base: Path, folder: Path, render: dict[str, Any] | None = None, **rules: Any) -> Any:
    """Metrics, ids kept, and {id: (reason, detail)} of those left out."""
    raw = {"name": "t", "model": "builtin:tiny-mistral", "data": [{"source": "pydoc"}]}
    spec = stage.spec(Recipe.model_validate({**raw, "filter": rules, "render": render or {}}))
    assert spec is not None
    out, before = folder / "out", folder / "ingest"
    out.mkdir(exist_ok=True)
    before.mkdir(exist_ok=True)
    write_rows(before / "rows.parquet", rows)
    metrics = stage.run(spec, {"ingest": before, "base": base}, out, Context(folder, Runtime(), Tracking()))
    rejects = pq.read_table(out / "rejects.parquet").to_pylist()
    kept = [row.id for row in read_rows(out / "rows.parquet")]
    assert metrics["rows_out"] == len(kept)
    return metrics, kept, {r["id"]: (r["reason"], r["detail"], r["text"]) for r in rejects}


ROWS = [
    chat(1, "one two", "one two one"),
    chat(2, "one", ""),
    chat(3, "one", "two", "three", roles="user assistant user"),
    chat(4, "one", "Lorem ipsum " * 40),
    Example("s:5", "s", text="one two one two one"),
    chat(6, "be brief", "one", "two", roles="system user assistant"),
]


def test_every_reject_is_written_with_its_reason(base: Path, tmp_path: Path) -> None:
    metrics, kept, rejects = run(ROWS, base, tmp_path, drop_matching=["Lorem"], max_length_tokens=4)
    assert kept == ["s:6"]
    assert metrics == {
        "rows_in": 6,
        "rows_out": 1,
        "rejected": {"alternate": 1, "drop_matching": 1, "empty": 1, "tokens": 2},
    }
    assert rejects["s:1"] == ("tokens", "5 tokens, at most 4", "one two\none two one")
    assert rejects["s:5"][:2] == ("tokens", "5 tokens, at most 4")
    assert len(rejects["s:4"][2]) == 200
    table = {r["id"]: (r["value"], r["limit"]) for r in pq.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()}
    assert table["s:1"] == (5, 4) and table["s:2"] == (None, None)


def test_defaults_keep_good_rows_and_need_no_tokenizer(tmp_path: Path) -> None:
    _, kept, rejects = run(ROWS, tmp_path / "absent", tmp_path)
    assert kept == ["s:1", "s:4", "s:5", "s:6"]
    assert {i: r[0] for i, r in rejects.items()} == {"s:2": "empty", "s:3": "alternate"}
    assert run(ROWS, tmp_path / "absent", tmp_path, alternate=False)[1] == ["s:1", "s:3", "s:4", "s:5", "s:6"]


def test_characters_and_patterns_to_keep(base: Path, tmp_path: Path) -> None:
    rules = {"min_user_characters": 4, "max_assistant_characters": 15}
    _, kept, rejects = run(ROWS, base, tmp_path, **rules)
    assert kept == ["s:1"]
    assert rejects["s:6"][:2] == ("user_short", "3 characters, at least 4")
    assert rejects["s:5"][:2] == ("assistant_long", "19 characters, at most 15")
    assert run(ROWS, base, tmp_path, keep_matching=["brief", "two one"])[1] == ["s:1", "s:5", "s:6"]


def test_rendered_tokens_count_the_template_too(base: Path, tmp_path: Path) -> None:
    long = {"max_length_tokens": 8, "count": "rendered"}
    assert run(ROWS[:1], base, tmp_path, **long)[1] == ["s:1"]  # <s> user one two assistant one two one
    with pytest.raises(GateRefused, match="8 tokens, at most 7"):
        run(ROWS[:1], base, tmp_path, **{**long, "max_length_tokens": 7})
    assert "s:5" in run(ROWS, base, tmp_path, **long)[1]


def test_a_template_that_refuses_a_row_leaves_it_out(tmp_path: Path) -> None:
    picky = save_tokenizer(tmp_path / "picky", REFUSING)
    rules = {"max_length_tokens": 90, "count": "rendered"}
    _, kept, rejects = run(ROWS, picky, tmp_path, render={"system": "refuse"}, **rules)
    assert kept == ["s:1", "s:4", "s:5"]
    assert rejects["s:6"][0] == "template"
    assert "no place for a system message" in rejects["s:6"][1]
    assert "s:6" in run(ROWS, picky, tmp_path, **rules)[1]  # merged into the user's turn


def test_rendered_tokens_need_a_template(tmp_path: Path) -> None:
    bare = save_tokenizer(tmp_path / "bare", None)
    rules = {"max_length_tokens": 90, "count": "rendered"}
    with pytest.raises(GateRefused, match=r"set render\.template"):
        run(ROWS, bare, tmp_path, **rules)
    assert run(ROWS, bare, tmp_path, render={"template": "chatml"}, **rules)[1]


def test_nothing_left_is_refused_with_the_reasons(base: Path, tmp_path: Path) -> None:
    with pytest.raises(GateRefused, match=r"leaves none of 1 rows \(empty: 1\); the first is s:2: turn 2"):
        run(ROWS[1:2], base, tmp_path)


def test_the_key_knows_the_template_only_where_it_counts(tmp_path: Path) -> None:
    def key(**sections: Any) -> Any:
        raw = {"name": "t", "model": "builtin:tiny-mistral", "data": [{"source": "pydoc"}], **sections}
        spec = stage.spec(Recipe.model_validate(raw))
        return spec and (spec.model_dump(mode="json"), stage.fingerprint(spec))

    assert key(filter=None) is None
    assert key(render={"template": "alpaca"}) == key()
    rendered = {"max_length_tokens": 8, "count": "rendered"}
    assert key(filter=rendered)[1] == {}
    assert set(key(filter=rendered, render={"template": "alpaca"})[1]) == {"template"}


def test_tokens_at_least(base: Path, tmp_path: Path) -> None:
    _, kept, rejects = run(ROWS, base, tmp_path, min_length_tokens=5)
    assert kept == ["s:1", "s:4", "s:5"]
    assert rejects["s:6"][:2] == ("tokens", "4 tokens, at least 5")


def test_rules_by_name_in_their_order(tmp_path: Path) -> None:
    rows = [
        chat(1, "one", "two"),
        chat(2, "one", "One"),
        chat(3, "one", "As an AI language model, I pass."),
        chat(4, "one", "two", "three", "four", roles="user assistant user assistant"),
        chat(5, "one", "Here:\n```\nx = 1"),
    ]
    rules = ["echo", "refusals", {"rule": "turns", "max_turns": 2}, "truncated"]
    metrics, kept, rejects = run(rows, tmp_path / "absent", tmp_path, rules=rules)
    assert kept == ["s:1"]
    assert {i: r[0] for i, r in rejects.items()} == {
        "s:2": "echo",
        "s:3": "refusals",
        "s:4": "turns",
        "s:5": "truncated",
    }
    assert metrics["rejected"] == {"echo": 1, "refusals": 1, "truncated": 1, "turns": 1}
    table = {r["id"]: (r["value"], r["limit"]) for r in pq.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()}
    assert table["s:4"] == (4, 2)


def recipe_with(folder: Path, *rules: object) -> Recipe:
    """As read from a file in `folder`."""
    raw = {"name": "t", "model": "builtin:tiny-mistral", "data": [{"source": "pydoc"}], "filter": {"rules": rules}}
    return Recipe.model_validate(raw, context={"folder": str(folder), "working_folder": "."})


def test_a_rule_of_ones_own_and_its_digest(tmp_path: Path) -> None:
    source = tmp_path / "mine.py"
    source.write_text("def short(row):\n    return 'one word' if row.messages[-1].content == 'two' else None\n")
    spec = stage.spec(recipe_with(tmp_path, "mine:short"))
    assert spec is not None and str(tmp_path) not in spec.model_dump_json()
    first = stage.fingerprint(spec)
    out, before = tmp_path / "out", tmp_path / "ingest"
    out.mkdir()
    before.mkdir()
    write_rows(before / "rows.parquet", [chat(1, "one", "two"), chat(2, "one", "three")])
    stage.run(spec, {"ingest": before}, out, Context(tmp_path, Runtime(), Tracking()))
    (reject,) = pq.read_table(out / "rejects.parquet").to_pylist()
    assert (reject["id"], reject["reason"], reject["detail"]) == ("s:1", "mine:short", "one word")
    source.write_text(source.read_text() + "# changed\n")
    assert stage.fingerprint(spec) != first
    assert stage.fingerprint(stage.spec(recipe_with(tmp_path, "echo"))) == {}


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    run(ROWS, tmp_path / "absent", tmp_path, rules=["echo"])
    first = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    run(ROWS, tmp_path / "absent", tmp_path, rules=["echo"])
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == first


def test_tokens_are_those_of_the_tokenizer_itself_whatever_its_backend_would_do(monkeypatch) -> None:
    rows = [chat(i, "What is blue? " * (1 + i % 5), f"The sea, {i} </s> ") for i in range(50)]
    for kind in KINDS:
        tokenizer = build(kind)
        texts = [[m.content for m in row.messages] for row in rows]
        want = [sum(len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in turns) for turns in texts]
        tokenizer.backend_tokenizer.enable_truncation(3)
        tokenizer.backend_tokenizer.enable_padding(length=50)
        assert stage.raw_tokens(rows, tokenizer) == want, kind
    one = [[1]] * (2 * len(rows))  # a tokenizer whose own class does something else
    monkeypatch.setattr(type(tokenizer), "__call__", lambda self, batch, **how: {"input_ids": one[: len(batch)]})
    assert stage.raw_tokens(rows, tokenizer) == [2] * len(rows)
