"""Where the answers of a conversation are: invariants over made-up chats, long ones, and markers."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.records import Example, Message
from finetune.errors import InputError
from finetune.tokenization.answers import Finder
from finetune.tokenization.audit import Tally
from finetune.tokenization.chat_template import choose_template
from tests.helpers import row_workers
from tests.helpers.base_templates import ALL, kind_of
from tests.helpers.row_workers import decode, learned, one, row, worker
from tests.helpers.template_tokenizers import tokenizer_for
from tests.helpers.tiny_tokenizers import build

# base -> what its template makes of an answer: before it, of its edges, and behind it
WRITES: dict[str, tuple[str, bool, str]] = {
    "chatml": ("", False, "<|im_end|>"),
    "llama3": ("", True, "<|eot_id|>"),
    "gemma2": ("", True, "<end_of_turn>"),
    "mistral_card": (" ", False, "</s>"),
    "llama2": (" ", True, " </s>"),
    "mistral_v3": (" ", False, "</s>"),
    "qwen": ("", False, "<|im_end|>"),
    "phi3": ("", False, "<|end|>"),
}
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in m.content %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}{% endif %}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' + said }}{% elif m.role == 'assistant' %}{{ said }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
words = st.text(st.sampled_from("ab e\n<>/[]{}'\""), max_size=10)
answers = words | st.sampled_from([" a", "a ", "\n\na", "user", "assistant", "INST", "a\n</", "é日"])
chats = st.lists(st.tuples(words.map(lambda q: f"q{q}"), answers.map(lambda a: f"a{a}")), min_size=1, max_size=4)


def own_ids(tokenizer: Any, example: Example, **given: Any) -> list[int]:
    chat = [{"role": m.role, "content": m.content} for m in example.messages]
    ids = tokenizer.apply_chat_template(chat, return_dict=False, **given)
    assert isinstance(ids, list)
    return ids


@pytest.mark.parametrize("name", WRITES)
@settings(max_examples=25, deadline=None)
@given(said=chats)
def test_each_turn_is_learned_with_its_end_and_ids_are_the_bases(name, said) -> None:
    before, trims, behind = WRITES[name]
    tokenizer = _tokenizer(name)
    example = row(*(text for pair in said for text in pair))
    rows = _worker(name)
    text = rows.render(example)
    contents = [a.strip() if trims else a for _, a in said]
    assert [text.text[a.start : a.end] for a in text.answers] == [before + c + behind for c in contents]
    made, tally = one(rows, example)
    if made is None:  # the answer's first token is one with the end of the prompt
        assert "fuses" in next(iter(tally.dropped))
        return
    assert made.ids.tolist() == own_ids(tokenizer, example)
    assert len(learned(tokenizer, made)) == len(said)
    if kind_of(name) == "byte_level":
        assert learned(tokenizer, made) == [before + c + behind for c in contents]


_WORKERS: dict[str, Any] = {}


def _tokenizer(name: str) -> Any:
    return build(kind_of(name), ALL[name])


def _worker(name: str) -> Any:
    if name not in _WORKERS:
        _WORKERS[name] = worker(_tokenizer(name), ALL[name])
    return _WORKERS[name]


@settings(max_examples=20, deadline=None)
@given(said=chats, last=st.booleans())
def test_turns_with_the_same_words_are_told_apart(said, last) -> None:
    same = [text for _ in range(3) for text in said[0]]
    tokenizer = _tokenizer("chatml")
    made, _ = one(worker(tokenizer, ALL["chatml"], supervise="last" if last else "assistant"), row(*same))
    assert learned(tokenizer, made) == [f"{said[0][1]}<|im_end|>"] * (1 if last else 3)
    assert int(made.mask[-2 if decode(tokenizer, made.ids[-1:].tolist()) == "\n" else -1]) == 1


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral_card", "gemma2"])
@pytest.mark.parametrize("turns", [500, 31, 33, 64])
def test_all_answers_of_a_long_conversation_are_found(name, turns) -> None:
    """Beyond 32 answers most follow the pattern of the others; their texts are as in a short conversation."""
    tokenizer, rows = _tokenizer(name), _worker(name)
    said = [f"the sea {i}" if i % 2 else f"blue {i // 7}" for i in range(2 * turns)]
    found = rows.render(row(*said))
    before, _, behind = WRITES[name]
    assert [found.text[a.start : a.end] for a in found.answers] == [f"{before}{t}{behind}" for t in said[1::2]]
    made, _ = one(rows, row(*said))
    assert made.ids.tolist() == own_ids(tokenizer, row(*said))
    assert len(learned(tokenizer, made)) == turns


def test_a_long_conversation_costs_a_fixed_number_of_renderings() -> None:
    finder, counted = Finder(["<|im_end|>"], ["<|im_end|>"]), []

    def write(chat: list, prompt: bool) -> tuple[str, list]:
        counted.append(len(chat))
        text = "".join(f"{m['role']}:{m['content']}<|im_end|>" for m in chat)
        return text + "assistant:" * prompt, []

    costs = []
    for turns in (100, 200, 400):
        counted.clear()
        chat = [{"role": ("user", "assistant")[i % 2], "content": f"{i}"} for i in range(2 * turns)]
        assert len(finder.find(write, chat).answers) == turns
        costs.append(len(counted))
    assert costs[0] == costs[1] == costs[2]


def test_markers_are_cut_to_the_answer_and_to_its_control_token() -> None:
    marked = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
        "{% else %}{{ '<|im_start|>assistant\n' }}{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    said = row("first", " alpha one\n", "second", "bravo two")
    for template in (
        marked,  # the line end after the terminator is in the block
        marked.replace(
            "<|im_start|>assistant\n' }}{% generation %}{{ ", "' }}{% generation %}{{ '<|im_start|>assistant\n' + "
        ),
        "{% generation %}"
        + marked.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        + "{% endgeneration %}",
        ALL["chatml"],
    ):
        tokenizer = tokenizer_for(template, "<|im_end|>")
        made, _ = one(worker(tokenizer, template), said)
        assert learned(tokenizer, made) == [" alpha one\n<|im_end|>", "bravo two<|im_end|>"]
        assert made.ids.tolist() == own_ids(tokenizer, said)
    partly = marked.replace("{% generation %}{{ m.content", "{{ m.content[:3] }}{% generation %}{{ m.content[3:]")
    tokenizer = tokenizer_for(partly, "<|im_end|>")
    made, _ = one(worker(tokenizer, partly), said)
    assert learned(tokenizer, made) == ["pha one\n<|im_end|>", "vo two<|im_end|>"]


@pytest.mark.parametrize("which", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("supervise", ["assistant", "last", "all"])
def test_a_turn_that_is_not_learned_stays_in_the_context(which, supervise) -> None:
    tokenizer = _tokenizer("chatml")
    plain = row("first", "alpha one", "second", "bravo two")
    flags = iter(which)
    said = tuple(m if m.role == "user" else replace(m, learn=next(flags)) for m in plain.messages)
    made, tally = one(worker(tokenizer, ALL["chatml"], supervise=supervise), replace(plain, messages=said))
    wanted = [t for t, learn in zip(("alpha one", "bravo two"), which, strict=True) if learn]
    if supervise == "last":
        wanted = wanted if which[1] else []
    if supervise != "all" and not wanted:
        assert made is None and tally.dropped == {"no turn of it is learned": 1}
        return
    assert made.ids.tolist() == own_ids(tokenizer, plain)
    joined = "".join(learned(tokenizer, made))
    assert [t for t in ("alpha one", "bravo two") if t in joined] == wanted
    assert ("second" in joined) == (supervise == "all")
    if supervise == "assistant":
        assert learned(tokenizer, made) == [f"{t}<|im_end|>" for t in wanted]
        assert sum(tally.masked.values()) == which.count(False)


def test_tools_reach_the_template() -> None:
    template = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + ALL["chatml"]
    tokenizer = tokenizer_for(template, "<|im_end|>")
    tools = [{"type": "function", "function": {"name": "look", "description": "at <|im_end|> it"}}]
    with_tools = row("a", "b", tools=json.dumps(tools))
    chosen = choose_template("auto", None, tokenizer, [with_tools])
    made, _ = one(worker(tokenizer, chosen), with_tools)
    assert decode(tokenizer, made.ids.tolist()).startswith(json.dumps(tools))
    assert made.ids.tolist().count(tokenizer.eos_token_id) == 2  # the one in the description is text
    assert learned(tokenizer, made) == ["b<|im_end|>"]
    bare, _ = one(worker(tokenizer, chosen), row("a", "b"))
    assert bare.ids.tolist() == own_ids(tokenizer, row("a", "b"))


def thinking(inline: bool) -> Example:
    said: list[Message] = []
    for q, thought, a in (("first", "hm one", "alpha"), ("second", "hm two", "bravo")):
        block = f"<think>\n{thought}\n</think>\n\n{a}"
        extra = None if inline else json.dumps({"reasoning_content": thought})
        said += [Message("user", q), Message("assistant", block if inline else a, extra)]
    return Example("r:1", "r", tuple(said))


ONE, TWO = "<think>\nhm one\n</think>\n\nalpha<|im_end|>", "<think>\nhm two\n</think>\n\nbravo<|im_end|>"
BARE = "<think>\n\n</think>\n\nbravo<|im_end|>"


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize(
    ("reasoning", "supervise", "labels"),
    [
        ("keep", "assistant", [ONE, TWO]),
        ("keep", "last", [TWO]),
        ("last", "last", [TWO]),
        ("auto", "last", [TWO]),
        ("strip", "last", [BARE]),
    ],
)
def test_reasoning_under_a_template_that_strips_the_earlier(inline, reasoning, supervise, labels) -> None:
    tokenizer = tokenizer_for(QWEN3, "<|im_end|>")
    chosen = row_workers.template(tokenizer, QWEN3, reasoning=reasoning)
    made, tally = one(worker(tokenizer, chosen, supervise=supervise), thinking(inline))
    assert learned(tokenizer, made) == labels and not tally.masked
    if reasoning in ("auto", "last"):
        chat = thinking(True)
        assert made.ids.tolist() == own_ids(tokenizer, chat)


@pytest.mark.parametrize("inline", [True, False])
def test_an_earlier_turn_whose_reasoning_is_stripped_is_masked_and_counted(inline) -> None:
    tokenizer = tokenizer_for(QWEN3, "<|im_end|>")
    made, tally = one(worker(tokenizer, QWEN3), thinking(inline))
    assert learned(tokenizer, made) == [TWO]
    assert tally.masked == {"the template writes this earlier turn without its reasoning": 1}


def test_reasoning_without_a_place_is_refused_with_the_way_out() -> None:
    tokenizer = _tokenizer("mistral_card")
    deaf = ALL["mistral_card"].replace(
        "' ' + message['content'] + eos", "' ' + message['content'].split('</think>')[-1] + eos"
    )
    rows = worker(tokenizer, deaf)
    with pytest.raises(InputError, match=r"does not write the row's reasoning_content; render\.reasoning: strip"):
        rows.render(thinking(False))
    stripped = row_workers.template(tokenizer, deaf, reasoning="strip")
    made, _ = one(worker(tokenizer, stripped), thinking(False))
    assert [t.strip() for t in learned(tokenizer, made)] == ["alpha</s>", "bravo</s>"]


@pytest.mark.parametrize("length", [7, 16, 50, 1000])
def test_raw_text_is_split_without_a_token_lost(length) -> None:
    tokenizer = _tokenizer("chatml")
    text = "The sea is wide and blue, and so are you. " * 6
    (whole,) = worker(tokenizer, ALL["chatml"]).batch([Example("t:1", "t", text=text)], Tally())
    rows, tally = worker(tokenizer, ALL["chatml"], max_length=length, overlong="split"), Tally()
    parts = rows.batch([Example("t:1", "t", text=text)], tally)
    assert [i for p in parts for i in p.ids.tolist()] == whole.ids.tolist()
    assert len(parts) == -(-len(whole.ids) // length) == tally.rows and all(len(p.ids) <= length for p in parts)
    assert [p.id for p in parts] == ["t:1", *(f"t:1#{i}" for i in range(2, len(parts) + 1))]
    assert not any(p.truncated or p.unterminated or p.mask[0] for p in parts)
    assert all(p.mask[1:].all() for p in parts) and tally.rows_in == 1
    assert tally.tokens == len(whole.ids)
    chat, _ = one(rows, row("first " * 2, "alpha one " * length))
    assert chat is None or (chat.truncated and len(chat.ids) == length)  # conversations are cut


LONG = pytest.mark.xfail(reason="beyond 32 answers white space at an edge unlabels ends or drops the row", strict=True)


@pytest.mark.parametrize(
    ("spaced", "edge"),
    [
        (0, "{} \n"),
        (0, " {}"),
        (39, "{} \n"),
        pytest.param(15, "{} \n", marks=LONG),  # the pattern of the turns in the middle: 8 of 40 ends carry no label
        pytest.param(16, "{} \n", marks=LONG),  # its own end carries no label
        pytest.param(20, " {}", marks=LONG),  # dropped: "the answer's first token fuses with the end of the prompt"
    ],
)
def test_white_space_in_a_long_conversation_keeps_every_end(spaced, edge) -> None:
    said = [edge.format(f"a{i // 2}") if i == 2 * spaced + 1 else f"a{i // 2}" for i in range(80)]
    tokenizer = _tokenizer("chatml")
    made, _ = one(_worker("chatml"), row(*said))
    assert learned(tokenizer, made) == [f"{text}<|im_end|>" for text in said[1::2]]
