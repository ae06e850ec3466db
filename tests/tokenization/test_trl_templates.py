"""The chat templates of real models that TRL carries: the originals and those that it marks for training.

The judge (tests/helpers/template_tokenizers.py) uses transformers' apply_chat_template, the tokenizer and string
operations. The number of templates that pass each case is printed at the end of the test run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from finetune.data.records import Example, Message
from finetune.errors import FinetuneError
from finetune.tokenization import chat_template
from finetune.tokenization.audit import Tally
from finetune.tokenization.chat import has_markers
from finetune.tokenization.chat_template import choose_template
from finetune.tokenization.id_check import IdCheck
from tests.helpers import row_workers
from tests.helpers.row_workers import learned, row
from tests.helpers.template_tokenizers import (
    ANSWERED,
    CALL,
    CALLED,
    RESULT,
    chat_of,
    end_of,
    own_text,
    problem,
    save_stops,
    tokenizer_for,
)

FOLDER = files("trl") / "chat_templates"
NAMES = sorted(p.name for p in FOLDER.iterdir() if p.name.endswith(".jinja"))
TEXTS = {name: (FOLDER / name).read_text(encoding="utf-8") for name in NAMES}
THOUGHT = "because of embers"
TOOL = {
    "type": "function",
    "function": {
        "name": "weather_now",
        "description": "The weather of a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string", "description": "a town"}}},
    },
}


def thinking(*answers: str) -> Example:
    """A conversation in which each answer has reasoning of its own."""
    said: list[Message] = []
    for number, answer in enumerate(answers, 1):
        extra = json.dumps({"reasoning_content": f"{THOUGHT} {number}"})
        said += [Message("user", f"question {number}"), Message("assistant", answer, extra)]
    return Example("r:1", "r", tuple(said))


def called() -> Example:
    """A conversation with a tool call and its result."""
    call = Message("assistant", "", json.dumps({"tool_calls": [CALL]}))
    result = Message("tool", RESULT["content"], json.dumps({k: RESULT[k] for k in ("tool_call_id", "name")}))
    said = (Message("user", "weather there?"), call, result, Message("assistant", "It rains today."))
    return Example("r:1", "r", said, tools=json.dumps([TOOL]))


# case -> (row, words that carry labels in order, words that carry none)
CASES: dict[str, tuple[Example, Sequence[str], Sequence[str]]] = {
    "plain": (row("question", "alpha one"), ["alpha one"], ["question"]),
    "system": (row("question", "alpha one", system="be brief"), ["alpha one"], ["question", "be brief"]),
    "three turns": (
        row("first question", "alpha one", "second question", "bravo two", "third question", "charlie three"),
        ["alpha one", "bravo two", "charlie three"],
        ["question"],
    ),
    "white space": (row(" \n padded? ", "\n  spaced out \n"), ["spaced out"], ["padded"]),
}
EMPTY: dict[str, tuple[Example, Sequence[str], Sequence[str]]] = {
    "empty answer": (row("question", ""), [], ["question"]),
}


@pytest.fixture(autouse=True)
def no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the trial of each template in a process of its own, which tests/report/test_hostile_text.py covers."""
    monkeypatch.setattr(chat_template, "check_template", lambda *_: None)


def made_rows(
    tokenizer: Any, rows: Sequence[Example], folder: Path, own: bool = True, reasoning: Any = "auto", **rules: Any
):
    """The training rows by id, and the tally, after every gate of the render stage."""
    file = None if own else folder / "file.jinja"
    save_stops(tokenizer, folder, [ANSWERED, CALLED])
    if file:
        file.write_text(tokenizer.chat_template, encoding="utf-8")
    chosen = choose_template(file.name if file else "auto", file, tokenizer, rows, "merge", reasoning, folder)
    worker, tally = row_workers.worker(tokenizer, chosen, bos_id=None, **rules), Tally()
    check = IdCheck(tokenizer, chosen)
    made = worker.batch(rows, tally)
    for one in rows:
        check.compare(one, worker)
    worker.check_prompts(rows)
    return {one.id: one for one in made}, tally


def count(record: Callable[[str, object], None], how: str, wrong: dict[str, dict[str, str]], total: int) -> None:
    """Print how many templates pass each case; fail with the reasons of those that do not."""
    figures = ", ".join(f"{case} {total - len(bad)} of {total}" for case, bad in wrong.items())
    record("summary", f"TRL's chat templates, {how}: {figures}")
    reasons = [f"{case}, {name}: {why}" for case, bad in wrong.items() for name, why in bad.items()]
    assert not reasons, "\n".join(reasons)


def test_there_are_pairs() -> None:
    marked = [name for name in NAMES if has_markers(TEXTS[name])]
    assert len(NAMES) > 40 and len(marked) > 15
    assert all(name.replace("_training", "") in NAMES for name in marked)


def judged(cases: Any, how: str, folder: Path, record: Callable[[str, object], None]) -> None:
    """Every template on every case."""
    wrong: dict[str, dict[str, str]] = {case: {} for case in cases}
    rows = [Example(case, "r", row_.messages) for case, (row_, _, _) in cases.items()]
    for name, tokenizer in prepared():
        try:
            made, tally = made_rows(tokenizer, rows, folder, how == "the base's own")
        except FinetuneError as error:
            for case in cases:
                wrong[case][name] = str(error)
            continue
        for case, (row_, words, not_words) in cases.items():
            if case not in made:
                wrong[case][name] = str(tally.dropped)
            elif why := problem(tokenizer, row_, made[case], words, not_words):
                wrong[case][name] = why
    count(record, how, wrong, len(NAMES))


@pytest.mark.parametrize("how", ["the base's own", "as file.jinja"])
def test_every_template_gives_each_answer_its_labels(how, tmp_path, record_property) -> None:
    judged(CASES, how, tmp_path, record_property)


def test_an_empty_answer_is_its_end_alone(tmp_path, record_property) -> None:
    judged(EMPTY, "the base's own", tmp_path, record_property)


def prepared() -> Iterator[tuple[str, Any]]:
    for name in NAMES:
        yield name, tokenizer_for(TEXTS[name])


def test_calls_are_learned_by_each_template_that_writes_them(tmp_path, record_property) -> None:
    wrong: dict[str, str] = {}
    seen: Counter[bool] = Counter()
    asked, words = called(), ["weather_now", "place", "Qvist", "It rains today."]
    for name, tokenizer in prepared():
        text = own_text(tokenizer, chat_of(asked), [*words, "rain drizzle"], tools=[TOOL])
        seen[text is not None] += 1
        try:
            made, tally = made_rows(tokenizer, [asked], tmp_path)
            runs = learned(tokenizer, made["r:1"]) if made else [str(tally.dropped)]
        except FinetuneError as error:
            runs = [str(error)]
        joined = "".join(runs)
        if text is None:  # apply_chat_template drops a content of None, which R1's template asks for
            right = "no place for tool calls" in joined or "None" in TEXTS[name] or " is none" in TEXTS[name]
        else:
            right = all(word in joined for word in words) and "drizzle" not in joined and "a town" not in joined
            ends = (end_of(tokenizer, CALLED), end_of(tokenizer))
            if has_markers(TEXTS[name]) and not runs[0].endswith(ends[0]):
                ends = (runs[0][runs[0].rfind("<") :], ends[1])  # its block ends before the token that stops a call
                right = right and ends[0] in tokenizer.get_added_vocab()
            right = right and len(runs) == 2 and all(r.endswith(e) for r, e in zip(runs, ends, strict=True))
        if not right:
            wrong[name] = f"{runs}"
    record_property(
        "summary", f"TRL's chat templates, tools: {seen[True]} write calls and results, {seen[False]} do not"
    )
    assert not wrong, "\n".join(f"{name}: {why}" for name, why in wrong.items())


@pytest.mark.parametrize("reasoning", ["keep", "last", "strip"])
def test_reasoning_is_kept_or_left_out_in_each_template(reasoning, tmp_path, record_property) -> None:
    wrong: dict[str, dict[str, str]] = {reasoning: {}}
    refused = 0
    held = {"keep": [1, 2], "last": [2], "strip": []}[reasoning]
    for name, tokenizer in prepared():
        try:
            made, tally = made_rows(tokenizer, [thinking("alpha one", "bravo two")], tmp_path, reasoning=reasoning)
        except FinetuneError as error:
            made, tally = {}, str(error)
        if not made:
            if "is never asked for reasoning" in str(tally) and held:  # its prompt closes the block
                refused += 1
            else:
                wrong[reasoning][name] = str(tally)
            continue
        joined = "".join(learned(tokenizer, made["r:1"]))
        right = "alpha one" in joined and "bravo two" in joined and "question" not in joined
        if not right or [n for n in (1, 2) if f"{THOUGHT} {n}" in joined] != held:
            wrong[reasoning][name] = joined
    count(record_property, f"reasoning ({refused} never ask for it)", wrong, len(NAMES))


def test_the_last_turn_is_learned_alone_with_its_reasoning(tmp_path, record_property) -> None:
    wrong: dict[str, dict[str, str]] = {"last turn": {}}
    for name, tokenizer in prepared():
        rows = [thinking("alpha one", "bravo two"), row("first", "alpha one", "second", "bravo two", name="r:2")]
        try:
            made, tally = made_rows(tokenizer, rows, tmp_path, supervise="last")
        except FinetuneError as error:
            made, tally = {}, str(error)
        closed = "is never asked for reasoning" in str(tally)
        for key in ("r:2",) if closed else ("r:1", "r:2"):
            joined = "".join(learned(tokenizer, made[key])) if key in made else str(tally)
            if "bravo two" not in joined or "alpha" in joined or (f"{THOUGHT} 2" in joined) != (key == "r:1"):
                wrong["last turn"][name] = joined
    count(record_property, "supervise: last", wrong, len(NAMES))
